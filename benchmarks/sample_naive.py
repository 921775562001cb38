"""What the KV cache saves: `python -m benchmarks.sample_naive`, from the repository's root.

The sampler against the naive loop, which holds no KV cache: every denoising step pushes the condition
tokens and the clean tokens of the AR steps before anew. For each number of AR steps the two take turns
in one run. The naive denoising step is compiled and timed at some AR steps, evenly from the first to
the last, and its time in between is interpolated, as each position is a program of its own.

Batch, denoising steps and guidance are those of the config: --config.sampling.KEY=VALUE.
"""

import functools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import measuring
from cfjax import build, program, sampling, sharding
from cfjax.guided_network import Network, guided_prediction, prefill, push_clean_tokens
from cfjax.rng import per_example_keys


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def naive_denoising_step(model, params, begin, size, scale, labels, tokens):
    """The prediction for `size` tokens after `begin` clean ones, from the tokens alone."""
    network = Network(model, params)
    grid_indices = jnp.broadcast_to(jnp.arange(model.num_tokens), tokens.shape[:2])
    caches = prefill(network, None, labels, begin, is_guided=scale is not None)
    if begin:
        clean = tokens[:, :begin], grid_indices[:, :begin]
        caches = push_clean_tokens(network, None, caches, *clean)
    noised = slice(begin, begin + size)
    return guided_prediction(
        network, None, caches, tokens[:, noised], 500, grid_indices[:, noised], scale
    )


def seconds_of(run) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def ratios(config: ConfigDict, num_ar_steps: int, rounds: int, num_positions: int) -> list[float]:
    """Naive seconds over the sampler's, round by round."""
    config = config.copy_and_resolve_references()
    config.sampling.num_ar_steps = num_ar_steps
    model, mesh = build.sampling_model(config), build.mesh(config)
    settings = build.sampling_settings(config)
    key, batch_size = jax.random.key(config.seed), config.train.global_batch_size
    scale = settings.guidance.scale if settings.is_guided else None
    sizes = np.array(settings.split_sizes)
    begins = np.cumsum(sizes) - sizes
    positions = np.unique(
        np.linspace(0, num_ar_steps - 1, min(num_positions, num_ar_steps)).round().astype(int)
    )
    with sharding.activate(mesh):
        params = sharding.born_sharded(build.init_sampling_params(model), mesh, key)
        labels = jax.random.randint(key, (batch_size,), 0, config.data.num_classes)
        keys = per_example_keys(key, jnp.arange(batch_size))
        tokens = jax.random.normal(key, (batch_size, model.num_tokens, model.token_width))
        labels, keys, tokens = jax.device_put((labels, keys, tokens), sharding.batch_sharding(mesh))

        def sample():
            return sampling.generate(model, params, settings, labels, keys)

        def naive(position):
            begin, size = int(begins[position]), int(sizes[position])
            return naive_denoising_step(model, params, begin, size, scale, labels, tokens)

        results = []
        for round_ in range(rounds + 1):  # the first compiles
            of_positions = [
                seconds_of(functools.partial(naive, position)) for position in positions
            ]
            every = np.interp(np.arange(num_ar_steps), positions, of_positions)
            num_denoising_steps = [schedule.num_timesteps for schedule in settings.schedules]
            if round_:
                results.append(float(every @ num_denoising_steps) / seconds_of(sample))
            else:
                seconds_of(sample)
    return results


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS.flag_values_dict()
    report = {
        "benchmark": "sample_naive",
        "batch_size": values["config"].train.global_batch_size,
        "denoising_steps": values["config"].sampling.denoising_steps,
        "guidance_scale": values["config"].sampling.guidance_scale,
    }
    for num_ar_steps in map(int, values["ar_steps"]):
        found = ratios(values["config"], num_ar_steps, values["rounds"], values["positions"])
        report[f"ratio_to_naive_S{num_ar_steps}"] = statistics.median(found)
        report[f"ratio_to_naive_S{num_ar_steps}_min"] = min(found)
        report[f"ratio_to_naive_S{num_ar_steps}_max"] = max(found)
    measuring.report(report)


if __name__ == "__main__":
    measuring.define_flags(rounds=3)
    flags.DEFINE_list("ar_steps", ["1", "4", "16", "64"], "Numbers of AR steps.")
    flags.DEFINE_integer("positions", 5, "AR steps at which the naive loop is timed.", 1)
    program.run(main)
