"""Reads scenes from their images, by a classifier and a palette that are not the model."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from cfjax.data.embedded import MnistSource
from cfjax.data.scene_captions import COLOURS, Scene, SceneDigit
from cfjax.data.scenes import ScenesSource, resize_digits
from cfjax.errors import UserError
from cfjax.evaluation.classifier import ClassifierTraining, TrainedClassifier, load_or_train

# A cell is small: its digit is moved by no more than a pixel, and seen more often than a whole image.
JUDGE_TRAINING = ClassifierTraining(epochs=25, max_shift=1)
_PALETTE = np.array(list(COLOURS.values()), np.float64)
_DIRECTIONS = _PALETTE / np.linalg.norm(_PALETTE, axis=1, keepdims=True)


class CellDigits:
    """The embedded digits, grey and of the size of a cell; see `cfjax.data.sources.Source`."""

    class_names = MnistSource.class_names
    left_out = ()

    def __init__(self, split: str, cell_size: int):
        """Shrinks all digits of "train" or "held_out" to `cell_size` pixels, as scenes do."""
        digits = MnistSource(split)
        examples = digits.examples_at(np.arange(len(digits)))
        self.image_shape = (cell_size, cell_size, 1)
        self.cells = resize_digits(examples["image"][..., 0], cell_size)
        self.labels = examples["label"]
        self.fingerprint = hashlib.sha256(self.cells.tobytes() + self.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def examples_at(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {"image": self.cells[indices][..., None], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class SceneJudge:
    """Reads which digit of which colour is in which cell.

    Attributes:
      classifier: of digits, from grey cells as `CellDigits` gives them.
      size: height and width of the images, in pixels.
      grid_size: cells along each side.
      least_energy: a cell of less is empty. The energy is the mean of the squared brightness, in
        [0, 1], where a pixel is as bright as its brightest channel; the squares leave the faint
        noise of a generated background without weight.
    """

    classifier: TrainedClassifier
    size: int
    grid_size: int
    least_energy: float

    def read(self, images: np.ndarray) -> list[Scene]:
        """What is seen in images uint8 `[n, size, size, 3]`.

        The digit is the classifier's. The colour is that of COLOURS whose direction in RGB has the
        largest cosine with the sum of the cell's pixels, each weighted by its brightness, so that
        the background weighs little.

        Returns:
          A scene an image, with any number of digits from none to one a cell, row by row.

        Raises:
          UserError: the images are of another shape.
        """
        if images.shape[1:] != (self.size, self.size, 3):
            raise UserError(
                f"the judge reads scenes of {self.size}x{self.size}x3, not of"
                f" {'x'.join(map(str, images.shape[1:]))}; load one of their size."
            )
        cells = _cut(images, self.grid_size)
        brightness = cells.max(-1)
        filled = _energy(brightness) >= self.least_energy
        _, digits = self.classifier.features(brightness[filled][..., None])
        colours = _nearest_colours(cells[filled])
        scenes = [[] for _ in images]
        places = np.argwhere(filled).tolist()
        for (image, row, column), digit, colour in zip(
            places, digits.tolist(), colours, strict=True
        ):
            scenes[image].append(SceneDigit(digit, colour, row, column))
        return [Scene(self.grid_size, tuple(digits)) for digits in scenes]


@dataclasses.dataclass(frozen=True)
class JudgeAccuracy:
    """How right a judge is on real scenes: shares.

    Attributes:
      num_scenes: how many scenes it read.
      cells: cells that are empty or not as it says.
      digits, colours: of the cells that have a digit.
      scenes: read without an error.
    """

    num_scenes: int
    cells: float
    digits: float
    colours: float
    scenes: float


def load_scene_judge(
    folder: str | os.PathLike,
    size: int,
    grid_size: int = 2,
    training: ClassifierTraining = JUDGE_TRAINING,
) -> SceneJudge:
    """The judge of scenes of a size, whose classifier is kept in a folder and trained if missing.

    It knows the training digits alone.

    Args:
      folder: of the classifier; one a size of cells, or they are trained in turns.
      size: of the scenes, in pixels.
      grid_size: cells along each side.
      training: how to train.

    Raises:
      UserError: the size is not a multiple of the grid's.
    """
    if size % grid_size:
        raise UserError(
            f"scenes of {size} pixels don't divide into {grid_size}x{grid_size} cells; set the size"
            f" to a multiple of {grid_size}."
        )
    train, held_out = (CellDigits(split, size // grid_size) for split in ("train", "held_out"))
    classifier = load_or_train(folder, train, held_out, training)
    return SceneJudge(classifier, size, grid_size, least_energy(train))


def least_energy(train: CellDigits) -> float:
    """Below it a cell is empty: half the energy of the faintest training digit of a cell's size."""
    return float(_energy(train.cells).min() / 2)


def judge_accuracy(judge: SceneJudge, source: ScenesSource) -> JudgeAccuracy:
    """The judge on real scenes, which bounds what it can say of generated ones."""
    indices = np.arange(len(source))
    truths = [source.scene_at(index) for index in indices]
    readings = judge.read(source.images_at(indices))
    cells = digits = colours = scenes = total = 0
    for truth, reading in zip(truths, readings, strict=True):
        true_cells, read_cells = (
            {(digit.row, digit.column): digit for digit in scene.digits}
            for scene in (truth, reading)
        )
        cells += source.grid_size**2 - len(true_cells.keys() ^ read_cells.keys())
        both = [(true_cells[place], read_cells.get(place)) for place in true_cells]
        digits += sum(seen is not None and seen.digit == true.digit for true, seen in both)
        colours += sum(seen is not None and seen.colour == true.colour for true, seen in both)
        scenes += true_cells == read_cells
        total += len(both)
    return JudgeAccuracy(
        num_scenes=len(truths),
        cells=cells / (len(truths) * source.grid_size**2),
        digits=digits / total,
        colours=colours / total,
        scenes=scenes / len(truths),
    )


def _cut(images: np.ndarray, grid_size: int) -> np.ndarray:
    """Images `[n, S, S, 3]` to cells `[n, rows, columns, S / grid_size, S / grid_size, 3]`."""
    cell = images.shape[1] // grid_size
    cells = images.reshape(len(images), grid_size, cell, grid_size, cell, 3)
    return cells.transpose(0, 1, 3, 2, 4, 5)


def _energy(brightness: np.ndarray) -> np.ndarray:
    """Mean of the squares of uint8 `[..., H, W]`, of 1 for white; float64 `[...]`."""
    return np.square(brightness / 255).mean((-2, -1))


def _nearest_colours(cells: np.ndarray) -> list[str]:
    """Names of the colours of cells uint8 `[n, H, W, 3]`."""
    weights = cells.max(-1, keepdims=True).astype(np.float64)
    sums = (weights * cells).sum((1, 2))
    names = tuple(COLOURS)
    return [names[index] for index in (sums @ _DIRECTIONS.T).argmax(-1)]
