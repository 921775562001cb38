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


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """What the Fréchet distance needs of a set of feature vectors; merging is exact to rounding.

    Attributes:
      count: N.
      mean: float64 `[F]`.
      scatter: float64 `[F, F]`, the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, num_features: int) -> Self:
        """Of no features yet."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def of(cls, features: np.ndarray) -> Self:
        """Of features `[N, F]`, N >= 1."""
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Of both sets together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    def update(self, features: np.ndarray) -> "FeatureStatistics":
        """With a batch of features `[n, F]` more."""
        return self.merge(FeatureStatistics.of(features)) if len(features) else self

    @property
    def covariance(self) -> np.ndarray:
        """float64 `[F, F]`, divided by N - 1.

        Raises:
          UserError: there are fewer than two samples.
        """
        if self.count < 2:
            raise UserError(
                f"a covariance needs at least 2 samples, got {self.count}; score more samples."
            )
        return self.scatter / (self.count - 1)

    def save(self, path: str | PathLike) -> None:
        """Writes a `.npz`, whole or not at all."""
        temporary = Path(f"{path}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, count=self.count, mean=self.mean, scatter=self.scatter)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | PathLike) -> Self:
        """Reads what `save` wrote.

        Raises:
          UserError: it is missing or is not such a file.
        """
        try:
            with np.load(io.BytesIO(Path(path).read_bytes())) as arrays:
                return cls(int(arrays["count"]), arrays["mean"], arrays["scatter"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is no file of feature statistics ({error}); make it again."
            ) from error
