"""Images a second through Inception, against torch-fidelity: `python -m benchmarks.evaluation`.

From the repository's root, with the packages of requirements-oracle.txt and
requirements-oracle-no-deps.txt. Both networks have random weights, and take turns on the same images
on the CPU, each with all cores; the ratio is that of each round, with its extremes, and that of the
fastest rounds. On a busy machine threads that wait for each other, as torch's do, lose most: a core
for both (`taskset --cpu-list 0`) and the ratio of CPU seconds are fairer there.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import flax.traverse_util
import jax
import numpy as np
from absl import flags

from benchmarks import measuring
from cfjax import inception_files, program
from cfjax.errors import UserError
from cfjax.models.inception import InceptionV3


def our_pass(images: np.ndarray) -> Callable[[], Any]:
    """Our network on images `[batch, H, W, 3]` of uint8, compiled."""
    rng = np.random.default_rng(0)
    shapes = inception_files.flat_shapes()
    flat = {path: rng.random(shape, np.float32) / shape[-1] for path, shape in shapes.items()}
    params = jax.device_put(flax.traverse_util.unflatten_dict(flat, sep="/"))
    apply = jax.jit(lambda params, images: InceptionV3().apply({"params": params}, images))
    compiled = apply.lower(params, images).compile()
    return lambda: jax.block_until_ready(compiled(params, images))


def their_pass(images: np.ndarray) -> Callable[[], Any]:
    """torch-fidelity's network on the same.

    Raises:
      UserError: it is not installed.
    """
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    try:
        import torch
        import torchvision_stub

        with torchvision_stub.installed():
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            f"{error}; install what requirements-oracle.txt and requirements-oracle-no-deps.txt list."
        ) from error
    without_weights = mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict")
    with without_weights, mock.patch("torch.load"):
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path="none"
        )
    tensor = torch.from_numpy(np.moveaxis(images, -1, 1).copy())

    def run():
        with torch.no_grad():
            return network(tensor)

    return run


def interleaved_seconds(
    programs: Sequence[Callable[[], Any]], rounds: int
) -> list[list[tuple[float, float]]]:
    """Wall and CPU seconds of each program, round by round; the first round is not counted."""
    return [[_seconds(run) for run in programs] for _ in range(rounds + 1)][1:]


def _seconds(run: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def rates(times: Sequence[Sequence[tuple[float, float]]], batch_size: int) -> dict[str, float]:
    """Of rounds of ours and theirs: images a second of the fastest, and how many times theirs."""
    fastest, their_fastest = (min(wall for wall, _ in runs) for runs in zip(*times, strict=True))
    ratios = [theirs[0] / ours[0] for ours, theirs in times]
    return {
        "images_per_second": batch_size / fastest,
        "torch_fidelity_images_per_second": batch_size / their_fastest,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_of_fastest": their_fastest / fastest,
        "cpu_ratio": statistics.median(theirs[1] / ours[1] for ours, theirs in times),
    }


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS.flag_values_dict()
    batch_size, size, rounds = (values[name] for name in ("batch_size", "size", "rounds"))
    images = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), np.uint8)
    times = interleaved_seconds([our_pass(images), their_pass(images)], rounds)
    measuring.report(
        {
            "benchmark": "evaluation",
            "batch_size": batch_size,
            "image_size": size,
            "rounds": rounds,
            **rates(times, batch_size),
            **measuring.peak_memory_gib(),
        }
    )


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 5, "Timed rounds.", 1)
    flags.DEFINE_integer("batch_size", 32, "Images in a round.", 1)
    flags.DEFINE_integer("size", 256, "Height and width of the images.", 1)
    program.run(main)
