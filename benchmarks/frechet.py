"""The Fréchet distance against `scipy.linalg.sqrtm`: `python -m benchmarks.frechet`.

From the repository's root. Statistics are of random features with a spectrum that falls as that of
Inception's; the root of the covariances' product is what the usual implementations spend their time
on. The two take turns, so that other load on the machine slows both alike; `ratio` is that of each
round. `few_` is of fewer samples than features, whose covariance is singular.

Beside other programs set OPENBLAS_NUM_THREADS=1: threads that wait for each other on shared cores
take several times as long.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from absl import flags

from benchmarks import measuring
from cfjax import program
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.statistics import FeatureStatistics


def seconds_of(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Wall seconds, and what the function returns."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def random_statistics(num_samples: int, num_features: int, seed: int) -> FeatureStatistics:
    """Of features in a random orthonormal basis, with deviations from 1 down."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((num_features, num_features)))[0]
    deviations = np.arange(1, num_features + 1) ** -0.7
    return FeatureStatistics.of(
        rng.standard_normal((num_samples, num_features)) * deviations @ basis
    )


def measure(num_features: int, rounds: int) -> dict[str, float]:
    """The values that are reported."""
    reference = random_statistics(3 * num_features, num_features, seed=0)
    sets = {
        "": random_statistics(3 * num_features, num_features, seed=1),
        "few_": random_statistics(num_features // 4, num_features, seed=2),
    }
    values = {}
    for name, samples in sets.items():
        product = samples.covariance @ reference.covariance
        distance_seconds, sqrtm_seconds = [], []
        for _ in range(rounds):
            seconds, distance = seconds_of(frechet_distance, samples, reference)
            distance_seconds.append(seconds)
            seconds, root = seconds_of(scipy.linalg.sqrtm, product)
            sqrtm_seconds.append(seconds)
        ratios = [a / b for a, b in zip(distance_seconds, sqrtm_seconds, strict=True)]
        difference = samples.mean - reference.mean
        expected = difference @ difference + np.trace(
            samples.covariance + reference.covariance - 2 * root.real
        )
        values |= {
            f"{name}seconds": statistics.median(distance_seconds),
            f"{name}sqrtm_seconds": statistics.median(sqrtm_seconds),
            f"{name}ratio": statistics.median(ratios),
            f"{name}ratio_min": min(ratios),
            f"{name}ratio_max": max(ratios),
            f"{name}relative_difference": float(abs(distance / expected - 1)),
        }
    return values


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    sizes = {name: flags.FLAGS[name].value for name in ("num_features", "rounds")}
    measuring.report({"benchmark": "frechet"} | sizes | measure(**sizes))


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 3, "Timed rounds.", 1)
    flags.DEFINE_integer("num_features", 2048, "F of the statistics.", 8)
    program.run(main)
