"""Packing documents into rows: each once, none over its room, the same for a seed, well filled."""

import itertools

import numpy as np
import pytest

from cfjax.data.packing import pack
from cfjax.documents import Slots
from cfjax.errors import UserError


def lengths(seed, count=300, least=3, most=60):
    return np.random.default_rng(seed).integers(least, most + 1, count)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("images_per_document", "slots"),
    [(1, Slots(60, 1)), (1, Slots(96, 2)), (1, Slots(200, 16)), (3, Slots(130, 10))],
)
def test_every_document_is_in_one_row_that_has_room(seed, images_per_document, slots):
    of_document = lengths(seed)
    rows = pack(of_document, images_per_document, slots, seed)
    assert sorted(itertools.chain(*rows)) == list(range(len(of_document)))
    for row in rows:
        assert of_document[row].sum() <= slots.num_text
        assert 1 <= len(row) <= slots.num_images // images_per_document


def test_a_row_takes_what_is_nearest_to_an_equal_share():
    """The longest, 10, leaves 10 for two more: 5 is an equal share, and then 4 fits best."""
    of_document = np.array([4, 10, 5, 9, 1])
    rows = pack(of_document, 1, Slots(20, 3), 0)
    assert [of_document[row].tolist() for row in rows] == [[10, 5, 4], [9, 1]]


def test_equal_documents_fill_their_rows():
    rows = pack(np.full(100, 6), 3, Slots(12, 6), 0)
    assert [len(row) for row in rows] == [2] * 50


@pytest.mark.parametrize("seed", range(3))
def test_little_room_is_left(seed):
    """Of rows with twice the mean length, and two images: less than a twentieth of the text slots."""
    of_document = lengths(seed, 2000, 20, 60)
    rows = pack(of_document, 1, Slots(80, 2), seed)
    assert 1 - of_document.sum() / (80 * len(rows)) < 0.05
    assert np.mean([len(row) == 2 for row in rows]) > 0.9


def test_the_seed_decides_alone():
    of_document = lengths(0)
    slots = Slots(96, 2)
    assert pack(of_document, 1, slots, 3) == pack(of_document.copy(), 1, slots, 3)
    assert pack(of_document, 1, slots, 3) != pack(of_document, 1, slots, 4)


@pytest.mark.parametrize(
    ("longest", "images_per_document", "slots", "said"),
    [
        (21, 1, Slots(20, 2), "21 text tokens and 1 images, but a row has room for 20 and 2"),
        (20, 3, Slots(20, 2), "20 text tokens and 3 images, but a row has room for 20 and 2"),
    ],
)
def test_a_document_that_no_row_has_room_for_is_refused(longest, images_per_document, slots, said):
    with pytest.raises(UserError, match=said) as refused:
        pack(np.array([3, longest]), images_per_document, slots, 0)
    assert "raise text.tokens_per_row or text.images_per_row" in str(refused.value)


def test_a_document_may_fill_a_row():
    assert pack(np.array([20]), 2, Slots(20, 2), 0) == [[0]]
