"""Scores of samples from their features, block by block."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from cfjax.errors import UserError, check_choice
from cfjax.evaluation.extractors import Features
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.inception_score import inception_score
from cfjax.evaluation.kernel_distance import kernel_distance_of_subsets
from cfjax.evaluation.precision_recall import precision_recall
from cfjax.evaluation.references import Reference
from cfjax.evaluation.statistics import FeatureStatistics
from cfjax.evaluation.uncertainty import FEWEST_OF_LINE, bootstrap_interval, extrapolate_fid

METRICS = ("fid", "sfid", "is", "pr", "kid")
_BOOTSTRAP_BLOCKS = 20


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which scores, and what is not settled by their names.

    Attributes:
      metrics: of METRICS; "fid" always is made, and class agreement where there are classes.
      may_leave_out: a metric that the features or the reference don't allow is left out and named,
        rather than refused.
      pr_arithmetic: of precision and recall: "adm" (float16 in blocks, as there) or "float32".
      pr_neighbours: their k.
      is_split_size: images of a split of the Inception score.
      kid_subsets, kid_subset_size: of KID.
      bootstrap: resamples for the interval of the Fréchet distance; 0 for none.
      fid_infinity: extrapolate the Fréchet distance to infinitely many samples.
      seed: of KID's subsets, the bootstrap and the extrapolation.
    """

    metrics: tuple[str, ...] = ("fid",)
    may_leave_out: bool = False
    pr_arithmetic: str = "adm"
    pr_neighbours: int = 3
    is_split_size: int = 5000
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    bootstrap: int = 0
    fid_infinity: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in self.metrics:
            check_choice("metric", name, METRICS)
        check_choice("arithmetic", self.pr_arithmetic, ("adm", "float32"))

    def check_counts(self, num_samples: int, num_real: int | None) -> None:
        """Refuses what so few images do not allow, before any is made.

        Args:
          num_samples: N.
          num_real: images of the reference whose features are there; None if there are none.

        Raises:
          UserError: too few of either.
        """
        if self.fid_infinity and num_samples <= FEWEST_OF_LINE:
            raise UserError(
                f"--fid_infinity needs more than {FEWEST_OF_LINE} samples, got {num_samples}; score"
                " more."
            )
        if self.may_leave_out:
            return
        fewest = num_samples if num_real is None else min(num_samples, num_real)
        if "kid" in self.metrics and fewest < self.kid_subset_size:
            raise UserError(
                f"kid takes subsets of {self.kid_subset_size}, but there are {num_samples} samples and"
                f" {num_real} real images; score more or leave kid out."
            )
        if "pr" in self.metrics and fewest <= self.pr_neighbours:
            raise UserError(
                f"precision and recall need more than {self.pr_neighbours} images, but there are"
                f" {num_samples} samples and {num_real} real ones; score more or leave pr out."
            )


@dataclasses.dataclass(frozen=True)
class Score:
    """One row of a report.

    Attributes:
      name: what was scored, such as "S = 7".
      num_samples: N; None of statistics that do not say.
      values: by name: "fid" (the Fréchet distance to the reference), "fid_low" and "fid_high" (95%
        of its bootstrap), "fid_infinity", "sfid", "inception_score" and its standard deviation
        "inception_score_std" over splits, "precision", "recall", "kid" and "kid_std" over subsets,
        "class_agreement" (share of samples that the classifier gives their class).
      left_out: why a score is not there, by name of METRICS.
    """

    name: str
    num_samples: int | None
    values: dict[str, float]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)


def score(
    name: str,
    blocks: Iterable[Features],
    labels: np.ndarray | None,
    reference: Reference,
    protocol: Protocol,
) -> Score:
    """Scores samples; spatial features are not kept, of the others what the metrics need.

    Args:
      name: see `Score`.
      blocks: features of the samples, in order.
      labels: int `[N]`, the classes that they were made for, or None.
      reference: the real images, in the same features.
      protocol: what to score.

    Raises:
      UserError: a metric is asked for that the features or the reference don't allow, or there are
        too few samples for it.
    """
    made = _Collected(reference, protocol)
    for block in blocks:
        made.add(block)
    if made.statistics is None:
        raise UserError(f"{name} has no samples; score at least 2.")
    pool = np.concatenate(made.pool) if made.pool else None
    values = {"fid": frechet_distance(made.statistics, reference.pool)}
    if protocol.bootstrap:
        parts = np.array_split(pool, min(_BOOTSTRAP_BLOCKS, len(pool)))
        values["fid_low"], values["fid_high"] = bootstrap_interval(
            [FeatureStatistics.of(part) for part in parts],
            reference.pool,
            protocol.bootstrap,
            protocol.seed,
        )
    if protocol.fid_infinity:
        values["fid_infinity"] = extrapolate_fid(pool, reference.pool, seed=protocol.seed)
    if "sfid" in made.metrics:
        values["sfid"] = frechet_distance(made.spatial, reference.spatial)
    if "is" in made.metrics:
        found = inception_score(np.concatenate(made.logits), protocol.is_split_size)
        values["inception_score"], values["inception_score_std"] = found.mean, found.std
    fewest = min(made.statistics.count, len(reference.features)) if "pr" in made.metrics else 0
    if "pr" in made.metrics and fewest <= protocol.pr_neighbours:
        made.left_out["pr"] = f"that takes more than {protocol.pr_neighbours} images"
    elif "pr" in made.metrics:
        found = precision_recall(
            reference.features,
            pool,
            protocol.pr_neighbours,
            protocol.pr_arithmetic,
        )
        values["precision"], values["recall"] = found.precision, found.recall
    if "kid" in made.metrics:
        values["kid"], values["kid_std"] = kernel_distance_of_subsets(
            reference.features,
            pool,
            protocol.kid_subsets,
            protocol.kid_subset_size,
            protocol.seed,
        )
    if labels is not None and made.classes:
        values["class_agreement"] = float(np.mean(np.concatenate(made.classes) == labels))
    return Score(name, made.statistics.count, values, made.left_out)


class _Collected:
    """What the metrics need of the features, as they come."""

    def __init__(self, reference: Reference, protocol: Protocol):
        self.metrics = set(protocol.metrics)
        self.left_out: dict[str, str] = {}
        self.statistics = self.spatial = None
        self.pool, self.logits, self.classes = [], [], []
        self._block_statistics = []
        self._reference, self._protocol = reference, protocol

    def add(self, block: Features) -> None:
        if self.statistics is None:
            self._settle(block)
            self.statistics = FeatureStatistics.empty(block.pool.shape[1])
            if block.spatial is not None:
                self.spatial = FeatureStatistics.empty(block.spatial.shape[1])
        self.statistics = self.statistics.update(block.pool)
        if "sfid" in self.metrics:
            self.spatial = self.spatial.update(block.spatial)
        if "is" in self.metrics:
            self.logits.append(block.logits)
        if self.metrics & {"pr", "kid"} or self._protocol.bootstrap or self._protocol.fid_infinity:
            self.pool.append(block.pool)
        if block.classes is not None:
            self.classes.append(block.classes)

    def _settle(self, block: Features) -> None:
        """Which metrics can be had; what was asked for and can't is refused."""
        missing = {}
        if block.spatial is None:
            missing["sfid"] = "the extractor has no spatial features"
        elif self._reference.spatial is None:
            missing["sfid"] = "the reference has no mu_s and sigma_s"
        if block.logits is None:
            missing["is"] = "the extractor has no logits of Inception"
        if self._reference.features is None:
            missing["pr"] = missing["kid"] = "the reference has statistics alone, and no images"
        for name, reason in missing.items():
            if name in self.metrics and not self._protocol.may_leave_out:
                raise UserError(f"--metrics asks for {name}, but {reason}.")
            if name in self.metrics:
                self.left_out[name] = reason
        self.metrics -= set(missing)


def score_statistics(
    name: str, samples: Reference, reference: Reference, protocol: Protocol
) -> Score:
    """Scores samples of which statistics alone are there: the two Fréchet distances.

    Raises:
      UserError: another metric is asked for.
    """
    left_out = {
        metric: f"{name} has statistics alone"
        for metric in protocol.metrics
        if metric not in ("fid", "sfid")
    }
    if "sfid" in protocol.metrics and None in (samples.spatial, reference.spatial):
        left_out["sfid"] = "one of the statistics has no mu_s and sigma_s"
    if left_out and not protocol.may_leave_out:
        metric, reason = next(iter(left_out.items()))
        raise UserError(f"--metrics asks for {metric}, but {reason}.")
    values = {"fid": frechet_distance(samples.pool, reference.pool)}
    if "sfid" in protocol.metrics and "sfid" not in left_out:
        values["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    return Score(name, samples.pool.count, values, left_out)
