"""Captioned images as records: what sources of them share, and the one of prepared sets.

A set is one of images, whose records have no class, with `captions.jsonl` beside the shards: a line
for each image that was listed. All captions are so read without an image.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import PurePath
from typing import Any

import numpy as np
from absl import logging

from cfjax.data.caption_listing import CAPTIONS_FILE, unpack_captions
from cfjax.data.image_files import check_channels
from cfjax.data.image_records import ImageDecoder, unpack
from cfjax.data.records import RecordReader, RecordSource, read_manifest, shards_of
from cfjax.errors import UserError
from cfjax.paths import absolute

KIND = "captioned_images"


class CaptionedRecords(RecordSource):
    """Pairs of an image and a caption; an image with many captions is in as many pairs.

    Pairs of one image follow each other. See `cfjax.data.document_sources.CaptionedImages`.

    Attributes:
      captions: one a pair.
      image_shape: (H, W, C).
    """

    captions: Sequence[str]
    image_shape: tuple[int, int, int]

    def _set_pairs(
        self,
        reader: RecordReader,
        records: Sequence[int],
        captions_of_records: Sequence[Sequence[str]],
        on_corrupt: str,
        decode: Callable[[bytes], np.ndarray],
    ) -> None:
        """Sets what the methods read.

        Args:
          reader: which replaces nothing: a caption would get the image of another.
          records: of the reader, those with images.
          captions_of_records: of each of them.
          on_corrupt: as of the reader.
          decode: a record to pixels; raises a `UserError` if they are broken.
        """
        counts = [len(captions) for captions in captions_of_records]
        self._records = np.repeat(np.asarray(records, np.int64), counts)
        self.captions = [text for captions in captions_of_records for text in captions]
        self._reader, self._decode, self._on_corrupt = reader, decode, on_corrupt
        self._named: set[int] = set()
        digest = hashlib.sha256(reader.fingerprint.encode())
        for record, text in zip(self._records, self.captions, strict=True):
            digest.update(f"{record}\0{text}\n".encode())
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def image_ids(self) -> np.ndarray:
        """Which image each pair has, int64 `[pairs]`; not falling."""
        return self._records

    def images_at(self, indices: Sequence[int]) -> np.ndarray:
        """The images of some pairs, uint8 `[n, H, W, C]`.

        Raises:
          UserError: one is damaged, whatever is to be done with those: `captions` can't follow.
            `examples_at` skips.
        """
        records = self._records[np.asarray(indices, np.int64)]
        images = np.empty((len(records), *self.image_shape), np.uint8)
        for row, pixels in enumerate(self._reader.decoded_at(records, self._decode)):
            images[row] = pixels
        return images

    def examples_at(self, indices: Sequence[int]) -> dict[str, Any]:
        """Pairs; with on_corrupt "skip", the next sound one where an image is damaged.

        Returns:
          `{"image": uint8 [n, H, W, C], "caption": [n] texts, "index": int64 [n]}`, where `index`
          says which pairs they are.

        Raises:
          UserError: an image is damaged and to be refused, or all are.
        """
        indices = np.array(indices, np.int64)
        try:
            images = self.images_at(indices)
        except UserError:
            if self._on_corrupt == "refuse":
                raise
            found = [self._sound_from(int(index)) for index in indices]
            indices = np.array([index for index, _ in found], np.int64)
            images = np.stack([image for _, image in found])
        captions = [self.captions[index] for index in indices]
        return {"image": images, "caption": captions, "index": indices}

    def _sound_from(self, index: int) -> tuple[int, np.ndarray]:
        for following in range(index, index + len(self)):
            candidate = following % len(self)
            try:
                return candidate, self.images_at([candidate])[0]
            except UserError as error:
                if (record := int(self._records[candidate])) not in self._named:
                    self._named.add(record)
                    logging.warning("skipped, and the next one read instead: %s", error)
        raise UserError("no image of the captioned set can be read; prepare it again.")


class CaptionedRecordSource(CaptionedRecords):
    """The pairs of a set that `cfjax.prepare_captions` made, images centre-cropped."""

    def __init__(
        self,
        path: str | PathLike,
        split: str,
        size: int,
        channels: int,
        on_corrupt: str = "refuse",
    ):
        """Opens all shards and reads all captions.

        Args:
          path: the folder of the set, with a folder a split.
          split: "train" or "held_out".
          size: height and width after the crop.
          channels: 1 (grey) or 3 (RGB).
          on_corrupt: "refuse" a damaged shard or image, or "skip" it and name it in the log.

        Raises:
          UserError: the set is missing, damaged, or not of these images; or its captions are
            damaged, which is always refused.
        """
        check_channels(channels)
        folder = absolute(path) / split
        if not str(path) or not folder.exists():
            raise UserError(
                f"there is no folder {folder}; set data.path to one that cfjax.prepare_captions"
                " made."
            )
        manifest = read_manifest(folder, KIND)
        decode = ImageDecoder.of(folder, manifest["description"], size, channels)
        self.image_shape = (size, size, channels)
        captions = read_captions(folder, manifest)
        mend = "delete it and run cfjax.prepare_captions again"
        reader = RecordReader(shards_of(folder, manifest), on_corrupt, mend, replaces=False)
        left_out = {it["name"] for it in reader.left_out}
        readable, first = [], 0
        for shard in manifest["shards"]:
            end = first + shard["num_records"]
            if PurePath(shard["file"]).name not in left_out:
                readable += captions[first:end]
            first = end
        names = [name for name, _ in readable]

        def pixels(record: bytes) -> np.ndarray:
            _, name, image = unpack(record)
            return decode(image, name)

        self._set_pairs(
            reader, range(len(names)), [texts for _, texts in readable], on_corrupt, pixels
        )


def read_captions(folder: PathLike, manifest: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """`(name, captions)` of each record of a set, in order.

    Args:
      folder: of the set.
      manifest: its manifest.

    Raises:
      UserError: the file of the captions is missing or has changed.
    """
    path = absolute(folder) / CAPTIONS_FILE
    mend = "delete its folder and run cfjax.prepare_captions again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error}); {mend}.") from error
    expected = manifest["description"].get("files", {}).get(CAPTIONS_FILE)
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{path} has changed since it was written; {mend}.")
    skipped = {it["name"] for it in manifest["skipped"]}
    captions = [(name, texts) for name, texts in unpack_captions(content) if name not in skipped]
    if len(captions) != manifest["num_records"]:
        raise UserError(
            f"{path} has captions of {len(captions)} images, but its set has"
            f" {manifest['num_records']}; {mend}."
        )
    return captions
