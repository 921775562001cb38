"""The Fréchet distance against scipy's root and closed forms; singular covariances; its time."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import tiny

from benchmarks import frechet as benchmark
from cfjax.errors import UserError
from cfjax.evaluation.frechet import frechet_distance, frechet_distance_to
from cfjax.evaluation.statistics import FeatureStatistics


def features(num_samples, num_features=6, seed=0, mean=1000.0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_features, num_features))
    return (mean + rng.normal(size=(num_samples, num_features)) @ mixing).astype(np.float32)


def gaussian(mean, deviations):
    covariance = np.diag(np.square(deviations))
    return FeatureStatistics.from_mean_and_covariance(None, np.array(mean), covariance)


@pytest.mark.parametrize("num_samples", [200, 5])
def test_frechet_distance_equals_scipy(num_samples):
    """Also for singular covariances (5 samples of 6 features), where sqrtm has errors of 1e-6."""
    a, b = FeatureStatistics.of(features(num_samples)), FeatureStatistics.of(features(300, seed=1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    difference = a.mean - b.mean
    expected = difference @ difference + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(b, a), expected, rtol=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: |μa - μb|² + Σ (σa - σb)²."""
    a, b = gaussian([0.0, 1.0], [1.0, 2.0]), gaussian([3.0, 5.0], [4.0, 0.0])
    np.testing.assert_allclose(frechet_distance(a, b), 25 + 9 + 4, rtol=1e-12)
    assert abs(frechet_distance(a, a)) < 1e-12
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    deviations = [10.0 ** -np.linspace(0, 7, 40), 10.0 ** -np.linspace(3, 9, 40)]
    turned = [
        FeatureStatistics.from_mean_and_covariance(
            None, np.zeros(40), (rotation * np.square(sigma)) @ rotation.T
        )
        for sigma in deviations
    ]
    expected = np.square(deviations[0] - deviations[1]).sum()
    np.testing.assert_allclose(frechet_distance(*turned), expected, rtol=1e-9)


@pytest.mark.parametrize("num_samples", [600, 60])
def test_distance_to_itself_is_zero(num_samples):
    """Within 1e-6, though variances are as large as Inception's: full rank, and 60 of 200 features."""
    statistics = FeatureStatistics.of(3 * features(num_samples, 200, mean=0))
    assert np.trace(statistics.covariance) > 1e5
    assert abs(frechet_distance(statistics, statistics)) < 1e-6


def test_singular_covariances_have_an_exact_distance():
    """Rounding errors of 1e-16 whose roots were taken for deviations would add 1e-8 each."""
    rng = np.random.default_rng(0)
    basis, x = np.linalg.qr(rng.normal(size=(120, 120)))[0][:4], rng.normal(size=(400, 4))
    flat = FeatureStatistics.of(x @ basis)
    full = FeatureStatistics.of(rng.normal(size=(400, 120)) * 100)
    within = basis @ full.covariance @ basis.T  # the root of the product has rank 4
    root = np.sqrt(np.linalg.eigvals(np.cov(x.T) @ within)).sum()
    difference = flat.mean - full.mean
    traces = np.trace(np.cov(x.T)) + np.trace(full.covariance)
    expected = difference @ difference + traces - 2 * root
    np.testing.assert_allclose(frechet_distance(flat, full), expected, rtol=1e-12)

    def of(covariance):
        return FeatureStatistics.from_mean_and_covariance(None, np.zeros(2), covariance)

    line = of([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]])  # a Cholesky factor of it is rounding
    np.testing.assert_allclose(
        frechet_distance(line, of(1e4 * np.eye(2))), 20_002 - 200 * np.sqrt(2), rtol=1e-12
    )


def test_frechet_distance_refuses_what_does_not_fit():
    a = FeatureStatistics.of(features(20))
    with pytest.raises(UserError, match="of 6 features have no distance to a reference of 5"):
        frechet_distance(a, FeatureStatistics.of(features(20, 5)))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(gaussian([np.nan], [1.0]), gaussian([0.0], [1.0]))
    bad = FeatureStatistics.from_mean_and_covariance(None, np.zeros(2), np.diag([1.0, -0.1]))
    with pytest.raises(UserError, match=r"eigenvalue -0\.1 beside 1"):
        frechet_distance_to(bad)


def test_the_benchmark_compares_equal_distances():
    """sqrtm of the singular covariance has errors of 1e-7."""
    values = benchmark.measure(num_features=32, rounds=2)
    assert values["relative_difference"] < 1e-9 and values["few_relative_difference"] < 1e-5
    for name in ("", "few_"):
        assert 0 < values[f"{name}ratio_min"] <= values[f"{name}ratio"]


@pytest.mark.long
def test_half_the_time_of_sqrtm():
    """At Inception's 2048 features, in one run; on one thread, as several wait for each other."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.frechet", "--rounds=1"],
        cwd=tiny.REPOSITORY,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["ratio"] < 0.5 and values["few_ratio"] < 0.5
    assert values["relative_difference"] < 1e-9 and values["few_relative_difference"] < 1e-6
