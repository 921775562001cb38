"""Metrics of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard events.

After a resume the log reads as if the run had never stopped.
"""

import json
import math
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter

from cfjax.errors import UserError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricLog:
    """Writes scalars and images; only process 0 writes, the others' calls do nothing.

    A context manager.
    """

    def __init__(self, workdir: str | PathLike, start_train_step: int = 0):
        """Opens the log of a run that goes on after `start_train_step`, 0 for a new one.

        What was logged after that train step, or half a line that a killed process left, is
        removed.
        """
        self._lines = None
        if jax.process_index() != 0:
            return
        path = Path(workdir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(path, start_train_step)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        # TensorBoard drops what earlier sessions logged from `purge_step` on.
        self._events = SummaryWriter(
            str(path.parent / TENSORBOARD_FOLDER),
            purge_step=start_train_step + 1 if start_train_step else 0,
            flush_secs=20,
            filename_suffix=f".after_{start_train_step}",  # the rest of the name is the second
        )

    def write(self, train_step: int, scalars: Mapping[str, Any]) -> None:
        """Logs scalars of a train step: numbers or arrays of one element.

        A line is in the file when this returns. A value that is not finite is stored as null.
        """
        if self._lines is None:
            return
        values = {name: float(value) for name, value in jax.device_get(dict(scalars)).items()}
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"train_step": train_step} | line) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, train_step)

    def image(self, train_step: int, name: str, image: np.ndarray) -> None:
        """Shows an image, uint8 `[height, width, 1 or 3]`, in TensorBoard."""
        if self._lines is not None:
            self._events.add_image(name, np.asarray(image), train_step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both logs."""
        if self._lines is not None:
            self._lines.close()
            self._events.close()
            self._lines = None

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
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    return [
        {name: math.nan if value is None else value for name, value in fields.items()}
        for _, fields in _whole_lines(path)
    ]


def _whole_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line with what it says."""
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the metrics {path}: {error.strerror}.") from error
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append((line, json.loads(line)))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is not JSON; remove that line.") from error
    return parsed


def _drop_after(path: Path, train_step: int) -> None:
    """Rewrites the file, in one move, with the whole lines up to a train step alone."""
    kept = []
    if train_step > 0 and path.exists():
        kept = [line for line, said in _whole_lines(path) if said["train_step"] <= train_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
