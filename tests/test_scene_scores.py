"""Shares of right attributes, counted by hand."""

import dataclasses

import pytest

from cfjax.data.scene_captions import Scene, SceneDigit, parse_caption
from cfjax.data.scenes import HELD_OUT_PAIRS, ScenesSource
from cfjax.errors import UserError
from cfjax.evaluation.scene_scores import score_captions, score_images

RED_3, BLUE_7 = SceneDigit(3, "red", 0, 0), SceneDigit(7, "blue", 0, 1)
TWO = "a red three left of a blue seven"
THREE = "a red three left of a blue seven above a green one"
ONE = "a red three in the top left"
ALL_RIGHT = dict.fromkeys(
    ("parsed", "digits", "colours", "pairs", "relations", "number", "scenes"), 1.0
)


def scene(*digits, grid_size=2):
    return Scene(grid_size, digits)


def changed(one, **changes):
    return dataclasses.replace(one, **changes)


def shares(scores, *names):
    return tuple(getattr(scores, name) for name in names)


def of_image(caption, *digits):
    return score_images([parse_caption(caption)], [scene(*digits)])


NAMES = ("digits", "colours", "pairs", "relations", "number", "scenes")


@pytest.mark.parametrize(
    ("digits", "expected"),
    [
        ((RED_3, BLUE_7), (1, 1, 1, 1, 1, 1)),
        ((BLUE_7, RED_3), (1, 1, 1, 1, 1, 1)),  # the order of a reading says nothing
        # The one right of the other.
        ((changed(RED_3, column=1), changed(BLUE_7, column=0)), (1, 1, 1, 0, 1, 0)),
        # On the diagonal.
        ((RED_3, changed(BLUE_7, row=1)), (1, 1, 1, 0, 1, 0)),
        # Colours exchanged: of two assignments with no pair right, each has two attributes right.
        ((changed(RED_3, colour="blue"), changed(BLUE_7, colour="red")), (1, 0, 0, 0, 1, 0)),
        ((changed(RED_3, digit=5), BLUE_7), (0.5, 1, 0.5, 0, 1, 0)),
        ((RED_3,), (0.5, 0.5, 0.5, 0, 0, 0)),
        ((), (0, 0, 0, 0, 0, 0)),
        # One too many.
        ((RED_3, BLUE_7, SceneDigit(0, "white", 1, 1)), (1, 1, 1, 1, 0, 0)),
        # Of two red threes the one that is left of the seven counts.
        ((SceneDigit(3, "red", 1, 1), BLUE_7, RED_3), (1, 1, 1, 1, 0, 0)),
    ],
)
def test_an_image_of_two_digits(digits, expected):
    found = of_image(TWO, *digits)
    assert shares(found, *NAMES) == expected
    assert found.parsed == 1
    assert found.places is None


def test_a_chain_of_three():
    green_1 = SceneDigit(1, "green", 1, 1)
    assert of_image(THREE, RED_3, BLUE_7, green_1).scenes == 1
    found = of_image(THREE, RED_3, BLUE_7, changed(green_1, column=0))
    assert shares(found, *NAMES) == (1, 1, 1, 0.5, 1, 0)
    # A wrong seven takes both relations with it.
    found = of_image(THREE, RED_3, changed(BLUE_7, digit=1), green_1)
    assert shares(found, *NAMES) == (2 / 3, 1, 2 / 3, 0, 1, 0)


def test_a_place():
    found = of_image(ONE, RED_3)
    assert (found.places, found.relations, found.scenes) == (1, None, 1)
    assert of_image(ONE, changed(RED_3, row=1)).places == 0
    assert of_image(ONE, changed(RED_3, row=1)).scenes == 0
    assert of_image(ONE, changed(RED_3, colour="blue")).places == 0
    # Of two red threes the one at the place counts.
    assert of_image(ONE, changed(RED_3, row=1), RED_3).places == 1
    assert of_image("a red three in the centre", RED_3).places == 0  # not of this grid


def test_the_best_assignment_counts():
    # Read first: a digit that would do for the three's colour alone. The right pair goes before it.
    asked = "a red three left of a blue three"
    found = of_image(asked, SceneDigit(5, "red", 0, 0), SceneDigit(3, "red", 0, 1))
    assert shares(found, *NAMES) == (0.5, 0.5, 0.5, 0, 1, 0)
    # No pair is right; the digits are, though not in this order.
    found = of_image(TWO, SceneDigit(7, "white", 0, 0), SceneDigit(3, "white", 0, 1))
    assert shares(found, *NAMES) == (1, 0, 0, 0, 1, 0)


def test_shares_are_over_all_scenes_together():
    captions = [ONE, THREE, TWO]
    readings = [scene(RED_3), scene(), scene(RED_3, BLUE_7)]
    found = score_images([parse_caption(caption) for caption in captions], readings)
    assert found.num_scenes == 3
    assert shares(found, *NAMES) == (3 / 6, 3 / 6, 3 / 6, 1 / 3, 2 / 3, 2 / 3)


def test_held_out_pairs_are_counted_apart():
    assert (0, "green") in HELD_OUT_PAIRS
    assert not {(3, "red"), (7, "blue")} & HELD_OUT_PAIRS
    caption = "a red three left of a green zero"
    green_0 = SceneDigit(0, "green", 0, 1)
    assert of_image(caption, RED_3, green_0).held_out_pairs == 1
    assert of_image(caption, RED_3, changed(green_0, colour="red")).held_out_pairs == 0
    assert of_image(TWO, RED_3, BLUE_7).held_out_pairs is None


def of_caption(text, *digits):
    return score_captions([text], [scene(*digits)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TWO, (1, 1, 1, 1, 1, 1)),
        ("the blue seven is on the right of the red three", (1, 1, 1, 1, 1, 1)),
        ("a red three right of a blue seven", (1, 1, 1, 0, 1, 0)),
        ("a red three left of a red seven", (1, 0.5, 0.5, 0, 1, 0)),
        # One too few: the other and the relation are missing, and a place was not to be said.
        (ONE, (0.5, 0.5, 0.5, 0, 0, 0)),
        # One too many: two of three, and one relation of two.
        (THREE, (2 / 3, 2 / 3, 2 / 3, 0.5, 0, 0)),
        ("a red three and a blue seven", (0, 0, 0, 0, 0, 0)),
        ("", (0, 0, 0, 0, 0, 0)),
    ],
)
def test_a_caption_of_two_digits(text, expected):
    found = of_caption(text, RED_3, BLUE_7)
    assert shares(found, *NAMES) == pytest.approx(expected)
    assert found.parsed == (parse_caption(text) is not None)


def test_unread_captions_count_as_all_wrong():
    found = score_captions([ONE, "gibberish"], [scene(RED_3), scene(RED_3)])
    assert shares(found, "parsed", "places", *NAMES) == (0.5, 0.5, 0.5, 0.5, 0.5, None, 0.5, 0.5)
    green_0 = SceneDigit(0, "green", 0, 0)
    assert of_caption("gibberish", green_0).held_out_pairs == 0


@pytest.mark.parametrize("grid_size", [2, 3])
def test_true_captions_are_right_both_ways(grid_size):
    source = ScenesSource("held_out", 24, grid_size, num_scenes=150)
    scenes = [source.scene_at(index) for index in range(150)]
    for found in (
        score_images([parse_caption(caption) for caption in source.captions], scenes),
        score_captions(source.captions, scenes),
    ):
        assert found.num_scenes == 150
        assert dataclasses.asdict(found).items() >= ALL_RIGHT.items()
        assert found.places == found.held_out_pairs == 1


def test_captions_of_other_scenes_are_mostly_wrong():
    source = ScenesSource("train", 24, num_scenes=300)
    scenes = [source.scene_at(index) for index in range(300)]
    found = score_captions([*source.captions[1:], source.captions[0]], scenes)
    assert found.number < 0.5
    assert found.pairs < 0.1
    assert found.scenes < 0.02


def test_a_crowded_reading_is_scored_soon():
    crowd = [SceneDigit(1, "red", row, column) for row in range(3) for column in range(3)]
    found = score_images([parse_caption(THREE)] * 20, [scene(*crowd, grid_size=3)] * 20)
    assert shares(found, "digits", "colours", "pairs", "number") == (1 / 3, 1 / 3, 0, 0)


def test_unequal_numbers_are_refused():
    with pytest.raises(UserError, match="1 readings can't be scored with 0 descriptions"):
        score_images([], [scene()])
    with pytest.raises(UserError, match="1 captions can't be scored with 0 scenes"):
        score_captions([TWO], [])


def test_nothing_has_no_shares():
    assert score_images([], []).num_scenes == 0
    assert score_images([], []).scenes is None
