"""Measuring a program against a large matrix product in the same run.

The two take turns, so that other load on the machine slows both alike; medians are reported, with
the spread beside them.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from cfjax.config_loading import define_config_flag
from cfjax.train_step import TrainProgram


def define_flags(rounds: int) -> None:
    """The flags of a benchmark: config, rounds, size of the matrices."""
    define_config_flag(required=False)
    flags.FLAGS.set_default("config", "benchmarks/mid_model.py")
    flags.DEFINE_integer("rounds", rounds, "Timed rounds of program and product.", 1)
    flags.DEFINE_integer("matmul_size", 2048, "Rows of the square matrices.", 1)


def random_batch(train_program: TrainProgram) -> dict[str, jax.Array]:
    """A batch of images or moments, and classes, as the train step takes it."""
    key, num_classes = jax.random.key(0), train_program.settings.model.num_classes

    def draw(leaf):
        if leaf.dtype == jnp.int32:
            return jax.random.randint(key, leaf.shape, 0, num_classes)
        return jax.random.normal(key, leaf.shape, leaf.dtype)

    return {
        name: jax.device_put(draw(leaf), leaf.sharding)
        for name, leaf in train_program.abstract_batch.items()
    }


def matmul_program(size: int, dtype: jnp.dtype) -> tuple[Callable[[], Any], int]:
    """A jitted product of two square matrices on the first device, and its FLOPs."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b), 2 * size**3


def compile_seconds(lower: Callable[[], jax.stages.Lowered]) -> tuple[Any, float, float]:
    """`(compiled, seconds to trace and lower, seconds to compile)`."""
    began = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    return compiled, traced - began, time.perf_counter() - traced


def timed_rounds(
    program: Callable[[], Any], matmul: Callable[[], Any], rounds: int
) -> list[tuple[float, float]]:
    """Wall seconds of a program and of the product, round by round; the first is not counted.

    In each round the product runs five times, of which the fastest counts: the rate that the
    machine had to offer then.
    """
    times = []
    for _ in range(rounds + 1):
        matmul_seconds = min(_seconds(matmul) for _ in range(5))
        times.append((_seconds(program), matmul_seconds))
    return times[1:]


def _seconds(program: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - began


def rates(times: list[tuple[float, float]], flops: int, matmul_flops: int) -> dict[str, float]:
    """Of the rounds of `timed_rounds`: seconds, achieved FLOP/s, and their ratio to the product's.

    Medians over the rounds; `ratio_to_matmul` of the ratio in each round, with its extremes.
    """
    seconds = [program for program, _ in times]
    ratios = [flops / program / (matmul_flops / matmul) for program, matmul in times]
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "gflop_per_second": flops / statistics.median(seconds) / 1e9,
        "matmul_gflop_per_second": matmul_flops
        / statistics.median(matmul for _, matmul in times)
        / 1e9,
        "ratio_to_matmul": statistics.median(ratios),
        "ratio_to_matmul_min": min(ratios),
        "ratio_to_matmul_max": max(ratios),
    }


def peak_memory_gib() -> dict[str, float]:
    """Of this process so far, and of the first device where it tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        peak["peak_device_gib"] = stats["peak_bytes_in_use"] / 2**30
    return peak


def report(values: Mapping[str, Any]) -> None:
    """Prints a table, then the same as one line of JSON."""
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")
    print(json.dumps(values))
