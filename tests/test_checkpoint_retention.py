"""Which checkpoints stay, which one is the best, and going on from an older one than a damaged."""

import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfjax import checkpoints, sharding, train_state
from cfjax.checkpoint_retention import Best, Retention
from cfjax.errors import UserError

DATA = "state/d/*"


def init(width=4):
    return lambda: train_state.create({"w": jnp.arange(float(width))}, optax.sgd(1.0))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(fsdp=4)


def state_at(mesh, train_step):
    state = sharding.born_sharded(init(), mesh)
    return state.replace(
        train_step=jax.device_put(jnp.int32(train_step), sharding.replicated(mesh))
    )


def save(workdir, mesh, values, **retention):
    """Saves train steps, each with the value of its metric."""
    with checkpoints.CheckpointWriter(workdir, **retention) as writer:
        for train_step, value in values.items():
            writer.save(state_at(mesh, train_step), "{}", 10 * train_step, value)


def metadata(workdir, train_step):
    path = workdir / "checkpoints" / str(train_step) / "metadata" / "metadata.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("retention", "best", "stay"),
    [
        (Retention(1), None, [60]),
        (Retention(2), 20, [20, 50, 60]),
        (Retention(2, keep_every=30), None, [30, 50, 60]),
        (Retention(1, keep_every=20), 10, [10, 20, 40, 60]),
        (Retention(9), None, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_what_stays(retention, best, stay):
    saved = [10, 20, 30, 40, 50, 60]
    superfluous = retention.superfluous(saved, best)
    assert [train_step for train_step in saved if train_step not in superfluous] == stay


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"keep_last": 1, "keep_every": -1}])
def test_wrong_counts_are_refused(wrong, tmp_path):
    (name, value) = list(wrong.items())[-1]
    with pytest.raises(UserError, match=f"{name}(=| is ){value}"):
        checkpoints.CheckpointWriter(tmp_path, **wrong)


def test_the_best_is_the_lowest_with_a_value():
    best = Best().against(1, None).against(2, 0.5).against(3, 0.7).against(4, 0.5)
    assert best == Best(2, 0.5)
    assert best.against(5, math.nan) == best
    assert Best().document() is None


def test_last_every_and_best_stay_over_restarts(mesh, tmp_path):
    keep = {"keep_last": 1, "keep_every": 40, "best_metric": "loss"}
    save(tmp_path, mesh, {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5}, **keep)
    assert checkpoints.train_steps(tmp_path) == [20, 40]
    assert metadata(tmp_path, 20)["metric"] == {"name": "loss", "value": 1.0}
    assert metadata(tmp_path, 40)["best"] == {"train_step": 20, "value": 1.0}
    save(tmp_path, mesh, {50: 1.5, 55: None, 60: 1.2}, **keep)
    assert checkpoints.train_steps(tmp_path) == [20, 40, 60]
    save(tmp_path, mesh, {70: 0.5, 75: None, 80: 0.9, 90: 0.8}, **keep)
    assert checkpoints.train_steps(tmp_path) == [40, 70, 80, 90]
    assert metadata(tmp_path, 90)["best"] == {"train_step": 70, "value": 0.5}


def test_another_metric_starts_anew(mesh, tmp_path):
    save(tmp_path, mesh, {10: 0.1, 20: 0.2}, keep_last=2, best_metric="loss")
    save(tmp_path, mesh, {30: 9.0, 40: 9.5, 50: 9.7}, keep_last=1, best_metric="gradient_norm")
    assert checkpoints.train_steps(tmp_path) == [30, 50]


def test_metadata_has_mesh_and_processes(mesh, tmp_path):
    save(tmp_path, mesh, {1: None}, keep_last=1)
    saved = metadata(tmp_path, 1)
    assert saved["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert saved["num_processes"] == 1
    assert saved["metric"] is None and saved["best"] is None
    assert set(saved["versions"]) == {"cfjax", "jax"}


def test_state_is_cast_to_the_dtypes_of_today(mesh, tmp_path):
    save(tmp_path, mesh, {1: None}, keep_last=1)

    def halved():
        return train_state.create({"w": jnp.zeros(4, jnp.bfloat16)}, optax.sgd(1.0))

    target = sharding.abstract_sharded(halved, sharding.make_mesh())
    restored, _ = checkpoints.restore_state(tmp_path, target)
    for params in (restored.params, restored.ema_params):
        assert params["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(params["w"], np.float32), [0, 1, 2, 3])


def truncate(folder, pattern):
    for path in found(folder, pattern):
        path.write_bytes(path.read_bytes()[:20])


def remove(folder, pattern):
    for path in found(folder, pattern):
        path.unlink()


def found(folder, pattern):
    paths = list(folder.glob(pattern))
    assert paths
    return paths


@pytest.mark.parametrize("damage", [truncate, remove])
@pytest.mark.parametrize("pattern", [DATA, "data/data.json", "metadata/metadata.json"])
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)
def test_falls_back_and_says_so(damage, pattern, mesh, tmp_path, caplog):
    save(tmp_path, mesh, {10: None, 20: None, 30: None}, keep_last=3)
    folder = tmp_path / "checkpoints"
    damage(folder / "20", DATA)
    damage(folder / "30", pattern)
    target = sharding.abstract_sharded(init(), mesh)
    with caplog.at_level(logging.WARNING, logger="absl"):
        state, examples_seen = checkpoints.restore_newest(tmp_path, target)
    assert (int(state.train_step), examples_seen) == (10, 100)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20.damaged", "30.damaged"]
    # Not what asyncio says of the arrays that orbax dropped.
    warnings = [record.getMessage() for record in caplog.records if record.name == "absl"]
    assert any("train step 30 can't be read (" in warning for warning in warnings)
    assert all("going on from the one of train step 10" in warning for warning in warnings)
    save(tmp_path, mesh, {20: None, 30: None}, keep_last=3)  # the train steps can be saved again
    damage(folder / "30", pattern)
    assert int(checkpoints.restore_newest(tmp_path, target)[0].train_step) == 20
    assert (folder / "30.damaged.2").is_dir()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)
def test_nothing_is_touched_when_none_can_be_read(mesh, tmp_path):
    target = sharding.abstract_sharded(init(), mesh)
    assert checkpoints.restore_newest(tmp_path, target) is None
    save(tmp_path, mesh, {10: None, 20: None}, keep_last=2)
    for train_step in ("10", "20"):
        remove(tmp_path / "checkpoints" / train_step, DATA)
    with pytest.raises(UserError, match=r"no checkpoint in .* the newest of train step 20 \("):
        checkpoints.restore_newest(tmp_path, target)
    assert checkpoints.train_steps(tmp_path) == [10, 20]
    (tmp_path / "checkpoints" / "10").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no checkpoint in .* else start in a new workdir"):
        checkpoints.restore_newest(tmp_path, target)
    assert checkpoints.train_steps(tmp_path) == [20]


def test_another_architecture_is_no_damage(mesh, tmp_path):
    save(tmp_path, mesh, {10: None, 20: None}, keep_last=2)
    with pytest.raises(UserError, match="of another architecture"):
        checkpoints.restore_newest(tmp_path, sharding.abstract_sharded(init(5), mesh))
    assert checkpoints.train_steps(tmp_path) == [10, 20]


def test_a_damaged_checkpoint_is_never_the_best(mesh, tmp_path):
    save(tmp_path, mesh, {10: 1.0, 20: 2.0, 30: 3.0}, keep_last=3, best_metric="loss")
    remove(tmp_path / "checkpoints" / "10", "metadata/metadata.json")
    assert Best.of_run(tmp_path / "checkpoints", "loss") == Best(20, 2.0)
