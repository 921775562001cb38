"""The captioned scenes: what is in them, what is held out, and what is refused."""

import hashlib
import time

import numpy as np
import pytest

from cfjax.data.embedded import MnistSource
from cfjax.data.scene_captions import (
    COLOURS,
    PLACES,
    cell_of_place,
    parse_caption,
    relation_between,
)
from cfjax.data.scenes import (
    HELD_OUT_PAIRS,
    PAIRS,
    SEEN_PAIRS,
    SPLITS,
    ScenesSource,
    chains,
    coloured,
    resize_digits,
)
from cfjax.errors import UserError

COUNT = 300


@pytest.fixture(scope="module")
def parts():
    return {split: ScenesSource(split, 32, num_scenes=COUNT) for split in SPLITS}


def pairs_of(scene):
    return [(digit.digit, digit.colour) for digit in scene.digits]


def scenes_of(source):
    return [source.scene_at(index) for index in range(len(source))]


def test_bytes_never_change(parts):
    fresh = ScenesSource("train", 32, num_scenes=COUNT)
    indices = np.array([7, 0, 7, COUNT - 1])
    images = parts["train"].images_at(indices)
    np.testing.assert_array_equal(images, fresh.images_at(indices))
    assert images.shape == (4, 32, 32, 3)
    assert images.dtype == np.uint8
    images[:] = 1  # they are the caller's
    np.testing.assert_array_equal(parts["train"].images_at(indices), fresh.images_at(indices))
    digests = {}
    for split, source in parts.items():
        digest = hashlib.sha256("\n".join(source.captions).encode())
        digest.update(source.images_at(np.arange(COUNT)).tobytes())
        digests[split] = digest.hexdigest()[:16]
    assert digests == {
        "train": "70b6d876db2af425",
        "held_out": "7c6f718aeccff147",
        "held_out_seen": "af9c4826b9b2161b",
    }


def test_more_scenes_begin_with_the_same(parts):
    fewer = ScenesSource("train", 32, num_scenes=10)
    assert fewer.captions == parts["train"].captions[:10]
    np.testing.assert_array_equal(fewer.images_at(range(10)), parts["train"].images_at(range(10)))


def test_the_fingerprint_tells_sets_apart(parts):
    others = [
        ScenesSource("train", 32, num_scenes=COUNT - 1),
        ScenesSource("train", 28, num_scenes=COUNT),
        ScenesSource("train", 36, 3, num_scenes=COUNT),
        *parts.values(),
    ]
    assert len({source.fingerprint for source in others}) == len(others)
    again = ScenesSource("train", 32, num_scenes=COUNT)
    assert again.fingerprint == parts["train"].fingerprint


def test_every_digit_and_colour_is_seen_and_some_pairs_are_not():
    assert 10 <= len(HELD_OUT_PAIRS) <= 15
    assert len(SEEN_PAIRS) + len(HELD_OUT_PAIRS) == len(PAIRS) == 70
    assert {digit for digit, _ in SEEN_PAIRS} == set(range(10))
    assert {digit for digit, _ in HELD_OUT_PAIRS} == set(range(10))
    assert {colour for _, colour in HELD_OUT_PAIRS} == set(COLOURS)
    for colour in COLOURS:
        assert sum(pair[1] == colour for pair in SEEN_PAIRS) >= 7


@pytest.mark.parametrize("grid_size", PLACES)
def test_held_out_pairs_are_never_in_train(grid_size):
    scenes = scenes_of(ScenesSource("train", 24, grid_size))
    assert len(scenes) == 20_000
    found = {pair for scene in scenes for pair in pairs_of(scene)}
    assert found == set(SEEN_PAIRS)


def test_held_out_scenes_have_held_out_pairs(parts):
    for scene in scenes_of(parts["held_out"]):
        assert set(pairs_of(scene)) & HELD_OUT_PAIRS
    assert {pair for scene in scenes_of(parts["held_out"]) for pair in pairs_of(scene)} & set(
        SEEN_PAIRS
    )
    for scene in scenes_of(parts["held_out_seen"]):
        assert not set(pairs_of(scene)) & HELD_OUT_PAIRS


@pytest.mark.parametrize("split", SPLITS)
def test_digits_are_of_their_split(parts, split):
    """Each cell is the resized image of a digit of the right class, in its colour."""
    source = parts[split]
    digits = MnistSource("train" if split == "train" else "held_out")
    examples = digits.examples_at(np.arange(len(digits)))
    cells = resize_digits(examples["image"][..., 0], 16)
    known = {cell.tobytes(): label for cell, label in zip(cells, examples["label"], strict=True)}
    for image, scene in zip(source.images_at(range(40)), scenes_of(source), strict=False):
        left = image.copy()
        for digit in scene.digits:
            place = (
                slice(16 * digit.row, 16 * digit.row + 16),
                slice(16 * digit.column, 16 * digit.column + 16),
            )
            grey = image[place].max(-1)
            assert known[grey.tobytes()] == digit.digit
            np.testing.assert_array_equal(image[place], coloured(grey[..., None], digit.colour))
            left[place] = 0
        assert not left.any()


@pytest.mark.parametrize("grid_size", PLACES)
@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true(grid_size, split):
    source = ScenesSource(split, 24, grid_size, num_scenes=COUNT)
    counts = np.zeros(4, int)
    for scene, caption in zip(scenes_of(source), source.captions, strict=True):
        pairs = pairs_of(scene)
        counts[len(pairs)] += 1
        assert len(set(pairs)) == len(pairs)
        assert len({(digit.row, digit.column) for digit in scene.digits}) == len(pairs)
        description = parse_caption(caption)
        assert sorted(description.mentions) == sorted(pairs)
        at = [scene.digits[pairs.index(mention)] for mention in description.mentions]
        for first, relation, second in description.relations:
            assert relation_between(at[first], at[second]) == relation
        for index, place in description.places:
            assert cell_of_place(place, grid_size) == (at[index].row, at[index].column)
    assert (counts[1:] > COUNT / 3 - 50).all()  # six standard deviations


def test_chains():
    assert [len(chains(2, length)) for length in (1, 2, 3)] == [4, 8, 8]
    assert [len(chains(3, length)) for length in (1, 2, 3)] == [9, 36, 108]
    assert ((0, 0), (1, 1)) not in chains(2, 2)


def test_it_is_fast():
    start = time.process_time()
    source = ScenesSource("train", 32)
    constructed = time.process_time()
    source.images_at(np.arange(64))
    assert constructed - start < 5  # 1.5 s on an idle core
    assert time.process_time() - constructed < 0.1  # 1 ms


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("test", 32), "unknown split 'test'; did you mean"),
        (("train", 32, 4), "no grid of 4x4; set it to 2 or 3"),
        (("train", 32, 3), "32 pixels don't divide into 3x3 .* multiple of 3"),
        (("train", 14, 2), "at least 8 pixels; set the size to a multiple of 2 from 16"),
        (("train", 32, 2, 0), "num_scenes is 0; set it to 1 or more"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(UserError, match=said):
        ScenesSource(*arguments)
