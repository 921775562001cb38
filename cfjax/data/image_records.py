"""Images as records of array_record shards: what a record is, and the source that reads a set.

A record is `label` and the length of the name, both little-endian int32, the name, and then the
image: the bytes of a file of any kind, or, where the set is stored "raw", its pixels. Where a set
is stored cropped, they are those of a square of `description["size"]` pixels.
"""

import dataclasses
import io
import os
import struct
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image

from cfjax.data.image_files import check_channels, decode_image
from cfjax.data.images import center_crop
from cfjax.data.records import RecordReader, RecordSource, read_manifest, shards_of
from cfjax.errors import UserError, check_choice
from cfjax.paths import absolute

KIND = "images"
STORED_AS = ("original", "png", "jpeg", "raw")
_HEADER = struct.Struct("<ii")


@dataclasses.dataclass(frozen=True)
class Storing:
    """How images are stored.

    Attributes:
      stored_as: the "original" files; or centre-cropped, as "png", "jpeg" or "raw" pixels.
      size: height and width after the crop; 0 for "original".
      channels: 1 (grey) or 3 (RGB), which "original" files need not have.
      jpeg_quality: of "jpeg", without chroma subsampling.
    """

    stored_as: str = "original"
    size: int = 0
    channels: int = 3
    jpeg_quality: int = 95

    def __post_init__(self):
        check_choice("store", self.stored_as, STORED_AS)
        check_channels(self.channels)
        if (self.size > 0) != (self.stored_as != "original"):
            raise UserError(
                f"images stored as {self.stored_as!r} can't have the size {self.size}; original files"
                " keep theirs, and all others need one."
            )

    def encode(self, content: bytes, name: str) -> bytes:
        """What is stored of the bytes of an image file.

        Raises:
          UserError: it can't be decoded.
        """
        if self.stored_as == "original":
            decode_image(content, name, only_check=True)
            return content
        pixels = center_crop(decode_image(content, name, self.channels), self.size)
        if self.stored_as == "raw":
            return pixels.tobytes()
        options = {"quality": self.jpeg_quality, "subsampling": 0}
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(
            encoded, self.stored_as, **(options if self.stored_as == "jpeg" else {})
        )
        return encoded.getvalue()


def pack(label: int, name: str, image: bytes) -> bytes:
    """A record."""
    encoded = os.fsencode(name)
    return b"".join((_HEADER.pack(label, len(encoded)), encoded, image))


def unpack(record: bytes) -> tuple[int, str, memoryview]:
    """`(label, name, image)` of a record."""
    label, length = _HEADER.unpack_from(record)
    end = _HEADER.size + length
    return label, os.fsdecode(record[_HEADER.size : end]), memoryview(record)[end:]


@dataclasses.dataclass(frozen=True)
class ImageDecoder:
    """What a record holds of an image, to pixels uint8 `[size, size, channels]`.

    Attributes:
      stored_as: as of `Storing`.
      stored_size: height and width of what is stored; 0 for "original".
      size: height and width after the crop.
      channels: 1 (grey) or 3 (RGB).
    """

    stored_as: str
    stored_size: int
    size: int
    channels: int

    @classmethod
    def of(
        cls, folder: PathLike, description: Mapping[str, Any], size: int, channels: int
    ) -> "ImageDecoder":
        """For a set with this description.

        Raises:
          UserError: its images are of other channels, or smaller.
        """
        if description["stored_as"] != "original" and channels != description["channels"]:
            raise UserError(
                f"data.channels is {channels}, but {folder} was prepared with"
                f" {description['channels']}; set data.channels={description['channels']}."
            )
        if 0 < description["size"] < size:
            raise UserError(
                f"data.size is {size}, but the images in {folder} were prepared at"
                f" {description['size']}; prepare larger ones or set"
                f" data.size={description['size']}."
            )
        return cls(description["stored_as"], description["size"], size, channels)

    def __call__(self, image: memoryview, name: str) -> np.ndarray:
        """The pixels; `name` is for errors.

        Raises:
          UserError: it can't be decoded.
        """
        shape = (self.size, self.size, self.channels)
        if self.stored_as != "raw":
            decoded = decode_image(bytes(image), name, self.channels)
            return center_crop(decoded, self.size).reshape(shape)
        pixels = np.frombuffer(image, np.uint8)
        pixels = pixels.reshape(self.stored_size, self.stored_size, self.channels)
        if self.stored_size == self.size:
            return pixels
        larger = Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)
        return center_crop(larger, self.size).reshape(shape)


class ArrayRecordSource(RecordSource):
    """The images of a set that `cfjax.prepare_images` made, centre-cropped.

    See `cfjax.data.sources.Source`.
    """

    def __init__(
        self,
        path: str | PathLike,
        split: str,
        size: int,
        channels: int,
        on_corrupt: str = "refuse",
        replaces: bool = True,
    ):
        """Opens all shards.

        Args:
          path: the folder of the set, with a folder a split.
          split: "train" or "held_out".
          size: height and width after the crop.
          channels: 1 (grey) or 3 (RGB).
          on_corrupt: "refuse" a damaged shard or image, or "skip" it and name it in the log.
          replaces: see `cfjax.data.records.RecordReader`.

        Raises:
          UserError: the set is missing, damaged, or not of these images.
        """
        check_channels(channels)
        folder = absolute(path) / split
        if not str(path) or not folder.exists():
            raise UserError(
                f"there is no folder {folder}; set data.path to one that cfjax.prepare_images made."
            )
        manifest = read_manifest(folder, KIND)
        description = manifest["description"]
        self._decode_image = ImageDecoder.of(folder, description, size, channels)
        self.class_names = tuple(description["class_names"])
        self.image_shape = (size, size, channels)
        mend = "delete it and run cfjax.prepare_images again"
        self._reader = RecordReader(shards_of(folder, manifest), on_corrupt, mend, replaces)

    def examples_at(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        decoded = self._reader.decoded_at(indices, self._decode)
        images = np.empty((len(decoded), *self.image_shape), np.uint8)
        for row, (image, _) in enumerate(decoded):
            images[row] = image
        return {"image": images, "label": np.array([label for _, label in decoded], np.int32)}

    def _decode(self, record: bytes) -> tuple[np.ndarray, int]:
        label, name, image = unpack(record)
        return self._decode_image(image, name), label
