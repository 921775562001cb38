"""What a source of images is, and opening one by its name in the config or in a flag."""

import re
from typing import NamedTuple, Protocol

import numpy as np

from cfjax.data.embedded import MnistSource
from cfjax.data.image_folder import ImageFolderSource
from cfjax.data.image_records import ArrayRecordSource
from cfjax.data.latents import LatentsSource
from cfjax.data.tfds_images import TfdsSource
from cfjax.errors import UserError, check_choice

SOURCES = ("mnist", "image_folder", "array_record", "tfds", "latents")
SPLITS = ("train", "held_out")
# A dataset as flags name it; of pixels.
_DATASET = re.compile(
    r"(?P<name>mnist)|(?P<of_folder>image_folder|array_record):(?P<path>.+)"
    r"|tfds:(?P<tfds_name>[^:]+(:\d+\.\d+\.\d+)?):(?P<data_dir>.+)"
)


class Source(Protocol):
    """Labelled images, or their latents, with random access.

    Attributes:
      class_names: one a class.
      image_shape: (H, W, C).
      left_out: `{"name", "reason"}` of what was damaged when the source was opened, and skipped.
      fingerprint: a hash of what can be known of the images without reading them all.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    left_out: tuple[dict[str, str], ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def examples_at(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """New arrays of n examples, which the loader's threads ask for.

        `{"image": uint8 [n, H, W, C], "label": int32 [n]}`; of latents, instead of images,
        `"moments": [n, 2, H, W, 2 C]`, means and log-variances of each image and its mirror image,
        and `"source_id": int64 [n]`.
        """
        ...


def open_source(
    name: str,
    path: str,
    split: str,
    *,
    size: int,
    channels: int,
    num_classes: int,
    on_corrupt: str = "refuse",
    tfds_name: str = "",
    replaces: bool = True,
) -> Source:
    """Opens a source.

    Args:
      name: one of SOURCES.
      path: the folder of all but "mnist", which is embedded.
      split: "train" or "held_out"; fixed, disjoint parts.
      size: height and width, in pixels; or of latents.
      channels: 1 (grey) or 3 (RGB); or of latents.
      num_classes: as the model has them.
      on_corrupt: what is damaged is a reason to "refuse", or to "skip" it.
      tfds_name: of the set, for "tfds".
      replaces: give the next sound image where one is to be skipped; without, a damaged record of
        "array_record" or "tfds" is an error, for a caller who leaves it out.

    Raises:
      UserError: an unknown name, data that are missing, or that don't fit the other values.
    """
    check_choice("data.name", name, SOURCES)
    check_choice("split", split, SPLITS)
    if name == "mnist":
        source = MnistSource(split)
        if (size, size, channels) != source.image_shape:
            raise UserError(
                f"data.size {size} with data.channels {channels} does not fit the digits of 28x28"
                " grey pixels; set them to 28 and 1."
            )
    elif name == "latents":
        source = LatentsSource(path, split, size, channels, on_corrupt)
    elif name == "array_record":
        source = ArrayRecordSource(path, split, size, channels, on_corrupt, replaces)
    elif name == "tfds":
        source = TfdsSource(tfds_name, path, split, size, channels, on_corrupt, replaces)
    else:
        source = ImageFolderSource(path, split, size, channels, on_corrupt)
    if len(source.class_names) != num_classes:
        raise UserError(
            f"data.num_classes is {num_classes}, but the data have {len(source.class_names)}"
            f" classes; set data.num_classes={len(source.class_names)}."
        )
    return source


class Dataset(NamedTuple):
    """Pixels, by the arguments of `open_source`; from `parse_dataset`."""

    name: str
    path: str = ""
    tfds_name: str = ""


def parse_dataset(text: str) -> Dataset:
    """Reads `mnist`, `image_folder:PATH`, `array_record:PATH` or `tfds:NAME:DATA_DIR`.

    Raises:
      UserError: it is none of these.
    """
    match = _DATASET.fullmatch(text)
    if match is None:
        raise UserError(
            f"the dataset {text!r} is not understood; pass mnist, image_folder:PATH,"
            " array_record:PATH or tfds:NAME:DATA_DIR."
        )
    if match["data_dir"]:
        return Dataset("tfds", match["data_dir"], match["tfds_name"])
    return Dataset(match["name"] or match["of_folder"], match["path"] or "")


def open_dataset(
    text: str,
    split: str,
    *,
    size: int,
    channels: int,
    num_classes: int,
    on_corrupt: str = "refuse",
    replaces: bool = True,
) -> Source:
    """Opens the pixels of a dataset that `parse_dataset` understands.

    Args:
      text: names the dataset.
      split, size, channels, num_classes, on_corrupt, replaces: as for `open_source`.

    Raises:
      UserError: it is not understood, or can't be opened with these values.
    """
    dataset = parse_dataset(text)
    try:
        return open_source(
            *(dataset.name, dataset.path, split),
            size=size,
            channels=channels,
            num_classes=num_classes,
            on_corrupt=on_corrupt,
            tfds_name=dataset.tfds_name,
            replaces=replaces,
        )
    except UserError as error:
        raise UserError(
            f"the dataset {text!r} can't be read as images of {size}x{size}x{channels}: {error}"
        ) from error


def all_images(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Every image uint8 `[N, H, W, C]` and label int32 `[N]` of a source, in memory."""
    examples = source.examples_at(np.arange(len(source)))
    return examples["image"], examples["label"]
