"""The Fréchet distance of two Gaussians."""

import numpy as np

from cfjax.evaluation.statistics import FeatureStatistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^(1/2)), the distance of Heusel et al. 2017.

    The trace of the root is the sum of the singular values of Σa^(1/2) Σb^(1/2), with roots from
    symmetric eigen-decompositions: defined for singular covariances, real, and not negative but for
    rounding.

    Raises:
      UserError: a set has fewer than two samples.
    """
    difference = a.mean - b.mean
    covariances = (a.covariance, b.covariance)
    trace_of_root = np.linalg.svd(
        _square_root(covariances[0]) @ _square_root(covariances[1]), compute_uv=False
    ).sum()
    traces = sum(np.trace(covariance) for covariance in covariances)
    return float(difference @ difference + traces - 2.0 * trace_of_root)


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
