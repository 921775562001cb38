"""Progressions and transforms with known shares of right images."""

import numpy as np
import pytest

from cfjax.data.progressions import ProgressionsSource
from cfjax.data.transforms import TRANSFORM_NAMES, TRANSFORMS, TransformsSource
from cfjax.errors import UserError
from cfjax.evaluation.sequence_scores import (
    judged_classes,
    right_answers,
    score_progressions,
    score_transforms,
)

COUNT = 130
PLUS_ONE, COPY, ALTERNATION = [7, 8, 9], [4, 4, 4], [2, 5, 2]


def test_progressions_by_hand():
    judged = [[0, 1, 2], [4, 4, 5], [2, 2, 5]]
    found = score_progressions([PLUS_ONE, COPY, ALTERNATION], judged)
    assert found.num_sequences == 3
    assert found.by_position == pytest.approx((2 / 3, 1, 2 / 3))
    assert found.next_class == pytest.approx(2 / 3)
    assert found.images == pytest.approx(7 / 9)
    assert found.sequences == pytest.approx(1 / 3)
    assert found.by_rule == pytest.approx({"plus one": 1, "copy": 2 / 3, "alternation": 2 / 3})


def test_true_progressions_are_right_from_any_prefix():
    classes = ProgressionsSource("held_out", num_sequences=COUNT).classes_at(np.arange(COUNT))
    for num_given in (3, 4, 9):
        found = score_progressions(classes[:, :num_given], classes[:, num_given:])
        assert found.images == found.sequences == 1
        assert found.by_position == (1.0,) * (10 - num_given)
        wrong = score_progressions(classes[:, :num_given], (classes[:, num_given:] + 1) % 10)
        assert wrong.images == 0


def test_classes_are_judged_image_by_image():
    class Corner:
        """Judges by the pixel in the corner."""

        def features(self, images):
            assert images.shape == (6, 28, 28, 1)
            return None, images[:, 0, 0, 0].astype(np.int32)

    sequences = np.zeros((2, 3, 28, 28, 1), np.uint8)
    sequences[:, :, 0, 0, 0] = [[1, 2, 3], [4, 5, 6]]
    np.testing.assert_array_equal(judged_classes(Corner(), sequences), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("given", "judged", "said"),
    [
        ([[1, 2]], [[3]], r"shape \(1, 2\) and judged ones of \(1, 1\)"),
        ([PLUS_ONE], np.zeros((1, 0)), "can't be scored"),
        ([PLUS_ONE], [[0], [1]], "can't be scored"),
        ([[1, 2, 4]], [[5]], r"\[1, 2, 4\] follow no rule"),
        ([PLUS_ONE, [4, 4, 4, 5][1:]], [[0], [1]], r"\[4, 4, 5\] follow no rule"),
        ([[*COPY, 5]], [[4]], r"\[4, 4, 4, 5\] follow no rule"),
    ],
)
def test_refused_progressions(given, judged, said):
    with pytest.raises(UserError, match=said):
        score_progressions(np.array(given), np.array(judged))


@pytest.fixture(scope="module")
def held_out():
    source = TransformsSource("held_out", num_sequences=COUNT)
    indices = np.arange(COUNT)
    images = source.sequences_at(indices)
    return images[:, -2], images[:, -1], source.transforms_at(indices)


def test_true_answers_are_right(held_out):
    queries, answers, transforms = held_out
    found = score_transforms(queries, answers, transforms)
    assert found.answers == found.nearest == 1
    assert found.by_transform == dict.fromkeys(TRANSFORM_NAMES, 1.0)


def test_noise_and_blur_leave_answers_right(held_out):
    queries, answers, transforms = held_out
    noise = np.random.default_rng(0).normal(0, 20, answers.shape)
    noisy = np.clip(answers + noise, 0, 255).astype(np.uint8)
    assert score_transforms(queries, noisy, transforms).answers == 1
    pairs = answers.reshape(COUNT, 14, 2, 14, 2, 3).mean((2, 4), keepdims=True)
    blurred = np.broadcast_to(pairs, (COUNT, 14, 2, 14, 2, 3)).reshape(answers.shape)
    assert score_transforms(queries, blurred, transforms).answers > 0.97


def test_other_images_are_wrong(held_out):
    queries, answers, transforms = held_out
    for wrong in (queries, np.zeros_like(queries), np.full_like(queries, 255)):
        assert score_transforms(queries, wrong, transforms).answers == 0
    # The right transform of another digit.
    assert score_transforms(queries, np.roll(answers, 13, 0), transforms).answers < 0.1


def test_another_transform_is_wrong(held_out):
    queries, _, transforms = held_out
    other = (transforms + 1) % len(TRANSFORM_NAMES)
    answers = np.stack(
        [
            TRANSFORMS[TRANSFORM_NAMES[name]](query)
            for name, query in zip(other, queries, strict=True)
        ]
    )
    assert score_transforms(queries, answers, transforms).answers == 0
    assert score_transforms(queries, answers, other).answers == 1


def test_shares_by_transform(held_out):
    queries, answers, transforms = held_out
    wrong = TRANSFORM_NAMES.index("inverted")
    answers = np.where((transforms == wrong)[:, None, None, None], 0, answers)
    found = score_transforms(queries, answers, transforms)
    assert found.by_transform == {name: float(name != "inverted") for name in TRANSFORM_NAMES}
    assert found.answers == pytest.approx((transforms != wrong).mean())


def test_a_flat_image_may_be_nearest_but_is_not_right():
    query = np.zeros((1, 28, 28, 3), np.uint8)
    query[:, 8:20, 10:16] = 255
    red = np.array([TRANSFORM_NAMES.index("recoloured red")])
    right, nearest = right_answers(query, np.zeros_like(query), red)
    assert nearest.all()
    assert not right.any()


def test_transforms_that_give_one_image_are_both_right():
    """A bar in the middle is its own mirror image; but then an answer may be the query as well."""
    query = np.zeros((1, 28, 28, 3), np.uint8)
    query[:, 4:20, 12:16] = 255
    for name in ("flipped left-right", "flipped upside-down", "rotated 180"):
        answer = TRANSFORMS[name](query)
        right, _ = right_answers(query, answer, np.array([TRANSFORM_NAMES.index(name)]))
        assert right.all()
    same = TRANSFORMS["flipped upside-down"](query)
    np.testing.assert_array_equal(same, TRANSFORMS["rotated 180"](query))
    right, _ = right_answers(query, same, np.array([TRANSFORM_NAMES.index("rotated 180")]))
    assert right.all()
    right, _ = right_answers(query, same, np.array([TRANSFORM_NAMES.index("flipped left-right")]))
    assert not right.any()


def test_a_query_is_no_answer_though_it_is_nearly_its_own_mirror_image():
    query = np.zeros((1, 28, 28, 3), np.uint8)
    query[:, 4:20, 12:16] = 255
    query[:, 4, 16] = 255
    flipped = np.array([TRANSFORM_NAMES.index("flipped left-right")])
    assert not right_answers(query, query, flipped)[1].any()
    assert right_answers(query, query[:, :, ::-1], flipped)[0].all()


def test_refused_transforms(held_out):
    queries, answers, transforms = held_out
    with pytest.raises(UserError, match="pass as many of each, of one shape"):
        score_transforms(queries, answers[:5], transforms)
    with pytest.raises(UserError, match="0 transforms can't be scored"):
        score_transforms(queries[:0], answers[:0], transforms[:0])
