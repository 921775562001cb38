"""In-context transforms: pairs of a digit and its transform, then a query to be transformed."""

import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from cfjax.data.embedded import MnistSource
from cfjax.data.embedded_draws import EMBEDDED_SPLITS, below, check_count, indexed_words
from cfjax.data.scenes import coloured
from cfjax.errors import check_choice

DEFAULT_NUM_SEQUENCES = {"train": 20_000, "held_out": 2_000}
SHIFT = 6  # pixels: so far that it shows, and most of the digit stays in sight


def _inverted(images: np.ndarray) -> np.ndarray:
    return 255 - images


def _flipped(images: np.ndarray, axis: int) -> np.ndarray:
    return np.flip(images, axis)


def _rotated(images: np.ndarray, quarters: int) -> np.ndarray:
    return np.rot90(images, quarters, (-3, -2))


def _shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved, with black where nothing was; what leaves the image is lost."""
    height, width = images.shape[-3:-1]
    padded = np.pad(
        images,
        [(0, 0)] * (images.ndim - 3) + [(abs(down), abs(down)), (abs(right), abs(right)), (0, 0)],
    )
    top, left = abs(down) - down, abs(right) - right
    return padded[..., top : top + height, left : left + width, :]


# Each takes RGB images uint8 [..., H, W, 3] and gives as many of the same shape (H = W).
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "inverted": _inverted,
    "flipped left-right": functools.partial(_flipped, axis=-2),
    "flipped upside-down": functools.partial(_flipped, axis=-3),
    "rotated 90": functools.partial(_rotated, quarters=1),  # counter-clockwise
    "rotated 180": functools.partial(_rotated, quarters=2),
    "shifted left": functools.partial(_shifted, down=0, right=-SHIFT),
    "shifted right": functools.partial(_shifted, down=0, right=SHIFT),
    "shifted up": functools.partial(_shifted, down=-SHIFT, right=0),
    "shifted down": functools.partial(_shifted, down=SHIFT, right=0),
    "recoloured red": functools.partial(coloured, colour="red"),
    "recoloured green": functools.partial(coloured, colour="green"),
    "recoloured blue": functools.partial(coloured, colour="blue"),
    "recoloured yellow": functools.partial(coloured, colour="yellow"),
}
TRANSFORM_NAMES = tuple(TRANSFORMS)


def all_transforms(images: np.ndarray) -> np.ndarray:
    """Images uint8 `[n, H, W, 3]` by every transform, `[n, len(TRANSFORMS), H, W, 3]`."""
    return np.stack([transform(images) for transform in TRANSFORMS.values()], axis=1)


class TransformsSource:
    """x1, f(x1), x2, f(x2), ..., query, f(query); see `document_sources.ImageSequences`.

    The digits x are white on black, and f is one transform a sequence. A sequence depends on its
    split, its index and the number of examples alone.

    Attributes:
      image_shape: (28, 28, 3).
      sequence_length: 2 num_examples + 2.
      num_examples: pairs before the query.
      fingerprint: a hash of the digits and of all sequences.
    """

    left_out = ()
    image_shape = (*MnistSource.image_shape[:2], 3)

    def __init__(self, split: str, num_examples: int = 2, num_sequences: int | None = None):
        """Draws all sequences.

        Args:
          split: "train" or "held_out", of the digits; the transforms are the same in both.
          num_examples: pairs before the query, 1 or more.
          num_sequences: how many; as DEFAULT_NUM_SEQUENCES says without.

        Raises:
          UserError: an unknown split, or too small a number.
        """
        check_choice("split", split, EMBEDDED_SPLITS)
        check_count("num_examples", num_examples, 1)
        num_sequences = DEFAULT_NUM_SEQUENCES[split] if num_sequences is None else num_sequences
        check_count("num_sequences", num_sequences, 1)
        self.num_examples = num_examples
        self.sequence_length = 2 * num_examples + 2
        digits = MnistSource(split)
        words = indexed_words("transforms", split, num_sequences, 2 + num_examples)
        self._transforms = below(words[:, 0], len(TRANSFORMS)).astype(np.int32)
        self._rows = below(words[:, 1:], len(digits))
        self._images = digits.examples_at(np.arange(len(digits)))["image"]
        digest = hashlib.sha256(digits.fingerprint.encode() + repr(TRANSFORM_NAMES).encode())
        digest.update(self._transforms.tobytes() + self._rows.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._transforms)

    def sequences_at(self, indices: Sequence[int]) -> np.ndarray:
        """New images uint8 `[n, sequence_length, 28, 28, 3]`."""
        indices = np.asarray(indices)
        sequences = np.empty((len(indices), self.sequence_length, *self.image_shape), np.uint8)
        sequences[:, 0::2] = self._images[self._rows[indices]]
        chosen = self._transforms[indices]
        for transform in np.unique(chosen):
            of_it = chosen == transform
            function = TRANSFORMS[TRANSFORM_NAMES[transform]]
            sequences[of_it, 1::2] = function(sequences[of_it, 0::2])
        return sequences

    def transforms_at(self, indices: Sequence[int]) -> np.ndarray:
        """The transform of each sequence, int32 `[n]`, indices in TRANSFORM_NAMES."""
        return self._transforms[np.asarray(indices)]

    def queries_at(self, indices: Sequence[int]) -> np.ndarray:
        """The images to be transformed, uint8 `[n, 28, 28, 3]`."""
        return self.sequences_at(indices)[:, -2]
