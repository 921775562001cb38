"""Images that TFDS prepared as array_record, such as ImageNet; read without TensorFlow."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from cfjax.data.image_files import check_channels, decode_image
from cfjax.data.images import center_crop
from cfjax.data.records import RecordReader, RecordSource, Shard
from cfjax.data.splits import HELD_OUT_SHARE
from cfjax.errors import UserError
from cfjax.paths import absolute


class TfdsSource(RecordSource):
    """The images of a TFDS set for image classification, centre-cropped.

    "held_out" is the split `validation` of the set, or else `test`, or else the last tenth of
    `train`. See `cfjax.data.sources.Source`.
    """

    def __init__(
        self,
        name: str,
        path: str | PathLike,
        split: str,
        size: int,
        channels: int,
        on_corrupt: str = "refuse",
        replaces: bool = True,
    ):
        """Opens all shards.

        Args:
          name: of the set, as TFDS calls it: "imagenet2012", "NAME/CONFIG:VERSION".
          path: TFDS's data_dir, in which it lies.
          split: "train" or "held_out".
          size: height and width after the crop.
          channels: 1 (grey) or 3 (RGB).
          on_corrupt: "refuse" a damaged shard or image, or "skip" it and name it in the log.
          replaces: see `cfjax.data.records.RecordReader`.

        Raises:
          UserError: the set is unknown, not prepared, prepared in a format without random access,
            damaged, or not one of labelled images.
        """
        import tensorflow_datasets as tfds  # takes a while

        check_channels(channels)
        builder = open_builder(name, path)
        self._features = builder.info.features
        use = "a set for image classification"
        self._image_key = only_feature(builder, tfds.features.Image, use)
        self._label_key = only_feature(builder, tfds.features.ClassLabel, use)
        self._decoders = {self._image_key: tfds.decode.SkipDecoding()}
        self.class_names = tuple(self._features[self._label_key].names)
        self.image_shape = (size, size, channels)
        shards = shards_of_split(builder, split)
        mend = "copy it anew or prepare the set again"
        self._reader = RecordReader(shards, on_corrupt, mend, replaces)

    def examples_at(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        decoded = self._reader.decoded_at(indices, self._decode)
        return {
            "image": np.stack([image for image, _ in decoded]),
            "label": np.array([label for _, label in decoded], np.int32),
        }

    def _decode(self, record: bytes) -> tuple[np.ndarray, int]:
        example = self._features.deserialize_example_np(record, decoders=self._decoders)
        size, _, channels = self.image_shape
        name = str(example.get("file_name", "of a TFDS record"))
        image = decode_image(example[self._image_key], name, channels)
        return center_crop(image, size).reshape(self.image_shape), example[self._label_key]


def open_builder(name: str, path: str | PathLike) -> Any:
    """TFDS's builder of a set that is prepared as array_record.

    Args:
      name: of the set, as TFDS calls it.
      path: TFDS's data_dir, in which it lies.

    Raises:
      UserError: the set is unknown, not prepared, or prepared in a format without random access.
    """
    import tensorflow_datasets as tfds  # takes a while

    if not name or not str(path):
        raise UserError(
            "data.name 'tfds' needs data.tfds_name, such as imagenet2012, and data.path, the"
            " data_dir in which TFDS prepared it."
        )
    builder = _builder(tfds, name, path)
    _require_array_record(tfds, builder, name, path)
    return builder


def only_feature(builder: Any, kind: type, use: str) -> str:
    """The key of the one feature of a kind that a set has.

    Raises:
      UserError: it has none or several; choose `use`.
    """
    features = builder.info.features
    keys = [key for key, feature in features.items() if type(feature) is kind]
    if len(keys) != 1:
        raise UserError(
            f"the TFDS set {builder.info.name!r} has {len(keys)} features of the kind"
            f" {kind.__name__}, but must have one; choose {use}."
        )
    return keys[0]


def shards_of_split(
    builder: Any, split: str, held_out_names: Sequence[str] = ("validation", "test")
) -> list[Shard]:
    """The shards of "train" or "held_out", and which of their records belong to it.

    Args:
      builder: of the set.
      split: "train" or "held_out".
      held_out_names: splits of the set of which the first that it has is held out; if it has none,
        the last tenth of `train` is.

    Raises:
      UserError: the set has no split `train`.
    """
    instructions = builder.info.splits[
        _tfds_split(builder, split, held_out_names)
    ].file_instructions
    return [Shard(it.filename, it.examples_in_shard, it.skip, it.take) for it in instructions]


def _builder(tfds: Any, name: str, path: str | PathLike) -> Any:
    place = absolute(path)
    if not place.exists():
        raise UserError(f"there is no folder {place}; set data.path to the data_dir of TFDS.")
    try:
        return _builder_of_files(tfds, name, place)
    except ImportError:  # by the code of a set that is known, but has no files
        raise _not_prepared(name, path) from None
    except (ValueError, TypeError, AssertionError, RuntimeError, OSError) as error:
        first_line = str(error).split("\n")[0]
        raise UserError(
            f"TFDS has no set {name!r}, neither among those that it knows nor in {place}"
            f" ({first_line}); set data.tfds_name to one."
        ) from error


def _builder_of_files(tfds: Any, name: str, place: PathLike) -> Any:
    """From what was prepared, since the code of some sets, such as COCO's, needs TensorFlow."""
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=place)
    except tfds.core.DatasetNotFoundError:
        return tfds.builder(name, data_dir=place)


def _not_prepared(name: str, path: str | PathLike) -> UserError:
    return UserError(
        f"the TFDS set {name!r} is not prepared in {path}; run 'tfds build {name}"
        f" --file_format=array_record --data_dir={path}'."
    )


def _require_array_record(tfds: Any, builder: Any, name: str, path: str | PathLike) -> None:
    """Refuses a set that is not prepared, or in a format without random access."""
    info = builder.info
    if not info.splits:
        raise _not_prepared(name, path)
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if array_record not in info.available_file_formats():
        raise UserError(
            f"the TFDS set {name!r} is prepared as {info.file_format.value}, which has no random"
            " access; run 'tfds convert_format --out_file_format=array_record"
            f" --dataset_version_dir={builder.data_dir}', which needs TensorFlow."
        )
    if info.file_format != array_record:
        info.set_file_format(array_record, override=True, override_if_initialized=True)


def _tfds_split(builder: Any, split: str, held_out_names: Sequence[str]) -> str:
    splits = builder.info.splits
    others = [name for name in held_out_names if name in splits]
    if "train" not in splits:
        raise UserError(
            f"the TFDS set {builder.info.name!r} has no split 'train'; choose another set."
        )
    if others:
        return "train" if split == "train" else others[0]
    percent = round(100 * (1 - HELD_OUT_SHARE))
    return f"train[:{percent}%]" if split == "train" else f"train[{percent}%:]"
