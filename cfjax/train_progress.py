"""What a training run shows of itself: metrics, rate, time left, and a stop when it has failed."""

import collections
import math
import time

import jax
import optax
from absl import logging

from cfjax.errors import UserError, check_choice
from cfjax.metric_log import MetricLog
from cfjax.train_step import Totals


class TrainProgress:
    """Follows the train steps one behind, so that the device never waits for the log."""

    def __init__(
        self,
        log: MetricLog,
        learning_rate: optax.Schedule,
        *,
        first: int,
        last: int,
        log_every: int,
        batch_size: int,
        followed: str = "",
    ):
        """Starts the clock.

        Args:
          log: where metrics go.
          learning_rate: of the optimizer, by train steps taken before.
          first: train steps taken before this start.
          last: train steps of the whole run.
          log_every: train steps between lines.
          batch_size: examples of a train step.
          followed: metric whose mean `take_followed` returns; "" for none.
        """
        self._log = log
        self._learning_rate = learning_rate
        self._last = last
        self._log_every = log_every
        self._batch_size = batch_size
        self._followed = followed
        self._followed_sum, self._followed_count = 0.0, 0.0
        self._pending: tuple[int, Totals] | None = None
        self._sums: dict[str, float] = collections.defaultdict(float)
        self._counts: dict[str, float] = collections.defaultdict(float)
        self._logged_step, self._logged_time = first, time.monotonic()

    def add(self, train_step: int, totals: Totals) -> None:
        """Takes the metrics of a train step that was just dispatched.

        Raises:
          UserError: the train step before had a loss or gradient that is not finite, or the followed
            metric does not exist.
        """
        if self._followed:
            check_choice("train.keep_best_metric", self._followed, sorted(totals))
        before, self._pending = self._pending, (train_step, totals)
        if before is not None:
            self._read(*before)
        if train_step == self._last:
            self.check_finite()

    def check_finite(self) -> None:
        """Waits for the train steps taken so far.

        Raises:
          UserError: one of them had a loss or gradient that is not finite.
        """
        if self._pending is not None:
            before, self._pending = self._pending, None
            self._read(*before)

    def take_followed(self) -> float | None:
        """Mean of the followed metric since the last call; None if it had no finite value."""
        total, count = self._followed_sum, self._followed_count
        self._followed_sum, self._followed_count = 0.0, 0.0
        mean = total / count if count else math.nan
        return mean if math.isfinite(mean) else None

    def _read(self, train_step: int, totals: Totals) -> None:
        values = jax.device_get(totals)
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name][0]):
                self._stop(train_step, name, float(values[name][0]))
        for name, (total, count) in values.items():
            self._sums[name] += float(total)
            self._counts[name] += float(count)
        if self._followed:
            total, count = values[self._followed]
            self._followed_sum += float(total)
            self._followed_count += float(count)
        if train_step % self._log_every == 0 or train_step == self._last:
            self._write(train_step)

    def _stop(self, train_step: int, name: str, value: float) -> None:
        begin = (train_step - 1) * self._batch_size
        raise UserError(
            f"the {name.replace('_', ' ')} of train step {train_step} is {value} (examples {begin}"
            f" to {begin + self._batch_size - 1} of the data); the last checkpoint is intact, so run"
            " again with a lower optimizer.learning_rate or from there with another seed."
        )

    def _write(self, train_step: int) -> None:
        metrics = {name: self._sums[name] / count for name, count in self._counts.items() if count}
        now = time.monotonic()
        rate = (train_step - self._logged_step) / max(now - self._logged_time, 1e-9)
        metrics["learning_rate"] = float(self._learning_rate(train_step - 1))
        metrics["train_steps_per_second"] = rate
        metrics["images_per_second"] = rate * self._batch_size
        self._log.write(train_step, metrics)
        minutes, seconds = divmod(round((self._last - train_step) / rate), 60)
        logging.info(
            "train step %d/%d  loss %.4f  gradient norm %.3f  learning rate %.2e  "
            "%.2f train steps/s  %.0f images/s  %d:%02d left",
            train_step,
            self._last,
            metrics["loss"],
            metrics["gradient_norm"],
            metrics["learning_rate"],
            rate,
            metrics["images_per_second"],
            minutes,
            seconds,
        )
        self._sums.clear()
        self._counts.clear()
        self._logged_step, self._logged_time = train_step, now
