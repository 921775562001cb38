"""The report of an evaluation: scores with their protocol beside them."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.statistics import FeatureStatistics

FEW_SAMPLES = 2048
ScoredBatch = tuple[np.ndarray, np.ndarray, np.ndarray | None]
_FLOOR_SEED = 0


@dataclasses.dataclass(frozen=True)
class Score:
    """One row of a report.

    Attributes:
      name: what was scored, such as "S = 7".
      num_samples: N.
      fid: Fréchet distance to the reference.
      class_agreement: share of the samples that the classifier gives their class; None without
        classes.
    """

    name: str
    num_samples: int
    fid: float
    class_agreement: float | None


def score(name: str, batches: Iterable[ScoredBatch], reference: FeatureStatistics) -> Score:
    """Scores samples as they come; none are kept.

    Args:
      name: see `Score`.
      batches: of samples: features `[n, F]`, the classes `[n]` that the classifier gives them, and
        the labels `[n]` that they were made for, or None.
      reference: statistics of the real images.
    """
    statistics = FeatureStatistics.empty(len(reference.mean))
    num_agreeing = 0
    is_labelled = True
    for features, classes, labels in batches:
        statistics = statistics.update(features)
        is_labelled = is_labelled and labels is not None
        if is_labelled:
            num_agreeing += int(np.sum(classes == labels))
    agreement = num_agreeing / statistics.count if is_labelled else None
    return Score(name, statistics.count, frechet_distance(statistics, reference), agreement)


def floor_distance(features: np.ndarray) -> float:
    """Fréchet distance of two random halves of real images, `features [N, F]`.

    What a perfect generator would be charged for the finite number of samples alone; for N / 2
    samples against N / 2.
    """
    order = np.random.default_rng(_FLOOR_SEED).permutation(len(features))
    half = len(features) // 2
    halves = [FeatureStatistics.of(features[rows]) for rows in (order[:half], order[half:])]
    return frechet_distance(*halves)


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores of one reference and one feature extractor.

    Attributes:
      extractor: such as "mnist-classifier".
      scores: the rows.
      floor: from `floor_distance` on the reference.
      held_out_accuracy: of the classifier on real images: what class agreement can reach.
      num_features: F of the extractor.
      protocol: what the numbers depend on, by name.
    """

    extractor: str
    scores: list[Score]
    floor: float
    held_out_accuracy: float
    num_features: int
    protocol: dict[str, Any]

    def label(self, num_samples: int) -> str:
        """The name of the distance, with N and the extractor; it is never FID alone."""
        return f"FID-{num_samples} ({self.extractor})"

    def warnings(self) -> list[str]:
        """What a reader of the numbers must know: one sentence each."""
        fewest = min(row.num_samples for row in self.scores)
        sentences = []
        if fewest < FEW_SAMPLES:
            sentences.append(
                f"Fewer than {FEW_SAMPLES:,} samples bias the distance upwards: compare it with the"
                " same N alone."
            )
        if fewest <= self.num_features:
            sentences.append(
                f"{fewest} samples give {self.num_features} features a singular covariance: score"
                f" more than {self.num_features}."
            )
        return sentences

    def to_json(self) -> str:
        """Indented JSON."""
        rows = [
            {
                "name": row.name,
                self.label(row.num_samples): row.fid,
                "class_agreement": row.class_agreement,
            }
            for row in self.scores
        ]
        document = {
            "scores": rows,
            f"floor ({self.extractor})": self.floor,
            "held_out_accuracy": self.held_out_accuracy,
            "warnings": self.warnings(),
            "protocol": self.protocol,
        }
        return json.dumps(document, indent=2) + "\n"

    def table(self) -> str:
        """Lines for a person to read."""
        label = self.label(self.scores[0].num_samples)
        lines = [f"{'':>12}  {label}  class agreement"]
        for row in self.scores:
            agreement = "-" if row.class_agreement is None else f"{row.class_agreement:.1%}"
            lines.append(f"{row.name:>12}  {row.fid:{len(label)}.2f}  {agreement:>15}")
        lines.append(
            f"{'real images':>12}  {self.floor:{len(label)}.2f}  {self.held_out_accuracy:>15.1%}"
        )
        lines += [f"{name}: {value}" for name, value in self.protocol.items()]
        return "\n".join(lines + self.warnings())

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON, whole or not at all."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        os.replace(temporary, path)
