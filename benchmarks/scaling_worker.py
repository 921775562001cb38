"""One number of devices of `benchmarks.scaling`: takes train steps when it is told to.

Compiles its train steps, says "ready" and their names, then for each `NAME COUNT` that it reads
takes COUNT train steps and says their wall and CPU seconds, as JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from benchmarks import measuring
from cfjax import build, program, sharding
from cfjax.config_loading import config_from_json
from cfjax.train_step import train_step


def sharded(config: ConfigDict, **sizes: int) -> Callable[[], None]:
    """The train step of training on a mesh; a call takes one, and waits for it."""
    mesh = sharding.make_mesh(**sizes)
    train_program = build.train_program(config, mesh)
    settings = train_program.settings
    init = build.init_state(settings.model, settings.optimizer)
    min_size = config.mesh.min_split_size
    state = sharding.born_sharded(init, mesh, jax.random.key(0), min_size=min_size)
    batch = measuring.random_batch(train_program)
    compiled = train_program.compile(train_program.clean_lengths[-1])

    def take():
        nonlocal state
        state, totals = compiled(state, batch)
        jax.block_until_ready((state, totals))

    return take


def apart(config: ConfigDict) -> Callable[[], None]:
    """The same train step on each device by itself, for its part of the batch: nothing is shared."""
    mesh = sharding.make_mesh()
    train_program = build.train_program(config, mesh)
    settings, num_clean = train_program.settings, train_program.clean_lengths[-1]
    by_device = PartitionSpec(sharding.BATCH_AXES)

    def on_one(state, batch):
        state, totals = train_step(jax.tree.map(lambda x: x[0], state), batch, settings, num_clean)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], (state, totals))

    init = build.init_state(settings.model, settings.optimizer)
    first = sharding.make_mesh(devices=jax.devices()[:1])
    state = jax.device_get(sharding.born_sharded(init, first, jax.random.key(0)))
    copies = jax.tree.map(lambda x: np.broadcast_to(x, (mesh.size, *x.shape)), state)
    state = jax.device_put(copies, sharding.batch_sharding(mesh))
    batch = measuring.random_batch(train_program)
    mapped = jax.shard_map(
        on_one, mesh=mesh, in_specs=by_device, out_specs=by_device, check_vma=False
    )
    compiled = jax.jit(mapped, donate_argnums=0).lower(state, batch).compile()

    def take():
        nonlocal state
        state, totals = compiled(state, batch)
        jax.block_until_ready((state, totals))

    return take


def main(_: Sequence[str]) -> None:
    """Runs the worker."""
    config = config_from_json(flags.FLAGS.config_json)
    num_devices = jax.device_count()
    train_steps = {f"data={num_devices}": sharded(config)}
    if num_devices > 1:
        train_steps[f"fsdp={num_devices}"] = sharded(config, data=1, fsdp=num_devices)
        train_steps[f"apart={num_devices}"] = apart(config)
    say("ready", list(train_steps))
    for line in sys.stdin:
        name, count = line.split()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(count)):
            train_steps[name]()
        say(time.perf_counter() - wall, time.process_time() - cpu)


def say(*values: object) -> None:
    """A line of JSON, at once."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("config_json", None, "The config.", required=True)
    program.run(main)
