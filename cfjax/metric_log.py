"""Metrics of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard events.

After a resume the log reads as if the run had never stopped.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from tensorboardX import summary

from cfjax.errors import UserError
from cfjax.metric_files import EventFile, GrowingFile
from cfjax.paths import absolute

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricLog:
    """Writes scalars and images; only process 0 writes, the others' calls do nothing.

    A context manager. In cloud storage the log is at most a minute behind. All methods raise a
    `UserError` when the log can't be written.
    """

    def __init__(self, workdir: str | PathLike, start_train_step: int = 0):
        """Opens the log of a run that goes on after `start_train_step`, 0 for a new one.

        What was logged after that train step, or half a line that a killed process left, is
        removed.
        """
        self._lines = None
        if jax.process_index() != 0:
            return
        self._workdir = absolute(workdir)
        with self._reporting_failure():
            self._workdir.mkdir(parents=True, exist_ok=True)
            path = self._workdir / METRICS_FILE
            kept = _lines_until(path, start_train_step)
            self._lines = GrowingFile(path, kept.encode())
            self._events = EventFile(self._workdir / TENSORBOARD_FOLDER, start_train_step)

    def write(self, train_step: int, scalars: Mapping[str, Any]) -> None:
        """Logs scalars of a train step: numbers or arrays of one element.

        A value that is not finite is stored as null.
        """
        if self._lines is None:
            return
        values = {name: float(value) for name, value in jax.device_get(dict(scalars)).items()}
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._reporting_failure():
            text = json.dumps({"train_step": train_step} | line) + "\n"
            self._lines.append(text.encode())
            tags = [summary.scalar(name, value).value[0] for name, value in values.items()]
            self._events.add(train_step, summary=summary.Summary(value=tags))

    def image(self, train_step: int, name: str, image: np.ndarray) -> None:
        """Shows an image, uint8 `[height, width, 1 or 3]`, in TensorBoard."""
        if self._lines is not None:
            with self._reporting_failure():
                shown = summary.image(name, np.asarray(image), dataformats="HWC")
                self._events.add(train_step, summary=shown)

    def flush(self) -> None:
        """Returns when all that was logged is in the files; before a checkpoint that counts on it."""
        if self._lines is not None:
            with self._reporting_failure():
                self._lines.flush()
                self._events.flush()

    def close(self) -> None:
        """Flushes and closes both logs."""
        if self._lines is not None:
            lines, self._lines = self._lines, None
            with self._reporting_failure():
                lines.close()
                self._events.close()

    @contextlib.contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the metrics of {self._workdir} could not be written"
                f" ({error.strerror or error}); give the folder space and write permission and run"
                " again."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | PathLike) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, or of the one in a workdir, in the order of writing.

    Each is `{"train_step": int, name: float, ...}`; null reads as NaN. A half-written last line is
    passed over.

    Raises:
      UserError: there is no such file, or a line in it is not JSON.
    """
    path = absolute(path)
    path = path / METRICS_FILE if path.is_dir() else path
    return [
        {name: math.nan if value is None else value for name, value in fields.items()}
        for _, fields in _whole_lines(path)
    ]


def _whole_lines(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line with what it says."""
    try:
        *lines, _ = path.read_text().split("\n")
    except OSError as error:
        raise UserError(f"cannot read the metrics {path}: {error.strerror or error}.") from error
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append((line, json.loads(line)))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is not JSON; remove that line.") from error
    return parsed


def _lines_until(path: epath.Path, train_step: int) -> str:
    """The whole lines up to a train step; none for train step 0."""
    if train_step == 0 or not path.exists():
        return ""
    kept = [line for line, said in _whole_lines(path) if said["train_step"] <= train_step]
    return "".join(line + "\n" for line in kept)
