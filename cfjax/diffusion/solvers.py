"""Solvers: one denoising step from x_t to the next less noisy sample, as pure functions.

A solver gets the network's prediction, never the network. Every rule is a linear combination of
x_t, the predicted x_0, the x_0 predicted one denoising step before, and fresh noise: the rules
differ in the coefficients alone, which are computed once in float64.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.diffusion import process
from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.errors import UserError, check_choice

SOLVERS = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde")
VARIANCES = ("fixed_large", "fixed_small")


@dataclasses.dataclass(frozen=True)
class Solver:
    """A denoising rule; `step_coefficients` and `denoising_step` read every field.

    Attributes:
      name: "ddpm" (ancestral, DDPM algorithm 2), "ddim" (DDIM eq. 12), "dpmpp_2m" (DPM-Solver++
        algorithm 2, second order, deterministic) or "dpmpp_2m_sde" (its stochastic form).
      prediction_type: what the network predicts, "noise", "x_start" or "velocity".
      variance: of "ddpm": "fixed_large" (betas, the published default) or "fixed_small" (the
        posterior's).
      eta: of "ddim": share of ancestral noise in [0, 1], 0 for the deterministic sampler.
      clip_x_start: clip the predicted x_0 to [-1, 1], for models of pixels.
      dynamic_threshold: quantile in (0, 1) of |x_0| that the predicted x_0 of an example is clipped
        to and divided by where it is above 1 (Imagen section 2.3), 0 for none.
      temperature: multiplies the noise that a denoising step adds, 0 for a deterministic one.

    Raises:
      UserError: a value is unknown or out of its range, or belongs to another solver.
    """

    name: str = "ddpm"
    prediction_type: str = "noise"
    variance: str = "fixed_large"
    eta: float = 0.0
    clip_x_start: bool = False
    dynamic_threshold: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        check_choice("solver", self.name, SOLVERS)
        check_choice("prediction type", self.prediction_type, process.PREDICTION_TYPES)
        check_choice("variance", self.variance, VARIANCES)
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"eta is {self.eta}, but must be in [0, 1].")
        if self.eta > 0.0 and self.name != "ddim":
            raise UserError(
                f"eta is {self.eta}, but solver {self.name!r} has none; use solver 'ddim' or eta 0."
            )
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(
                f"temperature is {self.temperature}, but must be finite and at least 0."
            )
        if self.temperature != 1.0 and not self._is_stochastic:
            raise UserError(
                f"temperature is {self.temperature}, but solver {self.name!r} with eta {self.eta} "
                "adds no noise; use temperature 1 or a stochastic solver such as 'ddpm'."
            )
        if not 0.0 <= self.dynamic_threshold < 1.0:
            raise UserError(
                f"dynamic_threshold is {self.dynamic_threshold}, but must be a quantile in (0, 1), "
                "or 0 for none."
            )
        if self.clip_x_start and self.dynamic_threshold > 0.0:
            raise UserError(
                f"clip_x_start is True and dynamic_threshold is {self.dynamic_threshold}, but x_0 "
                "can be held in range in one way only; switch one of them off."
            )

    @property
    def _is_stochastic(self) -> bool:
        return self.name in ("ddpm", "dpmpp_2m_sde") or (self.name == "ddim" and self.eta > 0.0)

    @property
    def needs_noise(self) -> bool:
        """Whether a denoising step adds noise."""
        return self._is_stochastic and self.temperature > 0.0

    @property
    def is_multistep(self) -> bool:
        """Whether a denoising step reads the x_0 predicted one denoising step before."""
        return self.name in ("dpmpp_2m", "dpmpp_2m_sde")


class StepCoefficients(NamedTuple):
    """Coefficients of the denoising steps, `[N]` each, or scalars of one denoising step.

    Index i leaves noise level i, so that denoising counts down from N - 1 to 0. The predicted x_0
    is `x_start_from_x_t` x_t + `x_start_from_prediction` prediction, then clipped or thresholded;
    the next sample is `x_t` x_t + `x_start` x_0 + `previous_x_start` (x_0 predicted one denoising
    step before) + `noise` ε.
    """

    x_start_from_x_t: np.ndarray
    x_start_from_prediction: np.ndarray
    x_t: np.ndarray
    x_start: np.ndarray
    previous_x_start: np.ndarray
    noise: np.ndarray


def step_coefficients(solver: Solver, schedule: NoiseSchedule) -> StepCoefficients:
    """The solver's coefficients on a respaced schedule of N timesteps.

    Args:
      solver: the rule.
      schedule: respaced to the denoising steps.

    Returns:
      float64 NumPy arrays `[N]`. At index 0 every solver ends at the predicted x_0 itself, and at
      index N - 1 none reads an x_0 predicted before.
    """
    rule = {
        "ddpm": _ddpm_coefficients,
        "ddim": _ddim_coefficients,
        "dpmpp_2m": _dpmpp_2m_coefficients,
        "dpmpp_2m_sde": _dpmpp_2m_coefficients,
    }[solver.name]
    x_t, x_start, previous_x_start, noise = (
        np.append(at_index_0, values[1:])
        for at_index_0, values in zip((0.0, 1.0, 0.0, 0.0), rule(solver, schedule), strict=True)
    )
    return StepCoefficients(
        *process.x_start_coefficients(schedule, solver.prediction_type),
        x_t,
        x_start,
        previous_x_start,
        solver.temperature * noise,
    )


def denoising_step(
    solver: Solver,
    coefficients: StepCoefficients,
    x_t: jax.Array,
    prediction: jax.Array,
    previous_x_start: jax.Array | None,
    noise: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One denoising step, in the dtype of `x_t`.

    Args:
      solver: the rule (static).
      coefficients: scalars (may be traced), of one index of `step_coefficients`.
      x_t: `[batch, ...]`, the sample at that index.
      prediction: the network's output at x_t, same shape.
      previous_x_start: the x_0 that the denoising step before returned, same shape; anything finite
        at index N - 1; None for a solver that isn't `is_multistep`.
      noise: standard normal, same shape; None for a solver that isn't `needs_noise`.

    Returns:
      (next less noisy sample, predicted x_0), both of the shape of x_t; at index 0 the same but
      for the compiler's rounding.
    """
    x_t = jnp.asarray(x_t)

    def scaled(coefficient, values):
        return jnp.asarray(coefficient, x_t.dtype) * jnp.asarray(values, x_t.dtype)

    x_start = scaled(coefficients.x_start_from_x_t, x_t)
    x_start += scaled(coefficients.x_start_from_prediction, prediction)
    if solver.clip_x_start:
        x_start = jnp.clip(x_start, -1.0, 1.0)
    if solver.dynamic_threshold > 0.0:
        x_start = _dynamically_thresholded(x_start, solver.dynamic_threshold)
    sample = scaled(coefficients.x_t, x_t) + scaled(coefficients.x_start, x_start)
    if solver.is_multistep:
        sample += scaled(coefficients.previous_x_start, previous_x_start)
    if solver.needs_noise:
        sample += scaled(coefficients.noise, noise)
    return sample, x_start


def _dynamically_thresholded(x_start: jax.Array, quantile: float) -> jax.Array:
    magnitudes = jnp.abs(x_start).reshape(x_start.shape[0], -1)
    bound = jnp.maximum(jnp.quantile(magnitudes, quantile, axis=1), 1.0).astype(x_start.dtype)
    bound = bound.reshape((-1,) + (1,) * (x_start.ndim - 1))
    return jnp.clip(x_start, -bound, bound) / bound


# Of x_t, x_0, the x_0 before, and noise; what they say at index 0 isn't used.
_Coefficients = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _ddpm_coefficients(solver: Solver, schedule: NoiseSchedule) -> _Coefficients:
    if solver.variance == "fixed_large":
        variance = schedule.fixed_large_variance
    else:
        variance = np.exp(schedule.posterior_log_variance_clipped)
    return (
        schedule.posterior_mean_coef2,
        schedule.posterior_mean_coef1,
        np.zeros_like(variance),
        np.sqrt(variance),
    )


def _ddim_coefficients(solver: Solver, schedule: NoiseSchedule) -> _Coefficients:
    cleaner = schedule.alphas_cumprod_prev
    deviation = solver.eta * np.sqrt(schedule.posterior_variance)
    direction = np.sqrt(np.maximum(1.0 - cleaner - deviation**2, 0.0))
    # The direction multiplies ε = (x_t - sqrt(ᾱ) x_0) / sqrt(1 - ᾱ).
    x_t = direction / np.sqrt(1.0 - schedule.alphas_cumprod)
    x_start = np.sqrt(cleaner) - x_t * np.sqrt(schedule.alphas_cumprod)
    return x_t, x_start, np.zeros_like(x_t), deviation


def _dpmpp_2m_coefficients(solver: Solver, schedule: NoiseSchedule) -> _Coefficients:
    # Nothing is defined at index 0, which ends at σ = 0, so it repeats the levels of index 0.
    alphas_cumprod = schedule.alphas_cumprod
    cleaner = np.append(alphas_cumprod[0], alphas_cumprod[:-1])
    sigma, next_alpha, next_sigma = np.sqrt([1.0 - alphas_cumprod, cleaner, 1.0 - cleaner])
    log_alpha_over_sigma = 0.5 * np.log(schedule.snr)
    h = -np.diff(log_alpha_over_sigma, prepend=log_alpha_over_sigma[0])
    # The reverse SDE draws x_t to x_0 twice as fast as the ODE, and adds noise to make up for it.
    decay = 2.0 * h if solver.name == "dpmpp_2m_sde" else h
    x_t = next_sigma / sigma * np.exp(h - decay)
    data = -next_alpha * np.expm1(-decay)
    # D = x_0 + (x_0 - previous x_0) / (2 r), where r is the last h over this one; the first
    # denoising step, at N - 1, is of first order.
    extrapolation = np.append(0.5 * h[:-1] / h[1:], 0.0)
    noise = next_sigma * np.sqrt(-np.expm1(-2.0 * h))
    if solver.name == "dpmpp_2m":
        noise = np.zeros_like(noise)
    return x_t, data * (1.0 + extrapolation), -data * extrapolation, noise
