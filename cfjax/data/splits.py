"""Which examples of a set are held out, where nobody has said it."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

HELD_OUT_SHARE = 0.1


def held_out(
    names: Sequence[str], labels: Sequence[int], share: float = HELD_OUT_SHARE
) -> np.ndarray:
    """Which examples are held out, bool `[N]`: those whose hash lies in the lowest `share`.

    The hash of a name alone decides, not its rank, so that adding examples moves no other. The
    exceptions are for small sets: each class keeps the example of its largest hash for training,
    and if none is held out, the one of the smallest hash in a class that has others is.

    Args:
      names: of the examples, such as paths within their folder.
      labels: their classes.
      share: of the examples that is held out; 0 for none.
    """
    if not share:
        return np.zeros(len(names), bool)
    hashes = np.array([_hash(name) for name in names])
    labels = np.array(labels)
    is_held_out = hashes < share
    by_class = np.lexsort((hashes, labels))
    last_of_class = np.append(np.flatnonzero(np.diff(labels[by_class])), len(labels) - 1)
    is_held_out[by_class[last_of_class]] = False
    has_others = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if not is_held_out.any() and len(has_others):
        is_held_out[has_others[np.argmin(hashes[has_others])]] = True
    return is_held_out


def _hash(name: str) -> float:
    """Uniform in 0...1. A CRC would not do: it is far from uniform over numbered names."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
