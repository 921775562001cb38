"""Captions that images are generated from to be scored, and the real images that they describe."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from cfjax import build_documents
from cfjax.data.document_sources import CaptionedImages
from cfjax.errors import UserError


class DescribedImages:
    """Each image of a captioned set once; what `image_sets.of_source` reads of a source.

    Attributes:
      image_shape, fingerprint, left_out: see `cfjax.data.document_sources.CaptionedImages`.
    """

    def __init__(self, captioned: CaptionedImages):
        self._captioned = captioned
        self._pairs = np.array([pairs[0] for pairs in pairs_of_images(captioned)])
        self.image_shape, self.fingerprint = captioned.image_shape, captioned.fingerprint
        self.left_out = captioned.left_out

    def __len__(self) -> int:
        return len(self._pairs)

    def examples_at(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Images uint8 `[n, H, W, C]`."""
        return {"image": self._captioned.images_at(self._pairs[np.asarray(indices)])}


@dataclasses.dataclass(frozen=True)
class Captions:
    """The captions of a split.

    Attributes:
      split: of the set.
      texts: one of each image, then another one of those that have several, and so on.
      images: that they describe.
    """

    split: str
    texts: Sequence[str]
    images: DescribedImages

    def at(self, begin: int, end: int) -> list[str]:
        """Those of samples `begin` to `end` - 1: all over and over."""
        return [self.texts[index % len(self.texts)] for index in range(begin, end)]

    def describe(self, count: int) -> str:
        """Which captions `count` samples have, with their checksum."""
        used = self.texts[:count]
        digest = hashlib.sha256("\0".join(used).encode()).hexdigest()[:12]
        again = ", over and over" if count > len(used) else ""
        return (
            f"{len(used)} of split {self.split}, of {len(self.images)} images in turn{again}, sha256"
            f" {digest}"
        )


def open_captions(config: ConfigDict, split: str, size: int = 0, channels: int = 0) -> Captions:
    """The captions of a config's documents; see `build_documents.source`.

    Raises:
      UserError: the documents have no captions, or can't be opened.
    """
    source = build_documents.source(config, split, size, channels)
    if not hasattr(source, "captions"):
        raise UserError(
            f"the documents of {config.data.name} have no captions to generate images from; score"
            " them with cfjax.evaluate_documents."
        )
    texts = [source.captions[pair] for pair in one_caption_an_image(source)]
    return Captions(split, texts, DescribedImages(source))


def pairs_of_images(source: CaptionedImages) -> list[np.ndarray]:
    """The pairs of each image of a captioned set, in order."""
    ids = source.image_ids if hasattr(source, "image_ids") else np.arange(len(source))
    return np.split(np.arange(len(ids)), np.flatnonzero(np.diff(ids)) + 1)


def one_caption_an_image(source: CaptionedImages) -> np.ndarray:
    """All pairs: the first of each image, then the second of each that has two, and so on."""
    number = np.concatenate([np.arange(len(pairs)) for pairs in pairs_of_images(source)])
    return np.argsort(number, kind="stable")
