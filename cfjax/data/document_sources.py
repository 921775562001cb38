"""What sources of documents are: captioned images, and sequences of images."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class CaptionedImages(Protocol):
    """Pairs of an image and a caption; an image with several captions makes several.

    Attributes:
      image_shape: (H, W, C).
      fingerprint: a hash of what can be known of the pairs without reading all images.
      left_out: `{"name", "reason"}` of what was damaged when the source was opened, and skipped.
      captions: one a pair; read without decoding images.
    """

    image_shape: tuple[int, int, int]
    fingerprint: str
    left_out: tuple[dict[str, str], ...]
    captions: Sequence[str]

    def __len__(self) -> int: ...

    def images_at(self, indices: np.ndarray) -> np.ndarray:
        """New uint8 arrays `[n, H, W, C]`, which the loader's threads ask for."""
        ...


class ImageSequences(Protocol):
    """Sequences of K images that go on by a rule.

    Attributes:
      image_shape, fingerprint, left_out: see `CaptionedImages`.
      sequence_length: K.
    """

    image_shape: tuple[int, int, int]
    fingerprint: str
    left_out: tuple[dict[str, str], ...]
    sequence_length: int

    def __len__(self) -> int: ...

    def sequences_at(self, indices: np.ndarray) -> np.ndarray:
        """New uint8 arrays `[n, K, H, W, C]`, which the loader's threads ask for."""
        ...
