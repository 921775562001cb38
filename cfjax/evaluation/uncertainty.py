"""How far a Fréchet distance can be trusted: its confidence interval, and its value at infinite N."""

from collections.abc import Sequence

import numpy as np

from cfjax.errors import UserError
from cfjax.evaluation.frechet import frechet_distance_to
from cfjax.evaluation.statistics import FeatureStatistics

FEWEST_OF_LINE = 5000  # samples at which the line of FID∞ begins


def bootstrap_interval(
    block_statistics: Sequence[FeatureStatistics],
    reference: FeatureStatistics,
    num_resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the Fréchet distance under resampling of blocks (Efron 1979).

    Each resample draws as many blocks as there are, with replacement. It has fewer different samples
    than the set, so it lies a little too high, as the distance of fewer samples does.

    Args:
      block_statistics: of blocks of samples, all about as large; they stay in memory.
      reference: statistics of the real images.
      num_resamples: each takes a Fréchet distance.
      seed: of the draws.
      level: share of the resamples within the interval.

    Returns:
      `(low, high)`.

    Raises:
      UserError: there are fewer than two blocks or no resamples, or `level` is not within 0 and 1;
        else as `frechet_distance`.
    """
    num_blocks = len(block_statistics)
    if num_blocks < 2:
        raise UserError(f"a bootstrap over {num_blocks} blocks tells nothing; make 2 or more.")
    if num_resamples < 1:
        raise UserError(f"num_resamples={num_resamples} gives no interval; give 1 or more.")
    if not 0 < level < 1:
        raise UserError(f"level={level} is no share; give one between 0 and 1, such as 0.95.")
    distance = frechet_distance_to(reference)
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(num_resamples):
        times_drawn = np.bincount(rng.integers(num_blocks, size=num_blocks), minlength=num_blocks)
        distances.append(distance(_repeated(block_statistics, times_drawn)))
    low, high = np.quantile(distances, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _repeated(blocks: Sequence[FeatureStatistics], times: np.ndarray) -> FeatureStatistics:
    """Of all samples of the blocks, each so many times."""
    merged = FeatureStatistics.empty(len(blocks[0].mean))
    for block, number in zip(blocks, times.tolist(), strict=True):
        if number:
            merged = merged.merge(
                FeatureStatistics(number * block.count, block.mean, number * block.scatter)
            )
    return merged


def extrapolate_fid(
    features: np.ndarray,
    reference: FeatureStatistics,
    num_points: int = 15,
    smallest: int = FEWEST_OF_LINE,
    seed: int = 0,
) -> float:
    """FID∞: where the line through the distances of N samples over 1/N meets 0.

    Chong and Forsyth 2020, section 3: the bias of the distance is linear in 1/N. For each N, evenly
    spaced from `smallest` to all, N samples are drawn without replacement; the line is that of least
    squares.

    Args:
      features: `[N, F]`.
      reference: statistics of the real images.
      num_points: numbers N; each takes a Fréchet distance.
      smallest: the fewest samples; more than F, else the line is none.
      seed: of the draws.

    Raises:
      UserError: fewer than two points, or `smallest` is not between 2 and the number of samples;
        else as `frechet_distance`.
    """
    if num_points < 2:
        raise UserError(f"num_points={num_points} make no line; give 2 or more.")
    if not 2 <= smallest < len(features):
        raise UserError(
            f"smallest={smallest} must be at least 2 and below the number of samples,"
            f" {len(features)}; score more samples or lower it."
        )
    distance = frechet_distance_to(reference)
    rng = np.random.default_rng(seed)
    counts = np.linspace(smallest, len(features), num_points).astype(int)
    distances = [
        distance(FeatureStatistics.of(features[rng.permutation(len(features))[:count]]))
        for count in counts
    ]
    line = np.polynomial.Polynomial.fit(1.0 / counts, distances, 1)
    return float(line(0.0))
