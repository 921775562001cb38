"""What the denoising steps of every AR step read: coefficients, timesteps, guidance; NumPy tables.

A row for each different noise schedule; AR steps that share one share its row. Columns are indices
of denoising steps, counted down from N - 1 to 0; short rows are padded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.diffusion.solvers import Solver, StepCoefficients, step_coefficients
from cfjax.guidance import Guidance


class DenoisingTables(NamedTuple):
    """Tables of R rows and N columns.

    Attributes:
      row_of_ar_step: int `[S]`.
      coefficients: of the solver, float64 `[R, N]` each.
      timesteps: of training, int32 `[R, N]`.
      segments: int `[R, 4]`, falling from N to 0: denoising steps of indices below the first and not
        below the second are unguided, then guided, then unguided.
      guidance_scale: at the most.
      guidance_by_ar_step: factor of scale - 1, `[S]`.
      guidance_by_timestep: factor of scale - 1, `[R, N]`.
    """

    row_of_ar_step: np.ndarray
    coefficients: StepCoefficients
    timesteps: np.ndarray
    segments: np.ndarray
    guidance_scale: float
    guidance_by_ar_step: np.ndarray
    guidance_by_timestep: np.ndarray


def denoising_tables(
    split_sizes: Sequence[int],
    schedules: Sequence[NoiseSchedule],
    solver: Solver,
    guidance: Guidance,
    num_tokens: int,
) -> DenoisingTables:
    """The tables of a plan.

    Args:
      split_sizes: tokens of each AR step.
      schedules: respaced, of each AR step.
      solver: the denoising rule.
      guidance: how strongly to guide, and where.
      num_tokens: L.
    """
    distinct = list(dict.fromkeys(schedules))
    rows = {schedule: row for row, schedule in enumerate(distinct)}
    coefficients = [step_coefficients(solver, schedule) for schedule in distinct]
    return DenoisingTables(
        row_of_ar_step=np.array([rows[schedule] for schedule in schedules], np.int32),
        coefficients=StepCoefficients(*map(_stacked, zip(*coefficients, strict=True))),
        timesteps=_stacked([schedule.timestep_map for schedule in distinct]),
        segments=np.array([_segments(guidance, schedule) for schedule in distinct], np.int32),
        guidance_scale=guidance.scale,
        guidance_by_ar_step=guidance.by_ar_step(split_sizes, num_tokens),
        guidance_by_timestep=_stacked([guidance.by_timestep(schedule) for schedule in distinct]),
    )


def _segments(guidance: Guidance, schedule: NoiseSchedule) -> tuple[int, int, int, int]:
    guided = np.flatnonzero(guidance.is_guided(schedule.timestep_map))
    first, last = (guided[-1] + 1, guided[0]) if guided.size else (0, 0)
    return schedule.num_timesteps, int(first), int(last), 0


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])
