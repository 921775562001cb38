"""The train step against a large matrix product: `python -m benchmarks.train_step`.

From the repository's root. The whole train step is timed: corruption, forward and backward pass,
optimizer, EMA. FLOPs are the model's, whatever the program skips or computes twice, for B examples
of T tokens (condition, clean, noised), n layers of width D:

    3 B T n (24 D^2 + 4 T D) + 3 B (ends: token embedding, final projection, timestep embedding)

`tokens_per_second` counts all T tokens of a sequence. `ratio_to_matmul` is the achieved FLOP/s over
those of the product; --config.KEY=VALUE changes the model, as in training.
"""

import functools
from collections.abc import Sequence

import jax
from absl import flags

from benchmarks import measuring
from cfjax import build, program, sharding


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    config = flags.FLAGS["config"].value
    mesh = build.mesh(config)
    train_program = build.train_program(config, mesh)
    model = train_program.settings.model
    key = jax.random.key(config.seed)
    with sharding.activate(mesh):
        init = build.init_state(model, train_program.settings.optimizer)
        state = sharding.born_sharded(init, mesh, key, min_size=config.mesh.min_split_size)
        batch = measuring.random_batch(train_program)
        compiled, trace_seconds, compile_seconds = measuring.compile_seconds(
            functools.partial(train_program.lower, train_program.clean_lengths[-1])
        )

        def run_train_step():
            nonlocal state
            state, totals = compiled(state, batch)
            return state, totals

        matmul, matmul_flops = measuring.matmul_program(
            flags.FLAGS["matmul_size"].value, model.dtype
        )
        times = measuring.timed_rounds(run_train_step, matmul, flags.FLAGS["rounds"].value)

    sequence_length = build.sequence_length(config)
    model_flops = 3 * build.training_forward_flops(config)
    rates = measuring.rates(times, model_flops, matmul_flops)
    measuring.report(
        {
            "benchmark": "train_step",
            "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            "dtype": config.model.dtype,
            "remat_policy": config.model.remat_policy,
            "sequence_length": sequence_length,
            "model_tflop": model_flops / 1e12,
            "train_steps_per_second": 1 / rates["seconds"],
            "tokens_per_second": config.train.global_batch_size
            * sequence_length
            / rates["seconds"],
            **rates,
            "trace_seconds": trace_seconds,
            "compile_seconds": compile_seconds,
            **measuring.peak_memory_gib(),
        }
    )


if __name__ == "__main__":
    measuring.define_flags(rounds=10)
    program.run(main)
