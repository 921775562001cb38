"""The evaluation suite's metrics against the field's packages, on the same features."""

import numpy as np
import pytest
import torchvision_stub

from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.inception_score import inception_score
from cfjax.evaluation.kernel_distance import kernel_distance, kernel_distance_of_subsets
from cfjax.evaluation.precision_recall import precision_recall
from cfjax.evaluation.statistics import FeatureStatistics

torch = pytest.importorskip("torch")


def import_oracle(name):
    with torchvision_stub.installed():
        return pytest.importorskip(name)


fid_score = import_oracle("pytorch_fid.fid_score")
clean_fid = import_oracle("cleanfid.fid")
torch_fidelity_isc, torch_fidelity_kid, torch_fidelity_prc, torch_fidelity_fid = (
    import_oracle(f"torch_fidelity.metric_{name}") for name in ("isc", "kid", "prc", "fid")
)
torchmetrics_fid = import_oracle("torchmetrics.image.fid")

pytestmark = pytest.mark.oracle


def features(num_samples, seed, num_features=64, mean=0.0):
    """Not negative and correlated, with a spectrum that falls, as Inception's pooled features."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(num_features, num_features))
    mixing *= np.arange(1, num_features + 1)[:, None] ** -0.5
    return np.maximum(rng.normal(size=(num_samples, num_features)) @ mixing + mean, 0).astype("f4")


SIZES = pytest.mark.parametrize("num_samples", [400, 40])  # 40: fewer than the 64 features


def moments(x):
    return x.mean(0, np.float64), np.cov(x.astype(np.float64), rowvar=False)


def assert_close(found, expected, rtol):
    np.testing.assert_allclose(found, expected, rtol=rtol)


@SIZES
@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
def test_fid_of_pytorch_fid_and_clean_fid(num_samples):
    """1e-9 of full rank; 1e-6 of singular covariances, whose sqrtm has errors of 1e-7."""
    a, b = features(num_samples, 1), features(500, 2, mean=0.3)
    found = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    rtol = 1e-9 if num_samples > 64 else 1e-6
    for oracle in (fid_score.calculate_frechet_distance, clean_fid.frechet_distance):
        assert_close(found, oracle(*moments(a), *moments(b)), rtol)


@SIZES
def test_fid_of_torch_fidelity(num_samples):
    """Eigenvalues of the product: as in `test_fid_of_pytorch_fid_and_clean_fid`."""
    a, b = features(num_samples, 1), features(500, 2, mean=0.3)
    moments_of = [
        torch_fidelity_fid.fid_features_to_statistics(torch.from_numpy(x).double()) for x in (a, b)
    ]
    expected = torch_fidelity_fid.fid_statistics_to_metric(*moments_of, verbose=False)
    found = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    rtol = 1e-9 if num_samples > 64 else 1e-6
    assert_close(found, expected["frechet_inception_distance"], rtol)


@SIZES
def test_fid_of_torchmetrics(num_samples):
    """In float64, in which the module sums squares and products without centring: 1e-6."""
    extractor = torch.nn.Identity()
    extractor.num_features = 64
    metric = torchmetrics_fid.FrechetInceptionDistance(feature=extractor)
    a, b = features(num_samples, 1), features(500, 2, mean=0.3)
    for x, is_real in ((a, False), (b, True)):
        for batch in torch.from_numpy(x).double().split(37):
            metric.update(batch, real=is_real)
    found = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    assert_close(found, metric.compute().item(), 1e-9 if num_samples > 64 else 1e-6)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_inception_score_of_torch_fidelity(num_splits):
    """1e-10: both in float64. Sorted by class, so that an order other than theirs is seen."""
    logits = np.random.default_rng(0).normal(size=(800, 1008)).astype(np.float32)
    logits[np.arange(800), np.arange(800)] += 7
    expected = torch_fidelity_isc.isc_features_to_metric(
        torch.from_numpy(logits), splits=num_splits, shuffle=False
    )
    found = inception_score(logits, split_size=800 // num_splits)
    assert_close(found.mean, expected["inception_score_mean"], 1e-10)
    np.testing.assert_allclose(found.std, expected["inception_score_std"], rtol=1e-7, atol=1e-10)
    assert found.mean > 5


def clusters(num_samples, seed, num_clusters):
    """Around ten corners, of which the first so many are drawn; distances far from each other."""
    corners = 3 * np.random.default_rng(0).normal(size=(10, 64))
    rng = np.random.default_rng(seed)
    widths = rng.uniform(0.3, 1.0, size=(num_samples, 1))
    x = corners[rng.integers(num_clusters, size=num_samples)]
    return (x + widths * rng.normal(size=(num_samples, 64))).astype(np.float32)


@pytest.mark.parametrize(
    ("sizes", "k", "block_size"),
    [
        ((300, 300), 3, 10_000),
        ((211, 500), 3, 10_000),
        ((700, 64), 3, 128),
        ((300, 300), 1, 128),
        ((211, 500), 5, 128),
    ],
)
def test_precision_and_recall_of_torch_fidelity(sizes, k, block_size):
    """Exactly: no distance is as near to a radius as float32 rounds."""
    reference, samples = clusters(sizes[0], 1, 10), clusters(sizes[1], 2, 7)
    generated, real = torch.from_numpy(samples), torch.from_numpy(reference)
    precision, recall = torch_fidelity_prc.calculate_precision_recall_full(generated, real, k)
    found = precision_recall(reference, samples, k, "float32", block_size)
    assert found.precision == pytest.approx(precision, abs=1e-7)  # theirs is a float32 mean
    assert found.recall == pytest.approx(recall, abs=1e-7)
    assert abs(found.precision - found.recall) > 0.03
    in_float16 = precision_recall(reference, samples, k, "adm", block_size)
    assert abs(in_float16.precision - found.precision) < 0.02
    assert abs(in_float16.recall - found.recall) < 0.02


def test_kernel_distance_of_clean_fid_and_torch_fidelity():
    """Subsets of all samples: 1e-9 in float64. Smaller: five standard errors."""
    a, b = (x.astype(np.float64) for x in (features(500, 1), features(500, 2, mean=0.1)))
    tensors = torch.from_numpy(a), torch.from_numpy(b)
    whole = kernel_distance(a, b)
    assert_close(whole, clean_fid.kernel_distance(a, b, num_subsets=1, max_subset_size=500), 1e-9)

    def of_torch_fidelity(num_subsets, subset_size):
        scores = torch_fidelity_kid.kid_features_to_metric(
            *tensors, kid_subsets=num_subsets, kid_subset_size=subset_size, verbose=False
        )
        return [scores[f"kernel_inception_distance_{name}"] for name in ("mean", "std")]

    assert_close(whole, of_torch_fidelity(1, 500)[0], 1e-9)
    mean, std = kernel_distance_of_subsets(a, b, num_subsets=60, subset_size=100)
    their_mean, their_std = of_torch_fidelity(60, 100)
    assert abs(mean - their_mean) < 5 * np.hypot(std, their_std) / np.sqrt(60)
    np.testing.assert_allclose(std, their_std, rtol=0.4)
    np.random.seed(0)  # from whose global stream it draws
    its_mean = clean_fid.kernel_distance(a, b, num_subsets=60, max_subset_size=100)
    assert abs(mean - its_mean) < 5 * std * np.sqrt(2 / 60)
