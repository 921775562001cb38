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
from ml_collections import ConfigDict

from benchmarks import measuring
from cfjax import build, program, sharding
from cfjax.optimizer import make_optimizer
from cfjax.train import train_step


def forward_flops(config: ConfigDict) -> int:
    """Model FLOPs of the forward pass over a batch."""
    model, length = build.model(config), build.sequence_length(config)
    copies = config.diffusion.timesteps_per_ar_step
    num_noised = copies * model.num_tokens
    num_clean = length - model.condition_length - num_noised
    num_timesteps = copies if config.diffusion.timestep_sharing == "example" else num_noised
    layers = model.depth * measuring.layer_flops(model, length, length)
    ends = measuring.end_flops(model, num_clean, num_noised, num_timesteps)
    return config.train.global_batch_size * (layers + ends)


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    config = flags.FLAGS["config"].value
    model, mesh = build.model(config), build.mesh(config)
    optimizer = make_optimizer(build.optimizer_settings(config))
    key = jax.random.key(config.seed)
    with sharding.activate(mesh):
        state = sharding.born_sharded(build.init_state(model, optimizer), mesh, key)
        batch_size, data = config.train.global_batch_size, config.data
        batch = {
            "image": jax.random.normal(key, (batch_size, data.size, data.size, data.channels)),
            "label": jax.random.randint(key, (batch_size,), 0, data.num_classes),
        }
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        one_train_step = jax.jit(
            functools.partial(
                train_step,
                model=model,
                objective_=build.objective(config),
                optimizer=optimizer,
                patch_size=config.model.patch_size,
                ema_decay=config.optimizer.ema_decay,
                seed=config.seed,
            ),
            donate_argnums=0,
        )
        compiled, trace_seconds, compile_seconds = measuring.compile_seconds(
            one_train_step, state, batch
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
    flops = 3 * forward_flops(config)
    rates = measuring.rates(times, flops, matmul_flops)
    measuring.report(
        {
            "benchmark": "train_step",
            "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            "dtype": config.model.dtype,
            "remat_policy": config.model.remat_policy,
            "sequence_length": sequence_length,
            "model_tflop": flops / 1e12,
            "train_steps_per_second": 1 / rates["seconds"],
            "tokens_per_second": batch_size * sequence_length / rates["seconds"],
            **rates,
            "trace_seconds": trace_seconds,
            "compile_seconds": compile_seconds,
            **measuring.peak_memory_gib(),
        }
    )


if __name__ == "__main__":
    measuring.define_flags(rounds=10)
    program.run(main)
