"""The judge reads real scenes as they are, and what it can't read it does not see."""

import dataclasses

import numpy as np
import pytest

from cfjax.data.scene_captions import COLOURS, Scene
from cfjax.data.scenes import ScenesSource
from cfjax.errors import UserError
from cfjax.evaluation.classifier import ClassifierTraining, TrainedClassifier, load_or_train
from cfjax.evaluation.scene_judge import (
    CellDigits,
    SceneJudge,
    judge_accuracy,
    least_energy,
    load_scene_judge,
)

COUNT = 100
SIZES = [(28, 2), (48, 3)]


class Memory:
    """A classifier that knows the digits by heart, and takes any other image for a zero."""

    def __init__(self, *parts):
        self.known = {}
        for part in parts:
            examples = part.examples_at(np.arange(len(part)))
            for image, label in zip(examples["image"], examples["label"], strict=True):
                self.known[image.tobytes()] = label

    def features(self, images):
        return None, np.array([self.known.get(image.tobytes(), 0) for image in images], np.int32)


@pytest.fixture(scope="module")
def judges():
    def judge(size, grid_size):
        train, held_out = (CellDigits(split, size // grid_size) for split in ("train", "held_out"))
        return SceneJudge(Memory(train, held_out), size, grid_size, least_energy(train))

    return {sizes: judge(*sizes) for sizes in SIZES}


def in_order(scene):
    return Scene(
        scene.grid_size, tuple(sorted(scene.digits, key=lambda digit: (digit.row, digit.column)))
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_real_scenes_are_read_as_they_are(judges, sizes, split):
    source = ScenesSource(split, *sizes, num_scenes=COUNT)
    read = judges[sizes].read(source.images_at(range(COUNT)))
    assert read == [in_order(source.scene_at(index)) for index in range(COUNT)]
    accuracy = judge_accuracy(judges[sizes], source)
    assert dataclasses.astuple(accuracy) == (COUNT, 1, 1, 1, 1)


def test_every_training_digit_is_seen(judges):
    """The faintest digit has twice the energy of the threshold."""
    cells = CellDigits("train", 14).cells
    images = np.zeros((len(cells), 28, 28, 3), np.uint8)
    images[:, 14:, :14] = cells[..., None]
    for image, reading in zip(images, judges[28, 2].read(images), strict=True):
        assert [(digit.row, digit.column) for digit in reading.digits] == [(1, 0)], image


def test_noise_is_no_digit_and_hides_no_colour(judges):
    source = ScenesSource("train", 28, num_scenes=COUNT)
    images = source.images_at(range(COUNT))
    noise = np.abs(np.random.default_rng(0).normal(0, 12, images.shape))
    assert not any(scene.digits for scene in judges[28, 2].read(noise.astype(np.uint8)))
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    for index, reading in enumerate(judges[28, 2].read(noisy)):
        expected = in_order(source.scene_at(index)).digits
        assert [(digit.row, digit.column, digit.colour) for digit in reading.digits] == [
            (digit.row, digit.column, digit.colour) for digit in expected
        ]


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_colours_in_any_strength(judges, strength):
    cell = CellDigits("train", 14).cells[0][..., None]
    for colour, rgb in COLOURS.items():
        image = np.zeros((1, 28, 28, 3), np.uint8)
        image[0, :14, 14:] = cell / 255 * np.array(rgb) * strength
        (digit,) = judges[28, 2].read(image)[0].digits
        assert (digit.colour, digit.row, digit.column) == (colour, 0, 1)


def test_accuracy_counts_what_is_wrong():
    """A judge that calls everything a three, and one that sees nothing."""
    source = ScenesSource("train", 28, num_scenes=COUNT)
    digits = [digit for index in range(COUNT) for digit in source.scene_at(index).digits]
    threes = np.mean([digit.digit == 3 for digit in digits])

    class Three:
        def features(self, images):
            return None, np.full(len(images), 3, np.int32)

    accuracy = judge_accuracy(SceneJudge(Three(), 28, 2, 0.005), source)
    assert (accuracy.cells, accuracy.colours) == (1, 1)
    assert accuracy.digits == pytest.approx(threes)
    assert accuracy.scenes < 0.1
    blind = judge_accuracy(SceneJudge(Three(), 28, 2, 2.0), source)
    assert blind.cells == pytest.approx(1 - len(digits) / (4 * COUNT))
    assert (blind.digits, blind.colours, blind.scenes) == (0, 0, 0)


def test_nothing_is_read_from_no_images(judges):
    assert judges[28, 2].read(np.zeros((0, 28, 28, 3), np.uint8)) == []
    assert judges[28, 2].read(np.zeros((1, 28, 28, 3), np.uint8)) == [Scene(2, ())]


def test_refusals(judges, tmp_path):
    with pytest.raises(UserError, match="reads scenes of 28x28x3, not of 32x32x3"):
        judges[28, 2].read(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="32 pixels don't divide into 3x3 cells"):
        load_scene_judge(tmp_path, 32, 3)


class Some:
    """Every fourth of a source's digits."""

    def __init__(self, source):
        self.source = source
        self.class_names, self.image_shape = source.class_names, source.image_shape

    def __len__(self):
        return len(self.source) // 4

    def examples_at(self, indices):
        return self.source.examples_at(4 * np.asarray(indices))


def test_a_quickly_trained_classifier_reads_digits(tmp_path):
    train, held_out = (CellDigits(split, 14) for split in ("train", "held_out"))
    training = ClassifierTraining(epochs=5, batch_size=50, max_shift=1)
    classifier = load_or_train(tmp_path, Some(train), Some(held_out), training)
    assert isinstance(classifier, TrainedClassifier)
    judge = SceneJudge(classifier, 28, 2, least_energy(train))
    accuracy = judge_accuracy(judge, ScenesSource("held_out", 28, num_scenes=300))
    assert accuracy.digits > 0.85
    assert accuracy.cells == accuracy.colours == 1


@pytest.mark.long
@pytest.mark.parametrize("size", [28, 32])
def test_the_judge_is_nearly_always_right(tmp_path, size):
    judge = load_scene_judge(tmp_path, size)
    assert load_scene_judge(tmp_path, size).classifier.checksum == judge.classifier.checksum
    accuracy = judge_accuracy(judge, ScenesSource("held_out_seen", size))
    assert accuracy.digits > 0.97
    assert accuracy.cells == accuracy.colours == 1
    assert accuracy.scenes > 0.94
