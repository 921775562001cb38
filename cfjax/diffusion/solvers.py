"""Solvers: one denoising step from x_t to the next less noisy sample, as pure functions.

A solver gets the network's prediction, never the network.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.diffusion import process
from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.errors import UserError, check_choice

SOLVERS = ("ddpm", "ddim")
VARIANCES = ("fixed_large", "fixed_small")


@dataclasses.dataclass(frozen=True)
class Solver:
    """A denoising rule; `denoising_step` reads every field.

    Attributes:
      name: "ddpm" (ancestral, DDPM algorithm 2) or "ddim" (DDIM eq. 12).
      prediction_type: what the network predicts, "noise", "x_start" or "velocity".
      variance: of "ddpm": "fixed_large" (betas, the published default) or "fixed_small" (the
        posterior's).
      eta: of "ddim": share of ancestral noise, 0 for the deterministic sampler.
      clip_x_start: clip the predicted x_0 to [-1, 1], for models of pixels.
    """

    name: str = "ddpm"
    prediction_type: str = "noise"
    variance: str = "fixed_large"
    eta: float = 0.0
    clip_x_start: bool = False

    def __post_init__(self):
        check_choice("solver", self.name, SOLVERS)
        check_choice("prediction type", self.prediction_type, process.PREDICTION_TYPES)
        check_choice("variance", self.variance, VARIANCES)
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"eta is {self.eta}, but must be in [0, 1].")

    @property
    def needs_noise(self) -> bool:
        """Whether a denoising step adds noise."""
        return self.name == "ddpm" or self.eta > 0.0


def denoising_step(
    solver: Solver,
    schedule: NoiseSchedule,
    x_t: jax.Array,
    prediction: jax.Array,
    index: jax.Array,
    noise: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One denoising step.

    Args:
      solver: the rule (static).
      schedule: the respaced schedule.
      x_t: `[...]`, the sample at `index`.
      prediction: the network's output at x_t, same shape.
      index: int scalar (may be traced), counted down from N - 1 to 0.
      noise: standard normal of the same shape; None for a solver that needs none.

    Returns:
      (sample at index - 1, predicted x_0), both of the shape of x_t; at index 0 no noise is added.
    """
    x_start = process.predicted_x_start(schedule, solver.prediction_type, x_t, prediction, index)
    if solver.clip_x_start:
        x_start = jnp.clip(x_start, -1.0, 1.0)
    if solver.name == "ddpm":
        mean = process.posterior_mean(schedule, x_start, x_t, index)
        variance = (
            schedule.fixed_large_variance
            if solver.variance == "fixed_large"
            else np.exp(schedule.posterior_log_variance_clipped)
        )
        deviation = np.append(0.0, np.sqrt(variance)[1:])
        return mean + process.at(deviation, index, x_t.ndim) * noise, x_start
    return _ddim_step(solver.eta, schedule, x_t, x_start, index, noise), x_start


def _ddim_step(
    eta: float,
    schedule: NoiseSchedule,
    x_t: jax.Array,
    x_start: jax.Array,
    index: jax.Array,
    noise: jax.Array | None,
) -> jax.Array:
    previous = schedule.alphas_cumprod_prev
    deviation = eta * np.sqrt(schedule.posterior_variance)
    direction = np.sqrt(np.maximum(1.0 - previous - deviation**2, 0.0))
    epsilon = process.predicted_noise(schedule, x_t, x_start, index)
    x_prev = process.at(np.sqrt(previous), index, x_t.ndim) * x_start
    x_prev = x_prev + process.at(direction, index, x_t.ndim) * epsilon
    if eta > 0.0:
        x_prev = x_prev + process.at(deviation, index, x_t.ndim) * noise
    return x_prev
