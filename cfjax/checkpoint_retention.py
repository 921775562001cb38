"""Which checkpoints stay: the last, every k-th train step's, and the best by a metric."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

from etils import epath

from cfjax.checkpoint_folders import CorruptCheckpoint, read_document, train_steps
from cfjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Retention:
    """What is never deleted.

    Attributes:
      keep_last: this many newest ones, at least 1.
      keep_every: those of train steps that this divides; 0 for none.
      best_metric: the one where this metric is lowest; "" for none.
    """

    keep_last: int
    keep_every: int = 0
    best_metric: str = ""

    def __post_init__(self):
        if self.keep_last < 1:
            raise UserError(f"at least 1 checkpoint must be kept, got keep_last={self.keep_last}.")
        if self.keep_every < 0:
            raise UserError(f"keep_every is {self.keep_every}, but must be at least 0.")

    def superfluous(self, train_steps: Sequence[int], best: int | None) -> list[int]:
        """Which of the ascending train steps may go, `best` being the best one."""
        return [
            train_step
            for train_step in train_steps[: -self.keep_last]
            if train_step != best and not (self.keep_every and train_step % self.keep_every == 0)
        ]


@dataclasses.dataclass(frozen=True)
class Best:
    """The checkpoint where a metric is lowest.

    Attributes:
      train_step: of the checkpoint; None as long as none has a value.
      value: of the metric.
    """

    train_step: int | None = None
    value: float = math.inf

    @classmethod
    def of_run(cls, directory: epath.Path, metric: str) -> Self:
        """The best of the checkpoints that are there; a damaged one is not."""
        best = cls()
        for train_step in train_steps(directory) if metric else ():
            try:
                saved = read_document(directory / str(train_step), "metadata").get("metric")
            except CorruptCheckpoint:
                continue
            if saved and saved["name"] == metric:
                best = best.against(train_step, saved["value"])
        return best

    def against(self, train_step: int, value: float | None) -> "Best":
        """The better of this one and another, which may have no value; of equals, this one."""
        return self if value is None or not value < self.value else Best(train_step, value)

    def document(self) -> dict[str, Any] | None:
        """As JSON."""
        return None if self.train_step is None else dataclasses.asdict(self)
