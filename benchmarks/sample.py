"""Sampling against a large matrix product: `python -m benchmarks.sample`.

From the repository's root. One call of `cfjax.sampling.generate` makes a batch of
`config.train.global_batch_size` images; the number of AR steps, denoising steps and the guidance
are those of `config.sampling`, to be changed by --config.sampling.KEY=VALUE.

FLOPs are the model's. A pass over m tokens that see k cached ones and each other costs one example
n m (24 D^2 + 4 (k + m) D) and its ends; there is one for each denoising step, one to push each AR
step but the last into the KV cache, and one to prefill it; twice as much with guidance.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import measuring
from cfjax import build, flops, program, sampling, sharding
from cfjax.rng import per_example_keys


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    config = flags.FLAGS["config"].value
    model, mesh = build.sampling_model(config), build.mesh(config)
    settings = build.sampling_settings(config)
    key = jax.random.key(config.seed)
    batch_size = config.train.global_batch_size
    with sharding.activate(mesh):
        params = sharding.born_sharded(build.init_sampling_params(model), mesh, key)
        labels = jax.random.randint(key, (batch_size,), 0, config.data.num_classes)
        keys = per_example_keys(key, jnp.arange(batch_size))
        labels, keys = jax.device_put((labels, keys), sharding.batch_sharding(mesh))
        compiled, trace_seconds, compile_seconds = measuring.compile_seconds(
            functools.partial(sampling.generate.lower, model, params, settings, labels, keys)
        )
        matmul, matmul_flops = measuring.matmul_program(
            flags.FLAGS["matmul_size"].value, model.dtype
        )
        times = measuring.timed_rounds(
            lambda: compiled(params, labels, keys), matmul, flags.FLAGS["rounds"].value
        )

    num_denoising_steps = sum(schedule.num_timesteps for schedule in settings.schedules)
    model_flops = batch_size * flops.sampling_flops(
        model, settings.split_sizes, settings.num_passes, settings.num_rows
    )
    rates = measuring.rates(times, model_flops, matmul_flops)
    measuring.report(
        {
            "benchmark": "sample",
            "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            "dtype": config.model.dtype,
            "batch_size": batch_size,
            "num_ar_steps": len(settings.split_sizes),
            "num_denoising_steps": num_denoising_steps,
            "guidance_scale": settings.guidance.scale,
            "model_tflop": model_flops / 1e12,
            "images_per_second": batch_size / rates["seconds"],
            "tokens_per_second": batch_size * model.num_tokens / rates["seconds"],
            "seconds_per_denoising_step": rates["seconds"] / num_denoising_steps,
            **rates,
            "trace_seconds": trace_seconds,
            "compile_seconds": compile_seconds,
            **measuring.peak_memory_gib(),
        }
    )


if __name__ == "__main__":
    measuring.define_flags(rounds=5)
    program.run(main)
