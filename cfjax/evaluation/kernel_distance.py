"""The kernel distance (KID on Inception's features) of two sets of features."""

import itertools

import numpy as np

from cfjax.errors import UserError

_ROWS = 2048  # of the kernel matrix at a time


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / F + 1)^3, in float64.

    Bińkowski et al. 2018, section 4 and equation 4: without the diagonal of the two sets' own
    kernels; it may be negative where the sets are alike.

    Args:
      a, b: features `[N, F]` and `[M, F]`; their numbers may differ.

    Raises:
      UserError: a set has fewer than two samples, or the numbers of features differ.
    """
    _check(a, b, 2)
    own = sum((_kernel_sum(x, x) - _diagonal_sum(x)) / (len(x) * (len(x) - 1)) for x in (a, b))
    return own - 2.0 * _kernel_sum(a, b) / (len(a) * len(b))


def kernel_distance_of_subsets(
    a: np.ndarray, b: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID as published: `kernel_distance` of random subsets, `(mean, standard deviation)` of them.

    Args:
      a, b: features `[N, F]` and `[M, F]`.
      num_subsets: pairs of subsets, each drawn anew.
      subset_size: samples in a subset, drawn without replacement.
      seed: of the draws.

    Raises:
      UserError: a set has fewer samples than a subset, that has fewer than two, there is no subset,
        or the numbers of features differ.
    """
    if num_subsets < 1 or subset_size < 2:
        raise UserError(
            f"num_subsets={num_subsets} of subset_size={subset_size} give no kernel distance; give"
            " at least 1 subset of at least 2 samples."
        )
    _check(a, b, subset_size)
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(num_subsets):
        rows = [rng.choice(len(x), subset_size, replace=False) for x in (a, b)]
        distances.append(kernel_distance(a[rows[0]], b[rows[1]]))
    return float(np.mean(distances)), float(np.std(distances))


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    starts = [range(0, len(x), _ROWS) for x in (a, b)]
    total = 0.0
    for begin_a, begin_b in itertools.product(*starts):
        block_a, block_b = a[begin_a : begin_a + _ROWS], b[begin_b : begin_b + _ROWS]
        kernel = block_a.astype(np.float64) @ block_b.astype(np.float64).T
        total += float(_polynomial(kernel, a.shape[1]).sum())
    return total


def _diagonal_sum(x: np.ndarray) -> float:
    squares = np.einsum("nf,nf->n", x, x, dtype=np.float64)
    return float(_polynomial(squares, x.shape[1]).sum())


def _polynomial(products: np.ndarray, num_features: int) -> np.ndarray:
    base = products / num_features + 1.0
    return base * base * base  # a general power takes far longer


def _check(a: np.ndarray, b: np.ndarray, fewest: int) -> None:
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"features of sizes {a.shape[1]} and {b.shape[1]} can't be compared; take both from the"
            " same extractor."
        )
    if min(len(a), len(b)) < fewest:
        raise UserError(
            f"sets of {len(a)} and {len(b)} samples are too small: {fewest} are needed; score more"
            " samples or make the subsets smaller."
        )
