"""Captioned scenes: one to three coloured digits on a grid, made of the embedded digits."""

import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cfjax.data.embedded import MnistSource
from cfjax.data.embedded_draws import below, check_count, indexed_words, rows_by_class
from cfjax.data.scene_captions import (
    COLOURS,
    PLACES,
    Scene,
    SceneDigit,
    phrasings,
)
from cfjax.errors import UserError, check_choice

SPLITS = ("train", "held_out", "held_out_seen")
DEFAULT_NUM_SCENES = {"train": 20_000, "held_out": 2_000, "held_out_seen": 2_000}
MAX_DIGITS = 3
_COLOUR_NAMES = tuple(COLOURS)
# One colour of every digit, and a second of every third digit: 14 of the 70 pairs. Each colour is
# held out of one to three digits, so that it is known from at least seven others.
HELD_OUT_PAIRS = frozenset(
    [(digit, _COLOUR_NAMES[(3 * digit + 1) % 7]) for digit in range(10)]
    + [(digit, _COLOUR_NAMES[(3 * digit + 4) % 7]) for digit in range(0, 10, 3)]
)
PAIRS = tuple(itertools.product(range(10), _COLOUR_NAMES))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)
# Words of a scene: number of digits, cells, caption, which digit is of a held-out pair; then the
# pairs; then the images.
_NUM, _CELLS, _CAPTION, _NOVEL, _PAIRS, _IMAGES = 0, 1, 2, 3, 4, 4 + MAX_DIGITS


class ScenesSource:
    """Scenes on black, with captions; see `cfjax.data.document_sources.CaptionedImages`.

    "train" has training digits, and (digit, colour) pairs of SEEN_PAIRS alone; "held_out" has
    held-out digits, and at least one pair of HELD_OUT_PAIRS in each scene; "held_out_seen" has
    held-out digits in pairs of SEEN_PAIRS. A scene depends on its split, its index and the grid
    alone. No (digit, colour) pair comes twice in a scene, and each digit shares a row or a column
    with the next one of the caption.

    Attributes:
      captions: one a scene.
      grid_size: cells along each side.
      image_shape: (size, size, 3).
      fingerprint: a hash of the digits and of all scenes and captions.
    """

    left_out = ()

    def __init__(self, split: str, size: int, grid_size: int = 2, num_scenes: int | None = None):
        """Lays out all scenes, and shrinks all digits to the size of a cell.

        Args:
          split: one of SPLITS.
          size: height and width of the images, in pixels.
          grid_size: 2 or 3 cells along each side.
          num_scenes: how many; as DEFAULT_NUM_SCENES says without.

        Raises:
          UserError: an unknown split, or sizes that don't fit each other.
        """
        check_choice("split", split, SPLITS)
        if grid_size not in PLACES:
            raise UserError(f"scenes have no grid of {grid_size}x{grid_size}; set it to 2 or 3.")
        if size < 8 * grid_size or size % grid_size:
            raise UserError(
                f"scenes of {size} pixels don't divide into {grid_size}x{grid_size} whole cells of"
                f" at least 8 pixels; set the size to a multiple of {grid_size} from"
                f" {8 * grid_size}."
            )
        num_scenes = DEFAULT_NUM_SCENES[split] if num_scenes is None else num_scenes
        check_count("num_scenes", num_scenes, 1)
        self.grid_size = grid_size
        self.image_shape = (size, size, 3)
        digits = MnistSource("train" if split == "train" else "held_out")
        words = indexed_words(f"scenes {grid_size}", split, num_scenes, _IMAGES + MAX_DIGITS)
        self._scenes, self.captions = [], []
        for row in words.tolist():
            scene = _draw_scene(row, split, grid_size)
            captions = phrasings(scene)
            self._scenes.append(scene)
            self.captions.append(captions[row[_CAPTION] % len(captions)])
        self._image_rows = _choose_images(self._scenes, words[:, _IMAGES:], digits.labels)
        images = digits.examples_at(np.arange(len(digits)))["image"][..., 0]
        self._cells = resize_digits(images, size // grid_size)[..., None]
        digest = hashlib.sha256(f"{digits.fingerprint} {size} {self._scenes}".encode())
        digest.update("\n".join(self.captions).encode() + self._image_rows.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._scenes)

    def scene_at(self, index: int) -> Scene:
        """What is where in an image."""
        return self._scenes[index]

    def images_at(self, indices: Sequence[int]) -> np.ndarray:
        """New images uint8 `[n, size, size, 3]`."""
        images = np.zeros((len(indices), *self.image_shape), np.uint8)
        cell = self._cells.shape[1]
        for image, index in zip(images, indices, strict=True):
            for digit, row in zip(
                self._scenes[index].digits, self._image_rows[index], strict=False
            ):
                top, left = digit.row * cell, digit.column * cell
                image[top : top + cell, left : left + cell] = coloured(
                    self._cells[row], digit.colour
                )
        return images


def resize_digits(images: np.ndarray, size: int) -> np.ndarray:
    """Grey images uint8 `[N, H, W]` to `[N, size, size]`, antialiased.

    Hamming's filter has no negative lobes, so that black stays black around the strokes.
    """
    resized = [
        Image.fromarray(image).resize((size, size), Image.Resampling.HAMMING) for image in images
    ]
    return np.stack([np.asarray(image) for image in resized])


def coloured(images: np.ndarray, colour: str) -> np.ndarray:
    """Images uint8 `[..., 1 or 3]`, grey or RGB, to RGB `[..., 3]`: white becomes the colour."""
    return (images.astype(np.uint16) * np.array(COLOURS[colour], np.uint16) // 255).astype(np.uint8)


@functools.cache
def chains(grid_size: int, length: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Every way to lay out a chain: distinct cells, each of the row or the column of the next."""
    cells = tuple(itertools.product(range(grid_size), repeat=2))
    return tuple(
        chain
        for chain in itertools.permutations(cells, length)
        if all((a[0] == b[0]) != (a[1] == b[1]) for a, b in itertools.pairwise(chain))
    )


def _draw_scene(words: list[int], split: str, grid_size: int) -> Scene:
    num_digits = 1 + words[_NUM] % MAX_DIGITS
    layouts = chains(grid_size, num_digits)
    cells = layouts[words[_CELLS] % len(layouts)]
    pools = [PAIRS if split == "held_out" else SEEN_PAIRS] * num_digits
    if split == "held_out":
        pools[words[_NOVEL] % num_digits] = tuple(sorted(HELD_OUT_PAIRS))
    pairs = []
    for pool, word in zip(pools, words[_PAIRS:], strict=False):
        free = [pair for pair in pool if pair not in pairs]
        pairs.append(free[word % len(free)])
    return Scene(
        grid_size,
        tuple(SceneDigit(*pair, *cell) for pair, cell in zip(pairs, cells, strict=True)),
    )


def _choose_images(scenes: list[Scene], words: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows of the digits' images, int64 `[num_scenes, 3]`; zeros where a scene has fewer digits."""
    members = np.stack(rows_by_class(labels))  # as many of each class
    rows = np.zeros(words.shape, np.int64)
    choices = below(words, members.shape[1])
    for scene, row, choice in zip(scenes, rows, choices, strict=True):
        for position, digit in enumerate(scene.digits):
            row[position] = members[digit.digit, choice[position]]
    return rows
