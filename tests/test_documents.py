"""Documents as sequences: the layout of rows, the mask by its definition, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
import random_documents as made

from cfjax.document_masks import document_mask
from cfjax.documents import (
    NO_PLACE,
    NO_TARGET,
    ClassSegment,
    ImageSegment,
    Slots,
    TextSegment,
    check_has_target,
)
from cfjax.errors import UserError

IMAGE = ImageSegment(np.zeros(made.IMAGE_SHAPE, np.uint8))
END, BEGIN_IMAGE, END_IMAGE = (
    made.VOCABULARY.end_of_text,
    made.VOCABULARY.begin_of_image,
    made.VOCABULARY.end_of_image,
)


def tokens_and_targets(document):
    """(id or what stands there, target) of each place."""
    return [
        (
            item.token
            if item.token is not None
            else ("image" if item.pixels is not None else "class"),
            item.target,
        )
        for item in made.items(document)
    ]


def test_text_then_image():
    assert tokens_and_targets((TextSegment("bc"), IMAGE)) == [
        (END, 1),
        (1, 2),
        (2, BEGIN_IMAGE),
        (BEGIN_IMAGE, NO_TARGET),
        ("image", NO_TARGET),
    ]


def test_image_then_text():
    assert tokens_and_targets((IMAGE, TextSegment("bc"))) == [
        (END, BEGIN_IMAGE),
        (BEGIN_IMAGE, NO_TARGET),
        ("image", NO_TARGET),
        (END_IMAGE, 1),
        (1, 2),
        (2, END),
        (END, NO_TARGET),
    ]


def test_images_one_after_the_other():
    assert [token for token, _ in tokens_and_targets((IMAGE, IMAGE))] == [
        END,
        BEGIN_IMAGE,
        "image",
        END_IMAGE,
        BEGIN_IMAGE,
        "image",
    ]


def test_a_class_announces_its_image():
    assert tokens_and_targets((ClassSegment(3), IMAGE)) == [
        ("class", NO_TARGET),
        ("image", NO_TARGET),
    ]
    items = made.items((ClassSegment(3), IMAGE))
    assert [item.position for item in items] == [0, 0]


def test_a_prompt_is_no_target():
    document = (TextSegment("bc", is_target=False), ImageSegment(IMAGE.pixels, is_target=False))
    assert {target for _, target in tokens_and_targets(document)} == {NO_TARGET}
    assert not made.items(document)[-1].is_target


def test_positions_count_text_tokens_and_images():
    items = made.items((TextSegment("abc"), IMAGE, TextSegment("a")))
    assert [item.position for item in items] == list(range(len(items)))


def test_a_row_of_two_documents():
    row = made.row([(TextSegment("a"), IMAGE), (ClassSegment(2), IMAGE)], Slots(5, 3, True))
    assert row["text_ids"].tolist() == [END, 0, BEGIN_IMAGE, 0, 0]
    assert row["text_places"].tolist() == [0, 1, 2, NO_PLACE, NO_PLACE]
    assert row["image_places"].tolist() == [3, 5, NO_PLACE]
    assert row["image_begins"].tolist() == [0, 4, 0]
    assert row["image_positions"].tolist() == [3, 0, 0]
    assert row["label_places"].tolist() == [NO_PLACE, 4, NO_PLACE]
    assert row["label"].tolist() == [0, 2, 0]
    assert row["image_is_target"].tolist() == [True, True, False]


def brute_force_mask(row, order_of, num_condition, num_clean, copies):
    """Token by token, by the sentences of the issue: everything clean before in document order; a
    noised token its own AR step; nothing a noised token of another step.
    """
    tokens = []  # (document, place, AR step, kind, copy)
    for i, place in enumerate(row["label_places"]):
        tokens += [(row["image_begins"][i], place, 0, "clean", 0)] * num_condition
    for i, place in enumerate(row["text_places"]):
        tokens.append((row["text_begins"][i], place, 0, "clean", 0))
    for kind, count, parts in (("clean", num_clean, 1), ("noised", made.NUM_TOKENS, copies)):
        for i, place in enumerate(row["image_places"]):
            for copy in range(parts):
                tokens += [
                    (row["image_begins"][i], place, order_of[i][n], kind, copy)
                    for n in range(count)
                ]

    def sees(query, key):
        (document, place, step, kind, copy), (other, key_place, key_step, key_kind, key_copy) = (
            query,
            key,
        )
        if NO_PLACE in (place, key_place):
            return place == key_place  # empty slots see each other, which nobody reads
        if document != other:
            return False
        if key_kind == "noised":
            return kind == "noised" and (place, step, copy) == (key_place, key_step, key_copy)
        is_before = (key_place, key_step) < (place, step)
        is_same = (key_place, key_step) == (place, step)
        return is_before or (is_same and kind == "clean")

    return np.array([[sees(query, key) for key in tokens] for query in tokens])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("copies", [1, 2])
def test_mask_by_its_definition(seed, copies):
    rng = np.random.default_rng(seed)
    batch = made.batch(rng)
    num_clean = made.NUM_TOKENS - seed % 2
    *_, ar_step_ids = made.images(rng, *batch["image_places"].shape)
    model = made.model()
    terms = model._terms(made.of_batch(batch), ar_step_ids, num_clean, copies)
    every = type(terms[0])(*(jnp.concatenate(parts, axis=1) for parts in zip(*terms, strict=True)))
    mask = np.asarray(document_mask(every, every))
    for i in range(len(mask)):
        row = {name: np.asarray(it[i]) for name, it in batch.items()}
        expected = brute_force_mask(
            row, np.asarray(ar_step_ids[i]), model.condition_length, num_clean, copies
        )
        np.testing.assert_array_equal(mask[i], expected)


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(UserError, match=r"'aaaaaaaaa' has 9 tokens, but text.max_length is 8"):
        made.items((TextSegment("a" * 9),))


def test_a_class_without_an_image_is_refused():
    with pytest.raises(UserError, match="class 3 has no image after it"):
        made.items((ClassSegment(3), TextSegment("a")))


def test_an_image_of_another_size_is_refused():
    document = (ImageSegment(np.zeros((2, 1, 1), np.uint8)),)
    with pytest.raises(UserError, match=r"image of the document is \[2, 1, 1\], but must be \[1"):
        made.row([document], Slots(4, 1))


@pytest.mark.parametrize("slots", [Slots(2, 1), Slots(9, 0)])
def test_more_than_a_row_holds_is_refused(slots):
    with pytest.raises(UserError, match="the documents of a row have more than"):
        made.row([(TextSegment("a"), IMAGE)], slots)


def test_a_document_without_a_target_is_refused():
    check_has_target((TextSegment("a", is_target=False), IMAGE))
    with pytest.raises(UserError, match="has no target"):
        check_has_target((TextSegment("a", is_target=False),))
