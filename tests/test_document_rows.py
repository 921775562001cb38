"""Rows of documents: what is in them, by seed and position alone, and how full they are."""

import concurrent.futures

import numpy as np
import pytest
import tiny

from cfjax import build, build_documents
from cfjax.config_loading import load_config
from cfjax.data.document_rows import PackedDocuments
from cfjax.data.loader import TrainLoader
from cfjax.data.tokenizers import ByteTokenizer
from cfjax.documents import NO_PLACE, NO_TARGET, ImageSegment, Slots, Vocabulary
from cfjax.errors import UserError

OURS = Vocabulary(256)
SLOTS = Slots(40, 2)
SETS = ("scenes", "progressions", "transforms")


def count_padding(batch, tokens_per_image):
    """Share of the tokens of rows that are empty, as they were laid out."""
    num_text = (batch["text_places"] == NO_PLACE).sum()
    num_images = (batch["image_places"] == NO_PLACE).sum()
    total = batch["text_places"].size + tokens_per_image * batch["image_places"].size
    return float((num_text + tokens_per_image * num_images) / total)


class Captioned:
    """Captions of 3 to 12 bytes; the pixels of an image are its index."""

    image_shape = (2, 2, 1)
    fingerprint = "captioned"
    left_out = ()

    def __init__(self, count=200):
        self.captions = [f"{index:03x}" * (1 + index % 4) for index in range(count)]

    def __len__(self):
        return len(self.captions)

    def images_at(self, indices):
        return np.broadcast_to(
            np.asarray(indices, np.uint8)[:, None, None, None], (len(indices), 2, 2, 1)
        ).copy()


class Sequences:
    """Sequences of three images, whose pixels are ten times their index and which image they are."""

    image_shape = (2, 2, 1)
    fingerprint = "sequences"
    left_out = ()
    sequence_length = 3

    def __len__(self):
        return 7

    def sequences_at(self, indices):
        values = 10 * np.asarray(indices, np.uint8)[:, None] + np.arange(3, dtype=np.uint8)
        return np.broadcast_to(values[..., None, None, None], (len(indices), 3, 2, 2, 1)).copy()


def packed(source=None, slots=SLOTS, **changes):
    arguments = {"max_text_length": 12, "seed": 5} | changes
    return PackedDocuments(source or Captioned(), ByteTokenizer(), slots, **arguments)


def documents_in(rows):
    """(caption or None, whether the image is before it, image's value) of each captioned document."""
    found = []
    for row in range(len(rows["text_places"])):
        places, begins = rows["text_places"][row], rows["text_begins"][row]
        for image, place in enumerate(rows["image_places"][row]):
            if place == NO_PLACE:
                continue
            begin = rows["image_begins"][row, image]
            ids = rows["text_ids"][row][(places != NO_PLACE) & (begins == begin)]
            after = rows["text_ids"][row][(places > place) & (begins == begin)]
            text = bytes(ids[ids < 256].astype(np.uint8)).decode()
            is_before = bool((after < 256).any())
            found.append((text or None, is_before, int(rows["image"][row, image].flat[0])))
    return found


def test_captioned_documents():
    """Images with their own captions, before or after them or none at all."""
    source, documents = Captioned(), packed()
    rows = documents.rows_at(range(len(documents)), range(len(documents)))
    found = documents_in(rows)
    assert sorted(image for _, _, image in found) == list(range(len(source)))
    for caption, _, image in found:
        assert caption in (None, source.captions[image])
    assert {(caption is None, is_before) for caption, is_before, _ in found} == {
        (False, False),
        (False, True),
        (True, False),
    }


@pytest.mark.parametrize(("image_to_text", "dropout"), [(0.5, 0.1), (0.2, 0.4)])
def test_shares_are_near_their_fields(image_to_text, dropout):
    """Over 4000 documents: five standard deviations."""
    documents = packed(image_to_text_share=image_to_text, text_dropout=dropout)
    positions = np.arange(20 * len(documents))
    found = documents_in(documents.rows_at(positions % len(documents), positions))
    assert len(found) == 4000
    shares = {
        "image first": (np.mean([is_before for _, is_before, _ in found]), image_to_text),
        "dropped": (np.mean([it is None for it, _, _ in found]), (1 - image_to_text) * dropout),
    }
    for name, (share, expected) in shares.items():
        assert abs(share - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5, name


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((1.0, 1.0), (False, True)), ((0.0, 0.0), (False, False)), ((0.0, 1.0), (True, False))],
)
def test_shares_of_none_and_all(shares, expected):
    documents = packed(image_to_text_share=shares[0], text_dropout=shares[1])
    found = documents_in(documents.rows_at(range(20), range(20)))
    assert {(caption is None, is_before) for caption, is_before, _ in found} == {expected}


def test_sequences():
    """Announced by text tokens alone, each learned but the first of a document."""
    documents = packed(Sequences(), Slots(12, 6))
    assert len(documents) == 4  # of two sequences, the last of one
    rows = documents.rows_at(range(4), range(4))
    begin, end = OURS.begin_of_image, OURS.end_of_image
    ids = [OURS.end_of_text, begin, end, begin, end, begin]
    targets = [begin, NO_TARGET, begin, NO_TARGET, begin, NO_TARGET]
    for row in range(4):
        count = (rows["image_places"][row] != NO_PLACE).sum()
        repeated = count // 3
        assert rows["text_ids"][row].tolist() == ids * repeated + [0] * (12 - 6 * repeated)
        expected = targets * repeated + [NO_TARGET] * (12 - 6 * repeated)
        assert rows["text_targets"][row].tolist() == expected
        values = rows["image"][row, :count, 0, 0, 0].reshape(-1, 3)
        np.testing.assert_array_equal(values - values[:, :1], [[0, 1, 2]] * repeated)
        assert (values[:, 0] % 10 == 0).all()
        assert (rows["image_is_target"][row] == (np.arange(6) < count)).all()


def assert_equal(rows, expected):
    assert rows.keys() == expected.keys()
    for name, array in expected.items():
        assert rows[name].dtype == array.dtype
        np.testing.assert_array_equal(rows[name], array, err_msg=name)


def test_a_row_depends_on_its_index_and_position_alone():
    """The same bytes whatever rows are read with it, and by another instance."""
    documents = packed()
    indices, positions = np.array([7, 3, 11, 3]), np.array([100, 101, 2**40, 103])
    together = documents.rows_at(indices, positions)
    for part in ([0], [2], [3, 1], [1, 2]):
        rows = packed().rows_at(indices[part], positions[part])
        assert_equal(rows, {name: array[part] for name, array in together.items()})


def test_position_and_seed_decide():
    """Another position draws other directions; another seed packs and draws otherwise."""

    def drawn(first, seed):
        documents = packed(slots=Slots(16, 1), seed=seed)  # rows of one document
        found = documents_in(documents.rows_at(range(40), range(first, first + 40)))
        return [(caption is None, is_before) for caption, is_before, _ in found]

    assert drawn(0, 5) == drawn(0, 5)
    assert drawn(0, 5) != drawn(40, 5)
    assert drawn(0, 5) != drawn(0, 6)
    one, other = (packed(seed=seed).rows_at(range(9), range(9)) for seed in (5, 6))
    assert (one["image"] != other["image"]).any()


@pytest.mark.parametrize("num_threads", [0, 3])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_batches_are_the_same_however_they_are_split(num_processes, num_threads):
    """Over processes, in other batches, and when reading begins in the middle."""
    documents = packed()

    def read(rows, batch_size, first, count):
        loader = TrainLoader(
            documents,
            seed=5,
            rows=rows,
            global_batch_size=batch_size,
            examples_seen=first,
            num_threads=num_threads,
        )
        with loader:
            return [next(loader) for _ in range(count)]

    def joined(batches, axis=0):
        return {name: np.concatenate([it[name] for it in batches], axis) for name in batches[0]}

    expected = joined(read(np.arange(8), 8, 0, 6))
    of_process = [
        read(part, 8, 16, 4) for part in np.split(np.arange(8), num_processes)
    ]  # from the third batch on
    rows = joined([joined(parts) for parts in zip(*of_process, strict=True)])
    assert_equal(rows, {name: array[16:] for name, array in expected.items()})
    assert_equal(joined(read(np.arange(4), 4, 0, 12)), expected)
    assert expected["image"].dtype == np.float32 and np.abs(expected["image"]).max() <= 1


def test_many_threads_read_what_one_reads():
    documents = packed()
    tasks = [(np.arange(i, i + 5), np.arange(9 * i, 9 * i + 5)) for i in range(60)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda task: documents.rows_at(*task), tasks))
    for rows, task in zip(found, tasks, strict=True):
        assert_equal(rows, documents.rows_at(*task))


def test_padding_is_counted():
    """By hand: a row of 4 of 10 text slots and 1 of 2 images, of 3 tokens each."""
    rows = {
        "text_places": np.array([[0, 1, 2, 3] + [NO_PLACE] * 6]),
        "image_places": np.array([[4, NO_PLACE]]),
    }
    assert count_padding(rows, 3) == pytest.approx((6 + 3) / (10 + 6))
    full = packed(Sequences(), Slots(6, 3))
    assert full.padding_share(4) == 0
    half = packed(Sequences(), Slots(12, 4))
    assert half.padding_share(4) == pytest.approx(1 - (6 + 3 * 4) / (12 + 4 * 4))
    rows = half.rows_at(range(7), range(7))
    assert count_padding(rows, 4) == pytest.approx(half.padding_share(4))


@pytest.mark.parametrize("name", SETS)
def test_less_than_a_tenth_of_the_embedded_sets_rows_is_padding(name):
    """As packed, and of rows as they are laid out, whose captions may be left out."""
    config = load_config(str(tiny.CONFIGS / f"mnist_{name}.py"))
    documents = build_documents.documents(config, "train")
    tokens_of_image = build.model(config).num_tokens
    tokens_per_image = (1 + config.diffusion.timesteps_per_ar_step) * tokens_of_image
    length = config.text.tokens_per_row + config.text.images_per_row * tokens_per_image
    assert build.sequence_length(config) == length
    assert 0 <= documents.padding_share(tokens_per_image) < 0.1
    indices = np.linspace(0, len(documents) - 1, 150).astype(int)
    rows = documents.rows_at(indices, np.arange(150))
    assert count_padding(rows, tokens_per_image) < 0.1
    # What is reserved for a caption, which may be left out, is an upper limit.
    assert count_padding(rows, tokens_per_image) >= documents.padding_share(tokens_per_image) - 0.02


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_text_length": 11}, "has 12 tokens, but text.max_length is 11"),
        ({"slots": Slots(15, 2)}, "16 text tokens and 1 images, but a row has room for 15 and 2"),
        ({"image_to_text_share": 1.5}, r"data.image_to_text_share is 1.5, but must be in \[0, 1\]"),
        ({"text_dropout": -0.1}, r"loss.text_dropout is -0.1, but must be in \[0, 1\]"),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(UserError, match=said):
        packed(**changes)


def test_rows_as_long_as_the_longest_document_suffice():
    """Of an image before its caption all slots are taken."""
    documents = packed(slots=Slots(16, 1), image_to_text_share=1.0)
    rows = documents.rows_at(range(len(documents)), range(len(documents)))
    assert (rows["text_places"] != NO_PLACE).sum(axis=1).max() == 16


def test_a_document_without_a_target_is_refused(monkeypatch):
    image = ImageSegment(np.zeros((2, 2, 1), np.uint8), is_target=False)
    monkeypatch.setattr(PackedDocuments, "_document", lambda *_: (image,))
    with pytest.raises(UserError, match="has no target"):
        PackedDocuments(Captioned(), ByteTokenizer(), SLOTS, max_text_length=12).rows_at([0], [0])
