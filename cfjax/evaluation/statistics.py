"""Mean and covariance of features, streamed and merged in float64."""

import dataclasses
import io
import os
import zipfile
from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np

from cfjax.errors import UserError

_ROWS = 512  # of float64 features at a time
_UNKNOWN = -1  # a file's word for an unknown number of samples


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """What the Fréchet distance needs of a set of feature vectors; merging is exact to rounding.

    Attributes:
      count: N; None if it is unknown, as of published references: such can only be compared with.
      mean: float64 `[F]`.
      scatter: float64 `[F, F]`, the sum of (x - mean)(x - mean)^T; the covariance itself if the
        number of samples is unknown.
    """

    count: int | None
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, num_features: int) -> Self:
        """Of no features yet."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def of(cls, features: np.ndarray) -> Self:
        """Of features `[N, F]`."""
        return cls.empty(np.shape(features)[1]).update(features)

    @classmethod
    def from_mean_and_covariance(
        cls, count: int | None, mean: np.ndarray, covariance: np.ndarray
    ) -> Self:
        """Of what others have computed, such as `mu` and `sigma` of ADM's reference batches.

        Args:
          count: N, or None where the file doesn't tell.
          mean: `[F]`.
          covariance: `[F, F]`, divided by N - 1.

        Raises:
          UserError: the shapes don't fit each other, or `count` is below 2.
        """
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise UserError(
                f"a mean of shape {mean.shape} and a covariance of shape {covariance.shape} don't"
                " belong together; give [F] and [F, F]."
            )
        if count is None:
            return cls(None, mean, covariance)
        if count < 2:
            raise UserError(
                f"a covariance is of 2 samples or more, not of {count}; check the file."
            )
        return cls(count, mean, covariance * (count - 1))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Of both sets together (Chan, Golub and LeVeque 1979).

        Raises:
          UserError: the numbers of features differ, or a number of samples is unknown.
        """
        self._check_mergeable()
        other._check_mergeable()
        if self.mean.shape != other.mean.shape:
            raise UserError(
                f"statistics of {len(self.mean)} and {len(other.mean)} features can't be merged;"
                " take both from the same extractor."
            )
        return self._merged_into(self.scatter.copy(), other)

    def update(self, features: np.ndarray) -> "FeatureStatistics":
        """With a batch of features `[n, F]` more; it needs memory for `2 F^2` numbers besides.

        Raises:
          UserError: the number of features differs, or the number of samples is unknown.
        """
        self._check_mergeable()
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise UserError(
                f"features of shape {features.shape} don't fit statistics of"
                f" {len(self.mean)} features; take both from the same extractor."
            )
        if not len(features):
            return self
        statistics = dataclasses.replace(self, scatter=self.scatter.copy())
        for begin in range(0, len(features), _ROWS):
            block = _of_block(features[begin : begin + _ROWS])
            statistics = statistics._merged_into(statistics.scatter, block)
        return statistics

    def _merged_into(self, scatter: np.ndarray, other: "FeatureStatistics") -> "FeatureStatistics":
        """`merge`; `scatter`, which holds this one's, is changed to that of both."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        scatter += other.scatter
        scaled = difference * np.sqrt(self.count * other.count / count)
        for begin in range(0, len(scaled), _ROWS):  # the whole product is as large as the scatter
            rows = slice(begin, begin + _ROWS)
            scatter[rows] += np.outer(scaled[rows], scaled)
        return FeatureStatistics(count, self.mean + difference * (other.count / count), scatter)

    def _check_mergeable(self) -> None:
        if self.count is None:
            raise UserError(
                "statistics of an unknown number of samples can't be merged; compute them from the"
                " features."
            )

    @property
    def covariance(self) -> np.ndarray:
        """float64 `[F, F]`, divided by N - 1.

        Raises:
          UserError: there are fewer than two samples.
        """
        if self.count is None:
            return self.scatter
        if self.count < 2:
            raise UserError(
                f"a covariance needs at least 2 samples, got {self.count}; score more samples."
            )
        return self.scatter / (self.count - 1)

    def save(self, path: str | PathLike) -> None:
        """Writes a `.npz`, whole or not at all."""
        temporary = Path(f"{path}.tmp")
        count = _UNKNOWN if self.count is None else self.count
        with temporary.open("wb") as file:
            np.savez(file, count=count, mean=self.mean, scatter=self.scatter)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | PathLike) -> Self:
        """Reads what `save` wrote.

        Raises:
          UserError: it is missing or is not such a file.
        """
        try:
            with np.load(io.BytesIO(Path(path).read_bytes())) as arrays:
                count = int(arrays["count"])
                return cls(None if count == _UNKNOWN else count, arrays["mean"], arrays["scatter"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is no file of feature statistics ({error}); make it again."
            ) from error


def _of_block(features: np.ndarray) -> FeatureStatistics:
    """Of a few rows, in two passes: the first row stands in for the mean until that is known."""
    first = features[0].astype(np.float64)
    centered = features.astype(np.float64) - first
    shift = centered.mean(axis=0)
    centered -= shift
    return FeatureStatistics(len(features), first + shift, centered.T @ centered)
