"""Checkpoints: round trip, other meshes, interrupted saves, and what is refused."""

import gc
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfjax import checkpoint_folders, checkpoints, sharding, train_state
from cfjax.errors import UserError

CONFIG = json.dumps({"model": {"width": 16}, "sizes": [1, 2], "none": None})
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


complaints_are_expected = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)


@pytest.fixture
def outlived_complaints():
    """When one array fails, orbax drops the others, which complain from other threads or as garbage.

    Waits until they have, lest another test hears it.
    """
    yield
    time.sleep(0.1)
    gc.collect()


def make_init(width=16, optimizer=OPTIMIZER):
    def init(key):
        kernel_init = sharding.with_logical_axes(jax.random.normal, ("width", "mlp"))
        params = {
            "blocks": {"kernel": kernel_init(key, (width, 256)), "bias": jnp.arange(10.0)},
            "half": jax.random.normal(key, (7,), jnp.bfloat16),
            "count": jnp.arange(3, dtype=jnp.int32),
        }
        return train_state.create(params, optimizer)

    return init


def make_state(mesh, train_step=0, seed=0):
    state = sharding.born_sharded(make_init(), mesh, jax.random.key(seed))
    step = jax.device_put(jnp.int32(train_step), sharding.replicated(mesh))
    return state.replace(
        train_step=step,
        ema_params=jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p))(state.params),
    )


def abstract(mesh, **kwargs):
    return sharding.abstract_sharded(make_init(**kwargs), mesh, jax.random.key(0))


def assert_same_bits(tree, expected):
    def check(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(check, tree, expected)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(fsdp=4)


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    """A workdir with checkpoints of train steps 5, 10, 20; not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    with checkpoints.CheckpointWriter(workdir, keep_last=3) as writer:
        for train_step in (5, 10, 20):
            writer.save(make_state(mesh, train_step, seed=train_step), CONFIG, 64 * train_step)
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of `saved`, to be broken."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_round_trip_is_exact_to_the_bit(mesh, tmp_path):
    state = make_state(mesh, 3)
    odd = jnp.array([jnp.nan, -0.0, 1e-42, jnp.inf, 1 / 3, -1, 2, 3, 4, 5], jnp.float32)
    odd = jax.device_put(odd, sharding.replicated(mesh))
    state.params["blocks"]["bias"] = odd
    with checkpoints.CheckpointWriter(tmp_path, keep_last=1) as writer:
        writer.save(state, CONFIG, 123)
    restored, examples_seen = checkpoints.restore_state(tmp_path, abstract(mesh))
    assert_same_bits(restored, state)
    assert examples_seen == 123
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, abstract(mesh)
    )
    assert json.loads(checkpoints.read_config(tmp_path)) == json.loads(CONFIG)


def test_restores_onto_another_mesh(saved, mesh):
    other = sharding.make_mesh(data=8)
    target = abstract(other)
    restored, _ = checkpoints.restore_state(saved, target)
    assert_same_bits(restored, make_state(mesh, 20, seed=20))
    assert restored.params["blocks"]["kernel"].sharding.mesh == other
    assert restored.opt_state[1][0].mu["blocks"]["kernel"].sharding.is_fully_replicated


def test_ema_alone_needs_only_the_directory(saved, mesh):
    expected = make_state(mesh, 20, seed=20).ema_params
    for directory in (saved, saved / "checkpoints", saved / "checkpoints" / "20"):
        assert_same_bits(checkpoints.restore_ema(directory), expected)
    older = make_state(mesh, 5, seed=5).ema_params
    assert_same_bits(checkpoints.restore_ema(saved, train_step=5), older)


def test_one_checkpoint_may_be_copied_under_any_name(saved, mesh, tmp_path):
    shutil.copytree(saved / "checkpoints" / "10", tmp_path / "best")
    expected = make_state(mesh, 10, seed=10).ema_params
    assert_same_bits(checkpoints.restore_ema(tmp_path / "best"), expected)
    assert json.loads(checkpoints.read_config(tmp_path / "best")) == json.loads(CONFIG)


def test_ema_is_cast_and_placed_as_asked(saved, mesh):
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        abstract(mesh).ema_params,
    )
    kernel = checkpoints.restore_ema(saved, target)["blocks"]["kernel"]
    expected = make_state(mesh, 20, seed=20).ema_params["blocks"]["kernel"].astype(jnp.bfloat16)
    assert_same_bits(kernel, expected)
    assert kernel.addressable_shards[0].data.shape == (4, 256)


def test_keeps_the_last_and_leaves_a_saved_train_step_alone(mesh, tmp_path):
    with checkpoints.CheckpointWriter(tmp_path, keep_last=2) as writer:
        for train_step in (1, 2, 3, 4):
            writer.save(make_state(mesh, train_step), CONFIG, train_step)
        writer.save(make_state(mesh, 4, seed=9), CONFIG, 99)
    assert checkpoints.train_steps(tmp_path) == [3, 4]
    assert checkpoints.latest_train_step(tmp_path) == 4
    assert checkpoints.restore_state(tmp_path, abstract(mesh))[1] == 4
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_nothing_is_written_before_the_first_save(tmp_path):
    with checkpoints.CheckpointWriter(tmp_path, keep_last=1):
        pass
    assert list(tmp_path.iterdir()) == []
    assert checkpoints.latest_train_step(tmp_path) is None


def test_leaving_by_an_error_waits_for_the_last_save(mesh, tmp_path):
    writer = checkpoints.CheckpointWriter(tmp_path, keep_last=1)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.save(make_state(mesh, 7), CONFIG, 0)
        raise KeyboardInterrupt
    assert checkpoints.latest_train_step(tmp_path) == 7


def test_state_may_be_donated_while_it_is_saved(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def init():
        return train_state.create({"w": jnp.zeros((512, 1024))}, optax.sgd(1.0))

    def step(state):
        return jax.tree.map(lambda x: x + 1, state)

    state = sharding.born_sharded(init, mesh)
    step = jax.jit(step, donate_argnums=0)
    with checkpoints.CheckpointWriter(tmp_path, keep_last=10) as writer:
        for _ in range(4):
            state = step(state)
            writer.save(state, CONFIG, 0)
            for _ in range(5):
                state = step(state)
    for train_step in checkpoints.train_steps(tmp_path):
        target = sharding.abstract_sharded(init, mesh)
        restored, _ = checkpoints.restore_state(tmp_path, target, train_step)
        np.testing.assert_array_equal(restored.params["w"], float(train_step))
        np.testing.assert_array_equal(restored.ema_params["w"], float(train_step))


SAVING_FOREVER = """
import sys
import jax, jax.numpy as jnp, optax
from cfjax import checkpoints, sharding, train_state

def init():
    return train_state.create({"w": jnp.zeros((256, 1024)), "v": jnp.zeros((9,))}, optax.sgd(1.0))

workdir = sys.argv[1]
mesh = sharding.make_mesh()
step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
latest = checkpoints.latest_train_step(workdir)
if latest is None:
    state = sharding.born_sharded(init, mesh)
else:
    state, examples_seen = checkpoints.restore_state(workdir, sharding.abstract_sharded(init, mesh))
    assert examples_seen == 10 * latest, (examples_seen, latest)
    for leaf in jax.tree.leaves(state):
        assert (leaf == latest).all(), (leaf, latest)
if len(sys.argv) > 2:
    raise SystemExit
with checkpoints.CheckpointWriter(workdir, keep_last=2) as writer:
    while True:
        state = step(state)
        writer.save(state, "{}", 10 * int(state.train_step))
"""


def test_killed_while_saving_leaves_the_previous_checkpoint(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SAVING_FOREVER, str(tmp_path)]
    folder = tmp_path / "checkpoints"
    rng = random.Random(0)
    before, leftovers = -1, 0
    for _ in range(4):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        # Once a new checkpoint stands, the next save begins: strike at a random moment of it.
        while process.poll() is None and time.monotonic() < deadline:
            temporary = folder.is_dir() and any("tmp" in p.name for p in folder.iterdir())
            if temporary and max(checkpoints.train_steps(tmp_path), default=-1) > before + 1:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert process.wait() == -9, process.stderr.read().decode()
        process.stderr.close()
        leftovers += any("tmp" in p.name for p in folder.iterdir())
        steps = checkpoints.train_steps(tmp_path)
        assert steps[-1] > before + 1 and len(steps) <= 3
        before = steps[-1]
    assert leftovers, "no kill fell into a save"
    subprocess.run([*command, "check"], env=environment, check=True, timeout=60)


def test_leftovers_are_removed_and_never_count(copied):
    folder = copied / "checkpoints"
    (folder / "30.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "10.deleting").touch()
    shutil.rmtree(folder / "10" / "state")
    assert checkpoints.train_steps(copied) == [5, 20]
    with checkpoints.CheckpointWriter(copied, keep_last=3):
        pass
    assert sorted(p.name for p in folder.iterdir()) == ["20", "5"]


@complaints_are_expected
def test_a_save_that_cannot_be_written_is_reported(mesh, tmp_path, outlived_complaints):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    first, second = make_state(mesh, 1), make_state(mesh, 2)
    writer = checkpoints.CheckpointWriter(tmp_path, keep_last=2)
    refused = pytest.raises(UserError, match=r"could not be written to .*train step 1, so give")
    with refused, writer:
        writer.save(first, CONFIG, 0)
        writer.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
            writer.save(second, CONFIG, 0)
            writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.train_steps(tmp_path) == [1]
    with checkpoints.CheckpointWriter(tmp_path, keep_last=2) as writer:
        writer.save(second, CONFIG, 0)
    assert checkpoints.train_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("place", ["nowhere", "empty", "file", "other"])
def test_no_checkpoint_is_refused(place, tmp_path, mesh):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "pictures").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for read in (
        checkpoints.restore_ema,
        checkpoints.read_config,
        lambda directory: checkpoints.restore_state(directory, abstract(mesh)),
    ):
        with pytest.raises(UserError, match=f"there is no (folder|checkpoint in) .*{place}; pass"):
            read(tmp_path / place)


def test_unknown_train_step_is_refused(saved):
    with pytest.raises(UserError, match=r"train step 7 in .*; there are those of .* 5, 10, 20\."):
        checkpoints.restore_ema(saved, train_step=7)


BROKEN = [
    "config/config.json",
    "data/data.json",
    "metadata/metadata.json",
    "state/manifest.ocdbt",
    "state/d/*",
    "ema/d/*",
    "ema/ocdbt.process_0/d/*",
]


@complaints_are_expected
@pytest.mark.parametrize("damage", ["removed", "truncated", "emptied"])
def test_corrupt_checkpoint_is_refused_and_never_passed_over(
    damage, copied, mesh, outlived_complaints
):
    for pattern in BROKEN:
        files = {path: path.read_bytes() for path in (copied / "checkpoints" / "20").glob(pattern)}
        assert files, pattern
        for path, content in files.items():
            if damage == "removed":
                path.unlink()
            else:
                path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
        with pytest.raises(UserError) as error:
            checkpoints.restore_state(copied, abstract(mesh))
            checkpoints.read_config(copied)
        message = str(error.value)
        assert "train step 20" in message and "corrupt" in message and "\n" not in message
        assert "remove that folder to use the one of train step 10 instead" in message
        for path, content in files.items():
            path.write_bytes(content)
    checkpoints.restore_state(copied, abstract(mesh))
    shutil.rmtree(copied / "checkpoints" / "20")
    assert int(checkpoints.restore_state(copied, abstract(mesh))[0].train_step) == 10


def test_corrupt_only_checkpoint(copied):
    for train_step in (5, 10):
        checkpoint_folders.delete(checkpoint_folders.find(copied, train_step))
    (copied / "checkpoints" / "20" / "metadata" / "metadata.json").unlink()
    with pytest.raises(UserError, match="there is no other, so start in a new workdir"):
        checkpoints.restore_ema(copied)


def test_another_architecture_is_refused_by_name_and_shape(saved, mesh):
    with pytest.raises(UserError) as error:
        checkpoints.restore_state(saved, abstract(mesh, width=32))
    message = str(error.value)
    assert (
        "params/blocks/kernel is (16, 256) in the checkpoint but (32, 256) in the config" in message
    )
    assert "config.json" in message and "and " not in message.split("params/")[0]
    with pytest.raises(UserError, match=r"ema_params/blocks/kernel is \(16, 256\)"):
        checkpoints.restore_ema(saved, abstract(mesh, width=32).ema_params)
    with pytest.raises(UserError, match=r"ema_params/extra is absent in the checkpoint but \(2,\)"):
        target = abstract(mesh).ema_params
        checkpoints.restore_ema(saved, {"extra": jax.ShapeDtypeStruct((2,), jnp.float32), **target})


def test_another_optimizer_is_refused(saved, mesh):
    with pytest.raises(UserError, match=r"opt_state/\S+ is .* in the checkpoint but absent in"):
        checkpoints.restore_state(saved, abstract(mesh, optimizer=optax.sgd(0.1)))


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="keep_last=0"):
        checkpoints.CheckpointWriter(tmp_path, keep_last=0)
