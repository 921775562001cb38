"""An evaluation that was killed goes on: blocks of features, the state of a reference, scored rows."""

import numpy as np
import pytest
import tiny_features

from cfjax import evaluation_rows
from cfjax.errors import UserError
from cfjax.evaluation.extractors import Features
from cfjax.evaluation.feature_blocks import FeatureBlocks
from cfjax.evaluation.references import NUM_KEPT, ReferenceBuilder
from cfjax.evaluation.scores import Protocol
from cfjax.evaluation.statistics import FeatureStatistics
from cfjax.evaluation_rows import Row

IMAGES = tiny_features.images(40)
FEATURES = tiny_features.TinyExtractor()(IMAGES)


def part(rows):
    return Features(**{name: array[rows] for name, array in FEATURES.arrays().items()})


def filled(folder, *ends):
    blocks = FeatureBlocks(folder, {"seed": 1})
    for begin, end in zip((0, *ends), ends, strict=False):
        blocks.append(part(slice(begin, end)))
    return blocks


def assert_same(features, expected):
    assert features.arrays().keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(features.arrays()[name], array)


def test_blocks_come_back_in_order(tmp_path):
    filled(tmp_path / "blocks", 10, 11, 25)
    again = FeatureBlocks(tmp_path / "blocks", {"seed": 1})
    assert again.num_done == 25
    assert_same(Features.joined(list(again)), part(slice(0, 25)))
    again.append(part(slice(25, 40)))
    assert_same(Features.joined(list(again)), FEATURES)
    again.remove()
    assert not (tmp_path / "blocks").exists()


def test_what_follows_a_damaged_block_is_made_again(tmp_path):
    filled(tmp_path / "blocks", 10, 20, 30)
    path = tmp_path / "blocks" / "block-000000010.npz"
    path.write_bytes(path.read_bytes()[:200])
    assert FeatureBlocks(tmp_path / "blocks", {"seed": 1}).num_done == 10


def test_another_recipe_begins_anew_and_others_files_stay(tmp_path):
    filled(tmp_path / "blocks", 10)
    assert FeatureBlocks(tmp_path / "blocks", {"seed": 2}).num_done == 0
    assert FeatureBlocks(tmp_path / "blocks", {"seed": 1}).num_done == 0
    (tmp_path / "blocks" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which is not of an evaluation"):
        FeatureBlocks(tmp_path / "blocks", {"seed": 3})
    assert (tmp_path / "blocks" / "thesis.txt").exists()


def test_a_reference_goes_on_and_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("cfjax.evaluation.references._SAVE_EVERY", 15)
    state = tmp_path / "state.npz"
    whole = ReferenceBuilder("real", 40, (8, 8, 1))
    killed = ReferenceBuilder("real", 40, (8, 8, 1), state)
    for rows in (slice(0, 10), slice(10, 20)):
        killed.add(part(rows))
        whole.add(part(rows))
    again = ReferenceBuilder("real", 40, (8, 8, 1), state)
    assert again.num_done == 20
    for builder in (whole, again):
        builder.add(part(slice(20, 40)))
    made, expected = again.finish(), whole.finish()
    assert not state.exists()
    np.testing.assert_array_equal(made.pool.scatter, expected.pool.scatter)
    np.testing.assert_array_equal(made.spatial.scatter, expected.spatial.scatter)
    np.testing.assert_array_equal(made.features, FEATURES.pool)
    np.testing.assert_allclose(
        made.pool.covariance, FeatureStatistics.of(FEATURES.pool).covariance, rtol=1e-9, atol=1e-12
    )


def test_the_state_of_other_images_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("cfjax.evaluation.references._SAVE_EVERY", 5)
    state = tmp_path / "state.npz"
    ReferenceBuilder("real", 40, (8, 8, 1), state).add(part(slice(0, 10)))
    assert ReferenceBuilder("others", 40, (8, 8, 1), state).num_done == 0
    assert ReferenceBuilder("real", 41, (8, 8, 1), state).num_done == 0
    assert ReferenceBuilder("real", 40, (8, 8, 1), state, "another").num_done == 0
    assert ReferenceBuilder("real", 40, (8, 8, 1), state).num_done == 10
    state.write_bytes(state.read_bytes()[:100])
    assert ReferenceBuilder("real", 40, (8, 8, 1), state).num_done == 0


def test_of_many_images_ten_thousand_are_kept():
    count = NUM_KEPT + 500
    pool = np.arange(count, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    builder = ReferenceBuilder("many", count, (8, 8, 1))
    for begin in range(0, count, 3000):
        builder.add(Features(pool[begin : begin + 3000]))
    kept = builder.finish().features
    assert kept.shape == (NUM_KEPT, 2)
    assert (np.diff(kept[:, 0]) > 0).all()  # different ones, in order
    assert kept[0, 0] < 100 < count - 100 < kept[-1, 0]


def row(name, images, read_log):
    def read(first):
        for begin in range(first, len(images), 16):
            read_log.append(begin)
            yield images[begin : begin + 16]

    return Row(name, {"images": name}, None, len(images), read)


def test_rows_that_were_scored_are_not_made_again(tmp_path):
    reference = ReferenceBuilder("real", 40, (8, 8, 1))
    reference.add(FEATURES)
    reference, protocol = reference.finish(), Protocol(metrics=("fid", "sfid", "pr"))
    read = []
    rows = [row(name, tiny_features.images(40, seed), read) for seed, name in enumerate("ab")]

    class Killed(Exception):
        pass

    class Dying(tiny_features.TinyExtractor):
        def __call__(self, images, first_index=0):
            if len(self.calls) == 4:  # within the second row
                raise Killed
            return super().__call__(images, first_index)

    with pytest.raises(Killed):
        evaluation_rows.score_rows(rows, Dying(), reference, protocol, tmp_path)
    assert read == [0, 16, 32, 0, 16]
    extractor = tiny_features.TinyExtractor()
    scores = evaluation_rows.score_rows(rows, extractor, reference, protocol, tmp_path)
    assert extractor.calls == [(16, 16), (32, 8)]
    at_once = evaluation_rows.score_rows(
        rows, tiny_features.TinyExtractor(), reference, protocol, tmp_path / "anew"
    )
    assert scores == at_once
    assert scores[0].values["fid"] == pytest.approx(0, abs=1e-9)  # the reference's own images
    assert scores[1].values["fid"] > 1e-3
    again = tiny_features.TinyExtractor()
    other = Protocol(metrics=("fid",))
    evaluation_rows.score_rows(rows[:1], again, reference, other, tmp_path)
    assert again.calls  # scored otherwise, so that the kept score is of no use


@pytest.mark.parametrize("other", ["images", "extractor"])
def test_features_of_others_are_not_taken(tmp_path, other):
    """A row of the same name and number whose images or extractor are others is made anew."""
    reference = ReferenceBuilder("real", 40, (8, 8, 1))
    reference.add(FEATURES)
    reference = reference.finish()
    asked = row("a", IMAGES, [])

    class Killed(Exception):
        pass

    class Dying(tiny_features.TinyExtractor):
        def __call__(self, images, first_index=0):
            if first_index:
                raise Killed
            return super().__call__(images, first_index)

    with pytest.raises(Killed):
        evaluation_rows.score_rows([asked], Dying(), reference, Protocol(), tmp_path)
    extractor = tiny_features.TinyExtractor()
    if other == "images":
        asked = asked._replace(recipe={"images": "b"})
    else:
        extractor.description = "another"
    evaluation_rows.score_rows([asked], extractor, reference, Protocol(), tmp_path)
    assert extractor.calls[0] == (0, 16)
