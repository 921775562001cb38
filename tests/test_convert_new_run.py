"""A run's weights as the start of another, also at another image size; no torch is needed."""

import json

import flax.traverse_util
import jax
import numpy as np
import pytest
import tiny
from converting import convert
from runs import restored
from test_checkpoint_weights import write as write_run

from cfjax import build, checkpoint_weights, checkpoints
from cfjax.config_loading import config_from_json
from cfjax.convert import position_table
from cfjax.errors import UserError
from cfjax.train import train

# ml_collections loads config files that way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def run(tmp_path):
    params = tiny.random_params(build.model(tiny.config()))
    ema = jax.tree.map(lambda leaf: leaf + np.float32(1), params)
    return write_run(tmp_path / "run", params, ema)


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def remarks(workdir):
    return json.loads((workdir / "conversion.json").read_text())["remarks"]


def test_a_larger_image_interpolates_the_table_and_keeps_the_rest(tmp_path, run):
    larger = convert(run, tmp_path / "larger", *tiny.flags(data__size=56))
    before, _ = restored(run)
    after, examples_seen = restored(larger, data__size=56)
    assert (int(after.train_step), examples_seen) == (0, 0)
    assert not checkpoint_weights.has_optimizer_state(larger)
    assert config_from_json(checkpoints.read_config(larger)).data.size == 56
    for old, new in ((before.params, after.params), (before.ema_params, after.ema_params)):
        old, new = flat(old), flat(new)
        table = position_table.interpolate(np.asarray(old.pop("token_positions")), (4, 4), (8, 8))
        np.testing.assert_array_equal(new.pop("token_positions"), table)
        jax.tree.map(np.testing.assert_array_equal, old, new)
    assert remarks(larger) == [
        "The position table of 4x4 tokens is interpolated bicubically to the 8x8 of the config.",
        "The new run starts at train step 0 with a fresh optimizer state.",
    ]


@pytest.mark.long
def test_frozen_tables_are_computed_anew(tmp_path):
    sincos = {"model__position_embedding": "sincos"}
    train(tiny.config(**sincos, train__num_train_steps=3), tmp_path / "run")
    flags = tiny.flags(**sincos, data__size=56)
    larger = convert(tmp_path / "run", tmp_path / "larger", *flags)
    before, _ = restored(tmp_path / "run", **sincos)
    after, _ = restored(larger, **sincos, data__size=56)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert (
        "4x4 tokens is the frozen sin-cos table, and gives way to that of 8x8" in remarks(larger)[0]
    )


@pytest.mark.slow
def test_a_run_of_the_same_size_starts_with_fresh_moments(tmp_path):
    train(tiny.config(), tmp_path / "run")
    other = convert(tmp_path / "run", tmp_path / "other", *tiny.flags(), "--train_step=3")
    before, _ = restored(tmp_path / "run", 3)
    after, _ = restored(other)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.opt_state))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(before.opt_state))
    assert len(remarks(other)) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__depth": 3}, r"model\.depth: 2 -> 3"),
        ({"model__patch_size": 14}, r"model\.patch_size: 7 -> 14"),
        ({"data__num_classes": 9}, r"data\.num_classes: 10 -> 9"),
        ({"model__condition_repeats": 2}, r"model\.condition_repeats: 1 -> 2"),
        (
            {"model__position_embedding": "sincos"},
            r"model\.position_embedding: 'learned' -> 'sincos'",
        ),
    ],
)
def test_what_differs_otherwise_is_refused(tmp_path, run, overrides, message):
    flags = tiny.flags(**({"data__size": 56} | overrides))
    with pytest.raises(UserError, match=f"differs in more than data.size: {message};"):
        convert(run, tmp_path / "other", *flags)
    assert not (tmp_path / "other").exists()


def test_how_a_model_is_computed_may_differ(tmp_path, run):
    flags = tiny.flags(model__dtype="bfloat16", model__attention="fused", data__size=56)
    assert checkpoints.train_steps(convert(run, tmp_path / "other", *flags)) == [0]


def test_tables_by_hand():
    # The weights of torch.nn.functional.interpolate(mode="bicubic") a quarter past an old value.
    quarter = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]
    three_quarters = quarter[::-1]
    column = np.arange(8, dtype=np.float32)[:, None] ** 2
    got = position_table.interpolate(column, (8, 1), (16, 1))[:, 0]
    # Old values 2 to 5 around new ones 7 and 8; edges are repeated.
    np.testing.assert_allclose(got[7], np.dot(quarter, column[2:6, 0]), rtol=1e-6)
    np.testing.assert_allclose(got[8], np.dot(three_quarters, column[2:6, 0]), rtol=1e-6)
    np.testing.assert_allclose(got[0], np.dot(three_quarters, column[[0, 0, 0, 1], 0]), rtol=1e-6)
    ones = np.ones((12, 3), np.float32)
    np.testing.assert_allclose(position_table.interpolate(ones, (3, 4), (5, 2)), 1, rtol=1e-6)
    table = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    np.testing.assert_array_equal(position_table.interpolate(table, (3, 4), (3, 4)), table)


@pytest.mark.parametrize(
    ("table", "is_other"),
    [
        ((1, 64, 5), True),
        ((1, 16, 5), False),
        ((1, 60, 5), False),
        ((1, 64, 4), False),
        ((64, 5), False),
        (None, False),
    ],
)
def test_tables_of_other_grids_are_recognised(table, is_other):
    assert position_table.is_of_other_grid(table, (1, 16, 5)) == is_other
