"""Random numbers by address, for the sets that are made of the embedded digits."""

import hashlib

import numpy as np

from cfjax.errors import UserError

EMBEDDED_SPLITS = ("train", "held_out")
_WORDS_PER_COUNT = 4  # Philox gives four words of 64 bits for each value of its counter


def indexed_words(set_name: str, split: str, num_examples: int, width: int) -> np.ndarray:
    """Random words that depend on the set, the split and the example's index alone.

    Philox is counter-based: example i owns the counts from i times a row's, so that a set of more
    examples begins with the examples of a smaller one.

    Args:
      set_name, split: name the stream.
      num_examples: how many examples, from index 0.
      width: words an example.

    Returns:
      uint64 `[num_examples, width]`.
    """
    key = hashlib.sha256(f"{set_name}/{split}".encode()).digest()[:16]
    counts = -(-width // _WORDS_PER_COUNT)
    bits = np.random.Philox(key=int.from_bytes(key, "little"))
    words = bits.random_raw(num_examples * counts * _WORDS_PER_COUNT)
    return words.reshape(num_examples, -1)[:, :width]


def below(words: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Words uint64 to int64 from 0 to `bound` - 1; uneven by less than `bound` / 2**64."""
    return (words % np.asarray(bound, np.uint64)).astype(np.int64)


def rows_by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Where each digit 0 ... 9 is among `labels [N]`."""
    return [np.flatnonzero(labels == digit) for digit in range(10)]


def check_count(what: str, value: int, least: int) -> None:
    """Refuses fewer than `least`.

    Raises:
      UserError: `value` is too small.
    """
    if value < least:
        raise UserError(f"{what} is {value}; set it to {least} or more.")
