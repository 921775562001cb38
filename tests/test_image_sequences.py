"""Progressions and in-context transforms: their rules, their bytes, and what is refused."""

import hashlib
import itertools

import numpy as np
import pytest

from cfjax.data.embedded import MnistSource
from cfjax.data.embedded_draws import indexed_words
from cfjax.data.progressions import (
    RULES,
    ProgressionsSource,
    continue_classes,
    follow,
    rule_of,
)
from cfjax.data.transforms import TRANSFORM_NAMES, TRANSFORMS, TransformsSource, all_transforms
from cfjax.errors import UserError

COUNT = 400
INDICES = np.arange(COUNT)
SOURCES = {"progressions": ProgressionsSource, "transforms": TransformsSource}
NAMES = [rule.name for rule in RULES]


@pytest.fixture(scope="module")
def progressions():
    return ProgressionsSource("held_out", num_sequences=COUNT)


@pytest.fixture(scope="module")
def transforms():
    return TransformsSource("held_out", num_sequences=COUNT)


@pytest.mark.parametrize(
    ("name", "split", "pinned"),
    [
        ("progressions", "train", "03aad18317fb7cea"),
        ("progressions", "held_out", "18aa2195c7a7c2ec"),
        ("transforms", "train", "68831ef5c3c9478d"),
        ("transforms", "held_out", "939de9f546e35ec4"),
    ],
)
def test_bytes_never_change(name, split, pinned):
    source, fresh = (SOURCES[name](split, num_sequences=COUNT) for _ in range(2))
    images = source.sequences_at(INDICES)
    assert images.dtype == np.uint8
    assert images.shape == (COUNT, source.sequence_length, *source.image_shape)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == pinned
    some = np.array([5, 0, 5, COUNT - 1])
    np.testing.assert_array_equal(fresh.sequences_at(some), images[some])
    fewer = SOURCES[name](split, num_sequences=10)
    np.testing.assert_array_equal(fewer.sequences_at(INDICES[:10]), images[:10])
    images[:] = 1  # they are the caller's
    np.testing.assert_array_equal(
        fewer.sequences_at(INDICES[:10]), fresh.sequences_at(INDICES[:10])
    )
    assert source.fingerprint == fresh.fingerprint != fewer.fingerprint


@pytest.mark.parametrize("name", SOURCES)
def test_default_lengths(name):
    assert len(SOURCES[name]("train")) == 20_000
    assert len(SOURCES[name]("held_out")) == 2_000
    assert SOURCES[name]("train").fingerprint != SOURCES[name]("held_out").fingerprint


def test_words_are_of_their_index_and_their_stream():
    words = indexed_words("a", "train", 5, 6)
    np.testing.assert_array_equal(indexed_words("a", "train", 3, 6), words[:3])
    assert words.shape == (5, 6)
    assert len(np.unique(words)) == words.size
    assert not np.isin(indexed_words("a", "held_out", 5, 6), words).any()
    assert not np.isin(indexed_words("b", "train", 5, 6), words).any()


def all_progressions(length):
    """(rule, classes) of every progression there is, by a definition of its own."""
    for start in range(10):
        for name, step in (("plus one", 1), ("plus two", 2), ("minus one", 9), ("copy", 0)):
            classes = [start]
            while len(classes) < length:
                classes.append((classes[-1] + step) % 10)
            yield name, classes
        for other in set(range(10)) - {start}:
            yield "alternation", [(start, other)[i % 2] for i in range(length)]


def test_three_classes_tell_the_rule():
    told = {}
    for name, classes in all_progressions(3):
        assert told.setdefault(tuple(classes), name) == name, f"{classes} are of two rules"
    assert len(told) == 130
    every = np.array(list(itertools.product(range(10), repeat=3)))
    for classes, rule in zip(every, rule_of(every), strict=True):
        assert (NAMES[rule] if rule >= 0 else None) == told.get(tuple(classes))


def test_continued_by_their_rule():
    for name, classes in all_progressions(12):
        np.testing.assert_array_equal(continue_classes(classes[:3], 12), classes)
        np.testing.assert_array_equal(
            follow(NAMES.index(name), classes[0], classes[1], 12), classes
        )
    np.testing.assert_array_equal(continue_classes([1, 2, 4], 5), [-1] * 5)


def test_progressions_follow_their_rules(progressions):
    classes, rules = progressions.classes_at(INDICES), progressions.rules_at(INDICES)
    assert classes.dtype == rules.dtype == np.int32
    assert classes.shape == (COUNT, 10)
    known = {(name, *classes) for name, classes in all_progressions(10)}
    known = {(name, *map(int, rest)) for name, *rest in known}
    for rule, row in zip(rules, classes, strict=True):
        assert (NAMES[rule], *row.tolist()) in known
    np.testing.assert_array_equal(rule_of(classes), rules)
    assert (np.bincount(rules, minlength=5) > COUNT / 5 - 48).all()  # six standard deviations
    assert set(classes[:, 0]) == set(range(10))


def test_images_of_progressions_are_of_their_classes_and_split(progressions):
    examples = MnistSource("held_out").examples_at(np.arange(1000))
    known = {i.tobytes(): label for i, label in zip(*examples.values(), strict=True)}
    images, classes = progressions.sequences_at(INDICES), progressions.classes_at(INDICES)
    found = [[known[image.tobytes()] for image in sequence] for sequence in images]
    np.testing.assert_array_equal(found, classes)
    copies = images[progressions.rules_at(INDICES) == NAMES.index("copy")]
    for sequence in copies:
        assert len({image.tobytes() for image in sequence}) > 5


def test_each_transform_by_its_definition():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 1), np.uint8).repeat(3, -1)
    done = {name: transform(image) for name, transform in TRANSFORMS.items()}
    for row, column in ((3, 5), (20, 14), (27, 0), (0, 27)):
        value = int(image[row, column, 0])
        expected = {
            "inverted": (row, column, [255 - value] * 3),
            "flipped left-right": (row, 27 - column, [value] * 3),
            "flipped upside-down": (27 - row, column, [value] * 3),
            "rotated 90": (27 - column, row, [value] * 3),
            "rotated 180": (27 - row, 27 - column, [value] * 3),
            "shifted left": (row, column - 6, [value] * 3),
            "shifted right": (row, column + 6, [value] * 3),
            "shifted up": (row - 6, column, [value] * 3),
            "shifted down": (row + 6, column, [value] * 3),
            "recoloured red": (row, column, [value, 0, 0]),
            "recoloured green": (row, column, [0, value, 0]),
            "recoloured blue": (row, column, [0, 0, value]),
            "recoloured yellow": (row, column, [value, value, 0]),
        }
        assert expected.keys() == TRANSFORMS.keys()
        for name, (to_row, to_column, pixel) in expected.items():
            if 0 <= to_row < 28 and 0 <= to_column < 28:
                assert done[name][to_row, to_column].tolist() == pixel, name
    assert not done["shifted left"][:, -6:].any()
    assert not done["shifted down"][:6].any()
    assert all(result.dtype == np.uint8 for result in done.values())


def test_sequences_are_pairs_of_one_transform(transforms):
    assert transforms.sequence_length == 6
    assert transforms.image_shape == (28, 28, 3)
    images, chosen = transforms.sequences_at(INDICES), transforms.transforms_at(INDICES)
    assert chosen.dtype == np.int32
    assert set(chosen) == set(range(len(TRANSFORM_NAMES)))
    np.testing.assert_array_equal(transforms.queries_at(INDICES), images[:, -2])
    rows = np.arange(COUNT)
    for position in (0, 2, 4):
        answers = all_transforms(images[:, position])
        assert answers.shape == (COUNT, len(TRANSFORM_NAMES), 28, 28, 3)
        np.testing.assert_array_equal(images[:, position + 1], answers[rows, chosen])


def test_digits_of_transforms_are_of_their_split(transforms):
    known = {
        image.tobytes() for image in MnistSource("held_out").examples_at(np.arange(1000))["image"]
    }
    digits = transforms.sequences_at(INDICES)[:, 0::2].reshape(-1, 28, 28, 3)
    assert (digits == digits[..., :1]).all()
    assert {digit[..., :1].tobytes() for digit in digits} <= known


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ProgressionsSource("test"), "unknown split 'test'"),
        (lambda: ProgressionsSource("train", 3), "sequence_length is 3; set it to 4 or more"),
        (lambda: ProgressionsSource("train", 5, 0), "num_sequences is 0; set it to 1 or more"),
        (lambda: TransformsSource("test"), "unknown split 'test'"),
        (lambda: TransformsSource("train", 0), "num_examples is 0; set it to 1 or more"),
        (lambda: TransformsSource("train", 1, -1), "num_sequences is -1; set it to 1 or more"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(UserError, match=said):
        make()
