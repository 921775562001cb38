"""One of the processes of tests/test_multiprocess.py; run as a program with its flags."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from jax.experimental import multihost_utils

from cfjax import checkpoints, metric_log, program, sharding, train_state
from cfjax.errors import UserError

GLOBAL_BATCH, WIDTH = 16, 8
OPTIMIZER = optax.adam(0.1)


def create(key):
    kernel_init = sharding.with_logical_axes(jax.random.normal, ("width", "mlp"))
    return train_state.create({"kernel": kernel_init(key, (WIDTH, 4 * WIDTH))}, OPTIMIZER)


def loss_fn(params, batch):
    rates = jnp.arange(1.0, 1 + GLOBAL_BATCH) / GLOBAL_BATCH
    return jnp.mean(rates * jnp.mean((batch["x"] @ params["kernel"] - 1) ** 2, axis=1))


@jax.jit
def train(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    return train_state.apply_gradients(state, grads, OPTIMIZER, 0.9), loss


def global_batch(train_step):
    return {"x": np.random.default_rng(train_step).normal(size=(GLOBAL_BATCH, WIDTH))}


def train_and_save(mesh, workdir):
    """Two train steps on this process's rows of each batch; the state and its losses."""
    writer = checkpoints.CheckpointWriter(workdir, keep_last=2)
    losses = []
    with writer, metric_log.MetricLog(workdir) as log, sharding.activate(mesh):
        state = sharding.born_sharded(create, mesh, jax.random.key(0))
        sharding.check_batch_divides(GLOBAL_BATCH, mesh)
        rows = sharding.batch_rows(GLOBAL_BATCH, mesh)
        for train_step in (1, 2):
            local = {name: x[rows].astype("f4") for name, x in global_batch(train_step).items()}
            state, loss = train(state, sharding.assemble_global_batch(local, mesh))
            log.write(train_step, {"loss": loss})
            writer.save(state, "{}", GLOBAL_BATCH * train_step)
            losses.append(float(loss))
    return state, losses


def check_restored(state, workdir):
    """On another mesh, of which each process holds every second device; the EMA everywhere."""
    devices = np.array(jax.devices()).reshape(2, 4).T.ravel()
    other = jax.sharding.Mesh(devices.reshape(2, 2, 2), sharding.MESH_AXES)
    target = sharding.abstract_sharded(create, other, jax.random.key(0))
    restored, examples_seen = checkpoints.restore_state(workdir, target)
    assert examples_seen == 2 * GLOBAL_BATCH
    assert restored.params["kernel"].sharding.mesh == other
    everything = [multihost_utils.process_allgather(tree, tiled=True) for tree in (state, restored)]
    jax.tree.map(np.testing.assert_array_equal, *everything)
    ema = checkpoints.restore_ema(workdir)
    np.testing.assert_array_equal(ema["kernel"], everything[0].ema_params["kernel"])


def check_interleaved_rows():
    """A mesh whose batch axis goes back and forth between the processes."""
    devices = np.array(jax.devices()).reshape(2, 4).T.reshape(8, 1, 1)
    mesh = jax.sharding.Mesh(devices, sharding.MESH_AXES)
    rows = sharding.batch_rows(GLOBAL_BATCH, mesh)
    assert len(rows) == GLOBAL_BATCH // 2 and not (np.diff(rows) == 1).all()
    x = global_batch(1)["x"]
    batch = sharding.assemble_global_batch(x[rows], mesh)
    assert batch.shape == x.shape
    np.testing.assert_array_equal(
        multihost_utils.process_allgather(batch, tiled=True), x.astype("f4")
    )


def check_refusals(workdir):
    with pytest.raises(UserError, match="tensor=8 spans several processes"):
        sharding.check_batch_divides(GLOBAL_BATCH, sharding.make_mesh(tensor=8))
    with pytest.raises(UserError, match="multiple of 8, such as 16"):
        sharding.check_batch_divides(12, sharding.make_mesh())
    with pytest.raises(UserError, match=r"different checkpoints .* \[-1, 2\]"):
        checkpoints.latest_train_step(f"{workdir}{'/nowhere' * jax.process_index()}")


def main(_):
    program.initialize_distributed()
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    workdir = flags.FLAGS.workdir
    program.check_workdir_writable(workdir)
    state, _ = train_and_save(sharding.make_mesh(fsdp=4), workdir)
    assert checkpoints.latest_train_step(workdir) == 2
    check_restored(state, workdir)
    check_interleaved_rows()
    check_refusals(workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder shared by the processes.")
    program.define_distributed_flags()
    program.run(main)
