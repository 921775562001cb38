"""What a source of images is, and opening one by its name in the config."""

from typing import Protocol

import numpy as np

from cfjax.data.embedded import MnistSource
from cfjax.data.image_folder import ImageFolderSource
from cfjax.data.image_records import ArrayRecordSource
from cfjax.data.tfds_images import TfdsSource
from cfjax.errors import UserError, check_choice

SOURCES = ("mnist", "image_folder", "array_record", "tfds", "latents")
SPLITS = ("train", "held_out")


class Source(Protocol):
    """Labelled images, or their latents, with random access.

    Attributes:
      class_names: one a class.
      image_shape: (H, W, C).
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def examples_at(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """New arrays of n examples, which the loader's threads ask for.

        `{"image": uint8 [n, H, W, C], "label": int32 [n]}`; of latents, instead of images,
        `"moments": [n, 2, H, W, 2 C]`, means and log-variances of each image and its mirror image.
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
) -> Source:
    """Opens a source.

    Args:
      name: one of SOURCES.
      path: the folder of all but "mnist", which is embedded.
      split: "train" or "held_out"; fixed, disjoint parts.
      size: height and width in pixels.
      channels: 1 (grey) or 3 (RGB).
      num_classes: as the model has them.
      on_corrupt: what is damaged is a reason to "refuse", or to "skip" it.
      tfds_name: of the set, for "tfds".

    Raises:
      UserError: an unknown name, data that are missing, or that don't fit the other values.
    """
    check_choice("data.name", name, SOURCES)
    check_choice("split", split, SPLITS)
    if name == "latents":
        raise UserError(
            "data.name 'latents' has no reader in this version, as images can't be encoded yet;"
            " train on pixels with 'array_record', 'tfds' or 'image_folder'."
        )
    if name == "mnist":
        source = MnistSource(split)
        if (size, size, channels) != source.image_shape:
            raise UserError(
                f"data.size {size} with data.channels {channels} does not fit the digits of 28x28"
                " grey pixels; set them to 28 and 1."
            )
    elif name == "array_record":
        source = ArrayRecordSource(path, split, size, channels, on_corrupt)
    elif name == "tfds":
        source = TfdsSource(tfds_name, path, split, size, channels, on_corrupt)
    else:
        source = ImageFolderSource(path, split, size, channels, on_corrupt)
    if len(source.class_names) != num_classes:
        raise UserError(
            f"data.num_classes is {num_classes}, but the data have {len(source.class_names)}"
            f" classes; set data.num_classes={len(source.class_names)}."
        )
    return source


def all_images(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Every image uint8 `[N, H, W, C]` and label int32 `[N]` of a source, in memory."""
    examples = source.examples_at(np.arange(len(source)))
    return examples["image"], examples["label"]
