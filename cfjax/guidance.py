"""Guidance: how far a prediction is moved away from a weaker one, along both axes.

prediction = weaker + scale (stronger - weaker). The weaker one is that of no class (classifier-free
guidance, arXiv 2207.12598), or of a weaker model (autoguidance, arXiv 2406.02507).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.errors import UserError, check_choice

GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly to guide, and where.

    Attributes:
      scale: 1 for none; the weaker prediction is then not computed.
      interval: guided where low <= t < high, in timesteps of training; elsewhere the weaker
        prediction is not computed (arXiv 2404.07724).
      schedule: over the AR position, by the share f of the tokens that are there when an AR step ends:
        "constant", "linear" (1 + (scale - 1) f, as MAR) or "cosine" (1 + (scale - 1)(1 - cos πf)/2).
      power: over the noise: scale - 1 is multiplied by (1 - t / T)^power; 0 for constant.
      num_timesteps: T, of training.
    """

    scale: float = 1.0
    interval: tuple[int, int] = (0, 1_000_000)
    schedule: str = "constant"
    power: float = 0.0
    num_timesteps: int = 1000

    def __post_init__(self):
        low, high = self.interval
        if not 0 <= low < high:
            raise UserError(
                f"guidance_interval is ({low}, {high}), but must be (low, high) with 0 <= low <"
                " high."
            )
        if not self.scale >= 1.0:
            raise UserError(
                f"guidance_scale is {self.scale:g}, but must be at least 1, which is none."
            )
        check_choice("guidance schedule", self.schedule, GUIDANCE_SCHEDULES)
        if not self.power >= 0.0:
            raise UserError(f"guidance_power is {self.power:g}, but must be at least 0.")

    def is_guided(self, timesteps: np.ndarray) -> np.ndarray:
        """Whether the weaker prediction is needed at timesteps of training; bool of their shape."""
        low, high = self.interval
        return (low <= timesteps) & (timesteps < high) & (self.scale > 1.0)

    def by_ar_step(self, split_sizes: Sequence[int], num_tokens: int) -> np.ndarray:
        """Factor of scale - 1 in each AR step, float64 `[S]`.

        Args:
          split_sizes: tokens of each AR step.
          num_tokens: L; tokens that the split leaves out are there before the first AR step.
        """
        there = num_tokens - sum(split_sizes) + np.cumsum(split_sizes)
        share = there / num_tokens
        if self.schedule == "constant":
            return np.ones(len(split_sizes))
        return share if self.schedule == "linear" else (1.0 - np.cos(np.pi * share)) / 2.0

    def by_timestep(self, schedule: NoiseSchedule) -> np.ndarray:
        """Factor of scale - 1 at each denoising step of a respaced schedule, float64 `[N]`."""
        return (1.0 - schedule.timestep_map / self.num_timesteps) ** self.power
