"""The grammar of the scenes: what is written is read back, and nothing else is."""

import itertools

import numpy as np
import pytest

from cfjax.data.scene_captions import (
    COLOURS,
    MAX_CAPTION_BYTES,
    PLACES,
    RELATIONS,
    TEMPLATES,
    Description,
    Scene,
    SceneDigit,
    cell_of_place,
    parse_caption,
    phrasings,
    relation_between,
)
from cfjax.data.scenes import chains

EXAMPLE = Scene(
    2, (SceneDigit(3, "red", 0, 0), SceneDigit(7, "blue", 0, 1), SceneDigit(1, "green", 1, 1))
)


def some_scenes(grid_size, num_digits):
    """Every layout, each with a few digits and colours."""
    rng = np.random.default_rng(0)
    for chain in chains(grid_size, num_digits):
        digits = rng.permutation(10)[:num_digits].tolist()
        colours = rng.choice(list(COLOURS), num_digits).tolist()
        yield Scene(grid_size, tuple(map(SceneDigit, digits, colours, *zip(*chain, strict=True))))


def test_the_example_of_the_documentation():
    captions = phrasings(EXAMPLE)
    assert captions[0] == "a red three left of a blue seven above a green one"
    assert parse_caption(captions[0]) == Description(
        ((3, "red"), (7, "blue"), (1, "green")), ((0, "left of", 1), (1, "above", 2))
    )


def test_a_caption_may_begin_with_the_second_digit_or_repeat_one():
    two = parse_caption("a blue seven with a red three to the left of it")
    assert two == Description(((7, "blue"), (3, "red")), ((1, "left of", 0),))
    three = parse_caption("red six over blue two and blue two under cyan six")
    assert three.mentions == ((6, "red"), (2, "blue"), (6, "cyan"))
    assert three.relations == ((0, "above", 1), (1, "below", 2))


def test_places():
    one = parse_caption("a white zero in the bottom centre")
    assert one == Description(((0, "white"),), (), ((0, "bottom centre"),))
    assert cell_of_place("bottom right", 2) == (1, 1)
    assert cell_of_place("bottom right", 3) == (2, 2)
    assert cell_of_place("centre", 2) is None


@pytest.mark.parametrize("grid_size", PLACES)
@pytest.mark.parametrize("num_digits", TEMPLATES)
def test_every_phrasing_is_read_back(grid_size, num_digits):
    for scene in some_scenes(grid_size, num_digits):
        captions = phrasings(scene)
        assert len(captions) == len(set(captions)) >= 5
        for caption in captions:
            assert len(caption.encode("ascii")) <= MAX_CAPTION_BYTES
            assert caption == caption.lower()
            description = parse_caption(caption)
            pairs = [(digit.digit, digit.colour) for digit in scene.digits]
            assert sorted(description.mentions) == sorted(pairs)
            at = [scene.digits[pairs.index(mention)] for mention in description.mentions]
            assert len(description.relations) == num_digits - 1
            for first, relation, second in description.relations:
                assert relation_between(at[first], at[second]) == relation
            assert len(description.places) == (num_digits == 1)
            for index, place in description.places:
                assert cell_of_place(place, grid_size) == (at[index].row, at[index].column)


@pytest.mark.parametrize("num_digits", [2, 3])
def test_all_templates_and_phrases_are_used(num_digits):
    """No template is so long that it never fits."""
    texts = set(itertools.chain.from_iterable(map(phrasings, some_scenes(2, num_digits))))
    for phrase in itertools.chain.from_iterable(RELATIONS.values()):
        assert any(f" {phrase} " in f" {text} " for text in texts), phrase
    marks = {2: ("there is", " is ", "with", "and", ","), 3: ("which is", " and ")}[num_digits]
    for mark in marks:
        assert any(mark in text for text in texts), mark


def test_the_shortest_phrasing_always_fits():
    longest = Scene(
        3, tuple(SceneDigit(digit, "magenta", 0, 2 - i) for i, digit in enumerate((3, 7, 8)))
    )
    assert phrasings(longest)[0] == "magenta three right of magenta seven right of magenta eight"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red three",
        "a red three left of",
        "a red three left of a blue seven ",
        "A red three left of a blue seven",
        "a red three near a blue seven",
        "a red eleven left of a blue seven",
        "a pink three left of a blue seven",
        "three red left of a blue seven",
        "a red three left of a blue seven\n",
        "a red three left of blue seven",
        "a red three in the middle",
        "red six over blue two and blue three under cyan six",
        "a red three left of a blue seven above a green one below a red two",
        "\ufffd\x00",
    ],
)
def test_garbage_is_none(text):
    assert parse_caption(text) is None


def test_the_diagonal_has_no_relation():
    corner, opposite = SceneDigit(1, "red", 0, 0), SceneDigit(2, "red", 1, 1)
    assert relation_between(corner, opposite) is None
    assert relation_between(corner, corner) is None
