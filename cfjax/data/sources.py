"""What a source of images is, and opening one by its name in the config."""

from typing import Protocol, TypedDict

import numpy as np

from cfjax.data.embedded import MnistSource
from cfjax.data.image_folder import ImageFolderSource
from cfjax.errors import UserError, check_choice

SOURCES = ("mnist", "image_folder", "latents")
SPLITS = ("train", "held_out")


class Example(TypedDict):
    """uint8 image `[H, W, C]` and its class."""

    image: np.ndarray
    label: int


class Source(Protocol):
    """Labelled images with random access.

    Attributes:
      labels: int32 `[N]`.
      class_names: one a class.
      image_shape: (H, W, C).
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def images_at(self, indices: np.ndarray) -> np.ndarray:
        """A new array uint8 `[n, H, W, C]`, which the loader's threads ask for."""
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
) -> Source:
    """Opens a source.

    Args:
      name: "mnist" (embedded) or "image_folder".
      path: the folder of "image_folder".
      split: "train" or "held_out"; fixed, disjoint parts.
      size: height and width in pixels.
      channels: 1 (grey) or 3 (RGB).
      num_classes: as the model has them.
      on_corrupt: a broken image file of a folder is a reason to "refuse", or to "skip" it.

    Raises:
      UserError: an unknown name, data that are missing, or that don't fit the other values.
    """
    check_choice("data.name", name, SOURCES)
    check_choice("split", split, SPLITS)
    if name == "latents":
        raise UserError(
            "data.name 'latents' has no reader in this version, as images can't be encoded yet;"
            " train on pixels with 'image_folder' or 'mnist'."
        )
    if name == "mnist":
        source = MnistSource(split)
        if (size, size, channels) != source.image_shape:
            raise UserError(
                f"data.size {size} with data.channels {channels} does not fit the digits of 28x28"
                " grey pixels; set them to 28 and 1."
            )
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
    return source.images_at(np.arange(len(source))), source.labels
