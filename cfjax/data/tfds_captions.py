"""Captioned images that TFDS prepared as array_record, such as COCO; read without TensorFlow."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from absl import logging

from cfjax.data.captioned_records import CaptionedRecords
from cfjax.data.image_files import check_channels, decode_image, map_with_progress
from cfjax.data.images import center_crop
from cfjax.data.records import RecordReader
from cfjax.data.tfds_images import only_feature, open_builder, shards_of_split
from cfjax.errors import UserError, listed

_CAPTION_KEYS = ("captions", "caption", "text")
_NAME_KEYS = ("image/filename", "file_name", "filename")
_MEND = "copy it anew or prepare the set again"
_BATCH = 64


class TfdsCaptionsSource(CaptionedRecords):
    """The pairs of a TFDS set with one image and captions, images centre-cropped.

    Captions are the feature `captions`, `caption` or `text`: a text, several, or several dictionaries
    with a `text` or `caption`, as COCO's. "held_out" is the split `validation` of the set, or else
    `val`, or `test`, or the last tenth of `train`.
    """

    def __init__(
        self,
        name: str,
        path: str | PathLike,
        split: str,
        size: int,
        channels: int,
        on_corrupt: str = "refuse",
    ):
        """Opens all shards and reads all captions, for which all records are read once.

        Args:
          name: of the set, as TFDS calls it: "coco_captions", "NAME/CONFIG:VERSION".
          path: TFDS's data_dir, in which it lies.
          split: "train" or "held_out".
          size: height and width after the crop.
          channels: 1 (grey) or 3 (RGB).
          on_corrupt: "refuse" a damaged shard, record or image, or one without captions; or "skip"
            it and name it in the log.

        Raises:
          UserError: the set is unknown, not prepared, prepared in a format without random access,
            damaged, or not one of captioned images.
        """
        import tensorflow_datasets as tfds  # takes a while

        check_channels(channels)
        builder = open_builder(name, path)
        features = builder.info.features
        image_key = only_feature(builder, tfds.features.Image, "a set of captioned images")
        caption_key = next((key for key in _CAPTION_KEYS if key in features), None)
        if caption_key is None:
            raise UserError(
                f"the TFDS set {name!r} has no feature {' or '.join(map(repr, _CAPTION_KEYS))}, but"
                f" {listed(sorted(features))}; choose a set of captioned images."
            )
        name_keys = [key for key in _NAME_KEYS if key in features]
        texts_only = tfds.features.FeaturesDict({caption_key: features[caption_key]})
        image_only = tfds.features.FeaturesDict(
            {key: features[key] for key in (image_key, *name_keys)}
        )
        decoders = {image_key: tfds.decode.SkipDecoding()}
        self.image_shape = (size, size, channels)

        def captions(record: bytes) -> list[str]:
            return _texts(texts_only.deserialize_example_np(record)[caption_key], caption_key)

        def pixels(record: bytes) -> np.ndarray:
            example = image_only.deserialize_example_np(record, decoders=decoders)
            names = [example[key].decode("utf-8", "replace") for key in name_keys]
            image = decode_image(example[image_key], (*names, "of a TFDS record")[0], channels)
            return center_crop(image, size).reshape(self.image_shape)

        reader = RecordReader(
            shards_of_split(builder, split, ("validation", "val", "test")),
            on_corrupt,
            _MEND,
            replaces=False,
        )
        found, damaged = _read_all(reader, captions, on_corrupt, name)
        self._damaged = tuple(damaged)
        self._set_pairs(reader, list(found), list(found.values()), on_corrupt, pixels)

    @property
    def left_out(self) -> tuple[dict[str, str], ...]:
        return (*self._reader.left_out, *self._damaged)


def _read_all(
    reader: RecordReader, captions: Any, on_corrupt: str, name: str
) -> tuple[dict[int, list[str]], list[dict[str, str]]]:
    """The captions by record, and `{"name", "reason"}` of records that can't be used."""
    logging.info("reading the captions of %d records of the TFDS set %s", len(reader), name)

    def read(indices: Sequence[int]) -> list[list[str] | UserError]:
        try:
            return reader.decoded_at(indices, captions)
        except UserError as error:
            if on_corrupt == "refuse":
                raise
            return [error] if len(indices) == 1 else [read([index])[0] for index in indices]

    batches = [
        range(first, min(first + _BATCH, len(reader))) for first in range(0, len(reader), _BATCH)
    ]
    read_batches = map_with_progress(read, batches, "reading captions")
    found, damaged = {}, []
    for index, result in enumerate(it for batch in read_batches for it in batch):
        reason = str(result) if isinstance(result, UserError) else ""
        if not result:
            reason = f"record {index} of the TFDS set {name} has no captions; {_MEND}."
            if on_corrupt == "refuse":
                raise UserError(f"{reason.removesuffix('.')}, or set data.on_corrupt=skip.")
        if reason:
            logging.warning("skipped: %s", reason)
            damaged.append({"name": f"record {index} of {name}", "reason": reason})
        else:
            found[index] = result
    if not found:
        raise UserError(f"no record of the TFDS set {name!r} has captions; {_MEND}.")
    return found, damaged


def _texts(value: Any, key: str) -> list[str]:
    """The captions in what TFDS gives for their feature; blank ones are none."""
    if isinstance(value, dict):
        inner = next((it for it in ("text", "caption") if it in value), None)
        value = value.get(inner)
    items = value if isinstance(value, np.ndarray | list) else [value]
    if not all(isinstance(it, bytes) for it in items):
        raise UserError(
            f"the feature {key!r} of a TFDS record is neither a text, nor texts, nor dictionaries"
            " with a 'text' or 'caption'; choose a set of captioned images."
        )
    return [text for it in items if (text := it.decode("utf-8", "replace").strip())]
