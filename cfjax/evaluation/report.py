"""The report of an evaluation: scores with their protocol beside them, as JSON, CSV and a table."""

import csv
import dataclasses
import io
import json
from os import PathLike
from typing import Any

import numpy as np

from cfjax.data.image_files import write_whole
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.scores import Score
from cfjax.evaluation.statistics import FeatureStatistics

FEW_SAMPLES = 2048
_FLOOR_SEED = 0
_PERCENT = ("precision", "recall", "class_agreement")
# Of a score's values, as a report names them; {N} is the number of samples.
_LABELS = {
    "fid": "FID-{N}",
    "fid_low": "FID-{N} 2.5%",
    "fid_high": "FID-{N} 97.5%",
    "fid_infinity": "FID-infinity",
    "sfid": "sFID-{N}",
    "inception_score": "IS",
    "inception_score_std": "IS std",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "kid_std": "KID std",
    "class_agreement": "class agreement",
}


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
      extractor: such as "mnist-classifier"; stands beside every score of its features unless it is
        "inception", the ADM suite's with weights that are known.
      scores: the rows.
      num_features: F of the extractor.
      protocol: what the numbers depend on, by name; lists are for the JSON alone.
      floor: from `floor_distance` on the reference; None if there are no features of it.
      held_out_accuracy: of the classifier on real images: what class agreement can reach; None
        without one.
      extractor_warning: a sentence that must stand beside every score, or "".
    """

    extractor: str
    scores: list[Score]
    num_features: int
    protocol: dict[str, Any]
    floor: float | None = None
    held_out_accuracy: float | None = None
    extractor_warning: str = ""

    def label(self, value: str, num_samples: int | None) -> str:
        """The name of a value of `Score.values`; a distance has its N, and is never FID alone."""
        label = _LABELS[value].format(N="unknown" if num_samples is None else num_samples)
        is_named = value != "class_agreement" and self.extractor != "inception"
        return f"{label} ({self.extractor})" if is_named else label

    def best(self) -> Score:
        """The row with the lowest distance."""
        return min(self.scores, key=lambda row: row.values["fid"])

    def warnings(self) -> list[str]:
        """What a reader of the numbers must know: one sentence each."""
        sentences = [self.extractor_warning] if self.extractor_warning else []
        counts = [row.num_samples for row in self.scores if row.num_samples is not None]
        if len(counts) < len(self.scores):
            sentences.append("The number of samples is unknown: distances of other numbers differ.")
        fewest = min(counts, default=FEW_SAMPLES)
        if fewest < FEW_SAMPLES:
            sentences.append(
                f"Fewer than {FEW_SAMPLES:,} samples bias the distance upwards: compare it with the"
                " same N alone."
            )
        if counts and fewest <= self.num_features:
            sentences.append(
                f"{fewest} samples give {self.num_features} features a singular covariance: score"
                f" more than {self.num_features}."
            )
        left_out = {name: why for row in self.scores for name, why in row.left_out.items()}
        sentences += [f"Not scored: {name}, as {why}." for name, why in left_out.items()]
        return sentences

    def to_json(self) -> str:
        """Indented JSON."""
        document = {
            "scores": [{"name": row.name, **self._named(row)} for row in self.scores],
            f"floor ({self.extractor})": self.floor,
            "held_out_accuracy": self.held_out_accuracy,
            "warnings": self.warnings(),
            "protocol": self.protocol,
        }
        if len(self.scores) > 1:
            document["best"] = self.best().name
        return json.dumps(document, indent=2) + "\n"

    def to_csv(self) -> str:
        """A line a row, with the names of the values above."""
        rows = [{"name": row.name, **self._named(row)} for row in self.scores]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def table(self) -> str:
        """Lines for a person to read."""
        names = [row.name for row in self.scores] + ["real images"]
        width = max(12, *map(len, names))
        values = [name for name in _LABELS if any(name in row.values for row in self.scores)]
        labels = [self.label(name, self.scores[0].num_samples) for name in values]
        lines = [f"{'':>{width}}  " + "  ".join(labels)]
        rows = [(row.name, row.values) for row in self.scores]
        if self.floor is not None or self.held_out_accuracy is not None:
            real = {"fid": self.floor, "class_agreement": self.held_out_accuracy}
            rows.append(("real images", real))
        for name, of_row in rows:
            cells = [
                f"{_shown(value, of_row.get(value)):>{len(label)}}"
                for value, label in zip(values, labels, strict=True)
            ]
            lines.append(f"{name:>{width}}  " + "  ".join(cells))
        lines += [
            f"{name}: {_listed(value)}"
            for name, value in self.protocol.items()
            if not isinstance(value, list)  # recipes are for machines
        ]
        return "\n".join(lines + self.warnings())

    def save(self, path: str | PathLike) -> None:
        """Writes the JSON, whole or not at all."""
        write_whole(path, lambda file: file.write(self.to_json().encode()))

    def save_csv(self, path: str | PathLike) -> None:
        """Writes the CSV, whole or not at all."""
        write_whole(path, lambda file: file.write(self.to_csv().encode()))

    def _named(self, row: Score) -> dict[str, float]:
        return {self.label(name, row.num_samples): value for name, value in row.values.items()}


def _shown(value: str, number: float | None) -> str:
    if number is None:
        return "-"
    if value in _PERCENT:
        return f"{number:.1%}"
    return f"{number:.5f}" if value.startswith("kid") else f"{number:.2f}"


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {it}" for name, it in value.items())
    return str(value)
