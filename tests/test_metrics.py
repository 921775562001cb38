"""The evaluation suite's metrics against closed forms, plain loops, and what they must refuse."""

import tracemalloc

import numpy as np
import pytest
import scipy.special

from cfjax.errors import UserError
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.inception_score import inception_score
from cfjax.evaluation.kernel_distance import kernel_distance, kernel_distance_of_subsets
from cfjax.evaluation.statistics import FeatureStatistics
from cfjax.evaluation.uncertainty import bootstrap_interval, extrapolate_fid


def features(num_samples, num_features=6, seed=0, mean=1000.0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_features, num_features))
    return (mean + rng.normal(size=(num_samples, num_features)) @ mixing).astype(np.float32)


def gaussian(mean, deviations):
    covariance = np.diag(np.square(deviations))
    return FeatureStatistics.from_mean_and_covariance(None, np.array(mean), covariance)


@pytest.mark.parametrize("batches", [[1300], [1] * 1300, [33, 1, 1266], [0, 650, 0, 650]])
def test_streamed_statistics_equal_numpy(batches):
    """float64 rounding: 1e-12 of values, though the mean is 1000 times the deviation."""
    x = features(1300)
    statistics = FeatureStatistics.empty(6)
    for batch in np.split(x, np.cumsum(batches)[:-1]):
        statistics = statistics.update(batch)
    wide = x.astype(np.float64)
    assert statistics.count == 1300
    np.testing.assert_allclose(statistics.mean, wide.mean(0), rtol=1e-12)
    expected = np.cov(wide.T)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=0, atol=1e-12 * expected.max())
    np.testing.assert_array_equal(statistics.scatter, statistics.scatter.T)


def test_merging_in_another_order_is_the_same():
    parts = [FeatureStatistics.of(features(n, seed=n)) for n in (3, 50, 7)]
    kept = parts[0].scatter.copy()
    a = parts[0].merge(parts[1]).merge(parts[2])
    b = parts[2].merge(parts[0].merge(parts[1]))
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-11)
    np.testing.assert_array_equal(parts[0].scatter, kept)


def test_updating_changes_no_earlier_statistics():
    before = FeatureStatistics.of(features(5))
    kept = before.scatter.copy()
    before.update(features(5, seed=1))
    np.testing.assert_array_equal(before.scatter, kept)


def test_ten_thousand_samples_stream_in_little_memory():
    """Of Inception's 2048 features: below 200 MB beyond the batch, merging two parts too."""
    batch = np.random.default_rng(0).standard_normal((5000, 2048), np.float32)
    statistics = FeatureStatistics.empty(2048)
    tracemalloc.start()
    try:
        statistics = statistics.update(batch)
        statistics = statistics.merge(FeatureStatistics.of(batch))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert statistics.count == 10_000
    assert peak < 200e6
    np.testing.assert_allclose(statistics.mean, batch.mean(0, np.float64), rtol=0, atol=1e-12)
    squares = 2 * (batch[:, :2].astype(np.float64) - statistics.mean[:2]) ** 2
    np.testing.assert_allclose(np.diag(statistics.scatter)[:2], squares.sum(0), rtol=1e-11)


@pytest.mark.parametrize("count", [20, None])
def test_statistics_are_saved_and_damage_is_refused(tmp_path, count):
    whole = FeatureStatistics.of(features(20))
    statistics = FeatureStatistics.from_mean_and_covariance(count, whole.mean, whole.covariance)
    statistics.save(tmp_path / "real.npz")
    again = FeatureStatistics.load(tmp_path / "real.npz")
    assert again.count == count
    np.testing.assert_array_equal(again.mean, whole.mean)
    np.testing.assert_allclose(again.covariance, whole.covariance, rtol=1e-15)
    assert [p.name for p in tmp_path.iterdir()] == ["real.npz"]
    (tmp_path / "real.npz").write_bytes(b"PK")
    for name in ("real.npz", "missing.npz"):
        with pytest.raises(UserError, match=f"{name} is no file of feature statistics"):
            FeatureStatistics.load(tmp_path / name)


def test_statistics_refuse_what_does_not_fit():
    statistics = FeatureStatistics.of(features(20))
    given = FeatureStatistics.from_mean_and_covariance
    of_unknown = given(None, statistics.mean, statistics.covariance)
    for merge in (
        lambda: statistics.merge(of_unknown),
        lambda: of_unknown.merge(statistics),
        lambda: of_unknown.update(features(2)),
    ):
        with pytest.raises(UserError, match="unknown number of samples can't be merged"):
            merge()
    with pytest.raises(UserError, match="of 6 and 5 features can't be merged"):
        statistics.merge(FeatureStatistics.empty(5))
    for bad in (features(2, 5), features(2)[0]):
        with pytest.raises(UserError, match="don't fit statistics of 6 features"):
            statistics.update(bad)
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        _ = FeatureStatistics.of(features(1)).covariance
    with pytest.raises(UserError, match=r"shape \(6,\) and a covariance of shape \(6,\)"):
        given(None, statistics.mean, statistics.mean)
    with pytest.raises(UserError, match="not of 1"):
        given(1, statistics.mean, statistics.covariance)


def adm_inception_score(logits, split_size):
    """As ADM's evaluation: softmax and means in float32, log p of an explicit softmax."""
    probabilities = scipy.special.softmax(logits, axis=1).astype(np.float32)
    scores = []
    for start in range(0, len(logits), split_size):
        part = probabilities[start : start + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return scores


@pytest.mark.parametrize(("num_samples", "split_size"), [(600, 200), (500, 200), (90, 200)])
def test_inception_score_is_that_of_adms_splits(num_samples, split_size):
    """1e-6: theirs is in float32. The samples are sorted, so that shuffling would be seen."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(num_samples, 50)).astype(np.float32)
    logits[np.arange(num_samples), np.arange(num_samples) * 50 // num_samples] += 6
    expected = adm_inception_score(logits, split_size)
    found = inception_score(logits, split_size)
    np.testing.assert_allclose(found.mean, np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(found.std, np.std(expected), rtol=1e-5, atol=1e-6)
    assert found.split_size == split_size


def test_inception_score_at_its_ends():
    """Sure and all different: the number of classes; all the same: 1. No log of 0."""
    np.testing.assert_allclose(inception_score(np.eye(7, 9) * 1e4).mean, 7, rtol=1e-12)
    np.testing.assert_allclose(inception_score(np.ones((8, 9)) * 1e4).mean, 1, rtol=1e-12)
    assert inception_score(np.ones((1, 1008))).split_size == 5000
    for logits, split_size, words in (
        (np.ones((0, 9)), 5, "got 0"),
        (np.full((2, 9), np.nan), 5, "not finite"),
        (np.full((2, 9), np.inf), 5, "not finite"),
        (np.ones((2, 9)), 0, "split_size=0"),
    ):
        with pytest.raises(UserError, match=words):
            inception_score(logits, split_size)


def plain_kernel_distance(a, b):
    def mean(x, y, is_same):
        kernels = [
            (float(np.dot(x[i], y[j])) / len(x[0]) + 1) ** 3
            for i in range(len(x))
            for j in range(len(y))
            if not (is_same and i == j)
        ]
        return np.mean(kernels)

    a, b = a.astype(np.float64), b.astype(np.float64)
    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


@pytest.mark.parametrize("rows", [10_000, 7])
def test_kernel_distance_equals_a_plain_loop(rows, monkeypatch):
    monkeypatch.setattr("cfjax.evaluation.kernel_distance._ROWS", rows)
    a, b = features(30, mean=0), features(21, seed=1, mean=0.3)
    np.testing.assert_allclose(kernel_distance(a, b), plain_kernel_distance(a, b), rtol=1e-12)


def test_kernel_distance_of_subsets():
    a, b = features(300, mean=0), features(250, seed=1, mean=0.3)
    whole = kernel_distance(a, b)
    mean, std = kernel_distance_of_subsets(a, b, num_subsets=60, subset_size=100)
    assert 0 < abs(mean - whole) < 4 * std / np.sqrt(60)
    assert (mean, std) == kernel_distance_of_subsets(a, b, 60, 100, seed=0)
    assert (mean, std) != kernel_distance_of_subsets(a, b, 60, 100, seed=1)
    np.testing.assert_allclose(  # all of both: only the order is drawn
        kernel_distance_of_subsets(a[:250], b, 2, 250), (kernel_distance(a[:250], b), 0), atol=1e-9
    )
    for arguments, words in (
        ((a, b, 5, 251), "sets of 300 and 250 samples are too small: 251"),
        ((a, b, 0, 100), "num_subsets=0"),
        ((a, b, 1, 1), "subset_size=1"),
        ((a, b[:, :5], 1, 9), "sizes 6 and 5"),
    ):
        with pytest.raises(UserError, match=words):
            kernel_distance_of_subsets(*arguments)
    with pytest.raises(UserError, match="sets of 1 and 250 samples"):
        kernel_distance(a[:1], b)


def test_bootstrap_intervals():
    """Against resampling of the rows themselves; the distance of all lies near the interval."""
    reference = FeatureStatistics.of(features(4000, mean=0))
    x = features(2000, mean=0.5).reshape(20, 100, 6)
    blocks = [FeatureStatistics.of(block) for block in x]
    low, high = bootstrap_interval(blocks, reference, 50, seed=3, level=0.8)
    draws = np.random.default_rng(3).integers(20, size=(50, 20))
    distances = [
        frechet_distance(FeatureStatistics.of(x[np.sort(draw)].reshape(-1, 6)), reference)
        for draw in draws
    ]
    np.testing.assert_allclose((low, high), np.quantile(distances, [0.1, 0.9]), rtol=1e-9)
    assert low < high
    wide = bootstrap_interval(blocks, reference, 50, seed=3)
    assert wide[0] < low and high < wide[1]
    for arguments, words in (
        ((blocks[:1], reference, 5, 0), "over 1 blocks"),
        ((blocks, reference, 0, 0), "num_resamples=0"),
        ((blocks, reference, 5, 0, 95), "level=95"),
    ):
        with pytest.raises(UserError, match=words):
            bootstrap_interval(*arguments)


def test_extrapolation_takes_the_bias_away():
    """Samples of the reference's own Gaussian, whose distance at infinitely many is 0."""
    rng = np.random.default_rng(0)
    reference = gaussian(np.zeros(20), np.ones(20))
    x = rng.normal(size=(3000, 20))
    biased = frechet_distance(FeatureStatistics.of(x), reference)
    found = extrapolate_fid(x, reference, num_points=10, smallest=300)
    assert abs(found) < biased / 4
    assert found == extrapolate_fid(x, reference, 10, 300, seed=0)
    assert found != extrapolate_fid(x, reference, 10, 300, seed=1)
    first = x[np.random.default_rng(5).permutation(3000)[:300]]
    few, many = (frechet_distance(FeatureStatistics.of(y), reference) for y in (first, x))
    expected = many - (few - many) / (1 / 300 - 1 / 3000) / 3000  # the line through two points
    np.testing.assert_allclose(extrapolate_fid(x, reference, 2, 300, seed=5), expected, rtol=1e-6)
    for arguments, words in (
        ((x, reference), "smallest=5000"),
        ((x, reference, 1), "num_points=1"),
    ):
        with pytest.raises(UserError, match=words):
            extrapolate_fid(*arguments)
