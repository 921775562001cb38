"""The Fréchet distance of two Gaussians: FID on the official Inception's features, FD on others."""

from collections.abc import Callable

import numpy as np

from cfjax.errors import UserError
from cfjax.evaluation.statistics import FeatureStatistics

# More negative than that, relative to the largest, is no rounding, not even of float32 files.
_NEGATIVE_EIGENVALUE = 1e-5


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^(1/2)), the distance of Heusel et al. 2017, section 2.

    The trace of the root is the sum of the singular values of Fa^T Fb, where Σ = F F^T: real, and
    defined for singular covariances too, those of fewer samples than features. The distance is not
    clamped: of equal statistics it is 0 up to rounding, about 1e-13 of the trace of Σ, on either
    side.

    Raises:
      UserError: see `frechet_distance_to`.
    """
    return frechet_distance_to(b)(a)


def frechet_distance_to(reference: FeatureStatistics) -> Callable[[FeatureStatistics], float]:
    """`frechet_distance` to a reference that is factored once.

    Raises:
      UserError: here or in the function, if a set has fewer than two samples, statistics are not
        finite, a matrix is no covariance, or the numbers of features differ.
    """
    covariance = reference.covariance
    factor, trace = _factor(reference.mean, covariance), np.trace(covariance)

    def distance(statistics: FeatureStatistics) -> float:
        if statistics.mean.shape != reference.mean.shape:
            raise UserError(
                f"statistics of {len(statistics.mean)} features have no distance to a reference of"
                f" {len(reference.mean)}; take both from the same extractor."
            )
        covariance = statistics.covariance
        product = _factor(statistics.mean, covariance).T @ factor
        trace_of_root = np.linalg.svd(product, compute_uv=False).sum()
        difference = statistics.mean - reference.mean
        return float(difference @ difference + np.trace(covariance) + trace - 2.0 * trace_of_root)

    return distance


def _factor(mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """F `[F, rank]` with F F^T = covariance."""
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError("feature statistics are not finite; check the features or the file.")
    rounding = len(covariance) * np.finfo(np.float64).eps
    try:
        factor = np.linalg.cholesky(covariance)
        if np.diag(factor).min() ** 2 > rounding * np.diag(covariance).max():
            return factor
    except np.linalg.LinAlgError:  # singular up to rounding, or no covariance
        pass
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -_NEGATIVE_EIGENVALUE * abs(values[-1]):
        raise UserError(
            f"a covariance has the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}, but none is"
            " negative in any; make the statistics again."
        )
    # Eigenvalues of 0 come out as rounding on either side, whose roots would be 1e-7.
    kept = values > rounding * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
