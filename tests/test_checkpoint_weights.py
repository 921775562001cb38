"""Checkpoints of weights from elsewhere: written, sampled from, trained on, read array by array."""

import flax.traverse_util
import jax
import numpy as np
import pytest
import tiny
from runs import restored

import cfjax
from cfjax import build, checkpoint_weights, checkpoints, sharding
from cfjax.config_loading import config_to_json
from cfjax.errors import UserError
from cfjax.train import train

# ml_collections loads config files that way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def weights():
    params = tiny.random_params(build.model(tiny.config()))
    return params, jax.tree.map(lambda leaf: leaf + np.float32(1), params)


@pytest.fixture
def run(tmp_path, weights):
    return write(tmp_path / "run", *weights)


def abstract_state():
    config = tiny.config()
    optimizer = build.make_optimizer(build.optimizer_settings(config))
    init = build.init_state(build.model(config), optimizer)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sharding.abstract_sharded(init, mesh, jax.random.key(0))


def write(workdir, params, ema, counts=(), **moments):
    trees = {"params": params, "ema": ema, **moments}
    flat = {name: flax.traverse_util.flatten_dict(tree, sep="/") for name, tree in trees.items()}
    arrays = {name: lambda name=name: flat[name].items() for name in flat}
    config_json = config_to_json(tiny.config())
    checkpoint_weights.write(workdir, config_json, abstract_state(), arrays, *counts)
    return workdir


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_weights_are_restored_with_a_fresh_optimizer_state(run, weights):
    params, ema = weights
    assert checkpoints.train_steps(run) == [0]
    assert_equal(checkpoints.restore_ema(run), ema)
    state, examples_seen = restored(run)
    assert (int(state.train_step), examples_seen) == (0, 0)
    assert_equal(state.params, params)
    assert_equal(state.ema_params, ema)
    optimizer = build.make_optimizer(build.optimizer_settings(tiny.config()))
    assert_equal(state.opt_state, optimizer.init(params))
    assert all(leaf.committed for leaf in jax.tree.leaves(state.opt_state))
    assert not checkpoint_weights.has_optimizer_state(run)


@pytest.mark.slow
def test_a_run_goes_on_from_adams_moments(tmp_path, weights):
    """Three train steps, taken apart and put together again, and three more: the very same bits."""
    whole = tiny.trained(tmp_path / "whole")
    half, examples_seen = restored(tmp_path / "whole", 3)
    adam = half.opt_state[1][0]
    parts = {"params": half.params, "ema": half.ema_params, "mu": adam.mu, "nu": adam.nu}
    run = write(tmp_path / "run", **parts, counts=(3, examples_seen))
    assert checkpoints.train_steps(run) == [3]
    assert checkpoint_weights.has_optimizer_state(run)
    state, seen = restored(run)
    assert_equal(state, half)
    assert (jax.tree.structure(state), seen) == (jax.tree.structure(half), examples_seen)
    assert_equal(train(tiny.config(), run), whole)


def test_weights_are_what_a_sampler_loads(run, weights):
    _, ema = weights
    sampler = cfjax.load(run)
    assert sampler.model.width == tiny.OVERRIDES["model.width"]
    assert_equal(
        sampler.params["token_embedding"]["kernel"],
        ema["token_embedding"]["kernel"].astype(sampler.params["token_embedding"]["kernel"].dtype),
    )


def test_training_starts_from_weights_as_from_a_state(run, weights):
    params, _ = weights
    final = train(tiny.config(), run)
    assert int(final.train_step) == tiny.NUM_TRAIN_STEPS
    moved = [
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(params), strict=True)
    ]
    largest = tiny.NUM_TRAIN_STEPS * tiny.config().optimizer.learning_rate
    assert 0 < max(moved) <= 2 * largest  # Adam's steps are about as large as the rate


def test_arrays_come_one_by_one_also_of_a_run_that_trained(run):
    train(tiny.config(), run)
    for train_step in (0, None):
        state, _ = restored(run, train_step)
        trees = {"params": state.params, "ema": state.ema_params}
        if train_step is None:
            trees |= {"mu": state.opt_state[1][0].mu, "nu": state.opt_state[1][0].nu}
        for name, tree in trees.items():
            flat = flax.traverse_util.flatten_dict(tree, sep="/")
            arrays = dict(checkpoint_weights.arrays_by_path(run, name, tree, train_step))
            assert set(arrays) == set(flat)
            assert_equal(arrays, flat)


def test_arrays_of_another_architecture_are_refused(run, weights):
    params = dict(weights[0])
    params["more"] = params.pop("label_table")
    for name in ("params", "ema"):
        with pytest.raises(UserError, match=r"another architecture: .*label_table is .* absent in"):
            checkpoint_weights.arrays_by_path(run, name, params)


def test_a_run_is_not_overwritten(run, weights):
    with pytest.raises(UserError, match="there are checkpoints in"):
        write(run, *weights)


def test_what_fails_leaves_no_checkpoint(tmp_path, weights):
    def fail():
        raise KeyError("x")

    workdir = tmp_path / "run"
    with pytest.raises(KeyError):
        checkpoint_weights.write(
            workdir,
            config_to_json(tiny.config()),
            abstract_state(),
            {"params": fail, "ema": fail},
        )
    assert checkpoints.train_steps(workdir) == []
    write(workdir, *weights)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["0"]
