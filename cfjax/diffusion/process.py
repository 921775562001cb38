"""The diffusion process: add noise, convert between ε, x_0 and v, the posterior.

Timestep indices t are integers of any shape that, once trailing axes are added, broadcasts against
the data, so that an example, an AR step or a token may have its own.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.errors import check_choice

PREDICTION_TYPES = ("noise", "x_start", "velocity")


def at(values: np.ndarray, t: jax.Array, ndim: int) -> jax.Array:
    """Looks up a float64 table at `t` as float32, with trailing axes added up to `ndim` axes."""
    looked_up = jnp.asarray(values, jnp.float32)[t]
    return looked_up.reshape(looked_up.shape + (1,) * (ndim - looked_up.ndim))


def signal_and_noise_scale(
    schedule: NoiseSchedule, t: jax.Array, ndim: int
) -> tuple[jax.Array, jax.Array]:
    """sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), float32, with trailing axes added up to `ndim` axes."""
    alphas_cumprod = schedule.alphas_cumprod
    return at(np.sqrt(alphas_cumprod), t, ndim), at(np.sqrt(1.0 - alphas_cumprod), t, ndim)


def add_noise(
    schedule: NoiseSchedule, x_start: jax.Array, noise: jax.Array, t: jax.Array
) -> jax.Array:
    """x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (DDPM eq. 4); shapes of `x_start` and `noise`."""
    signal_scale, noise_scale = signal_and_noise_scale(schedule, t, noise.ndim)
    return signal_scale * x_start + noise_scale * noise


def prediction_target(
    schedule: NoiseSchedule,
    prediction_type: str,
    x_start: jax.Array,
    noise: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """What the network is trained to predict.

    "noise": ε; "x_start": x_0; "velocity": sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0 (progressive distillation).
    """
    check_choice("prediction type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "noise":
        return noise
    if prediction_type == "x_start":
        return jnp.broadcast_to(x_start, noise.shape)
    signal_scale, noise_scale = signal_and_noise_scale(schedule, t, noise.ndim)
    return signal_scale * noise - noise_scale * x_start


def x_start_coefficients(
    schedule: NoiseSchedule, prediction_type: str
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients a and b of x_0 = a x_t + b prediction at every timestep, float64 `[N]` each."""
    check_choice("prediction type", prediction_type, PREDICTION_TYPES)
    alphas_cumprod = schedule.alphas_cumprod
    if prediction_type == "x_start":
        return np.zeros_like(alphas_cumprod), np.ones_like(alphas_cumprod)
    if prediction_type == "noise":
        inverse = 1.0 / alphas_cumprod
        return np.sqrt(inverse), -np.sqrt(inverse - 1.0)
    return np.sqrt(alphas_cumprod), -np.sqrt(1.0 - alphas_cumprod)


def predicted_x_start(
    schedule: NoiseSchedule,
    prediction_type: str,
    x_t: jax.Array,
    prediction: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """x_0 implied by the network's prediction at x_t."""
    from_x_t, from_prediction = x_start_coefficients(schedule, prediction_type)
    if prediction_type == "x_start":
        return prediction
    return at(from_x_t, t, x_t.ndim) * x_t + at(from_prediction, t, x_t.ndim) * prediction


def predicted_noise(
    schedule: NoiseSchedule, x_t: jax.Array, x_start: jax.Array, t: jax.Array
) -> jax.Array:
    """ε implied by x_t and x_0."""
    signal_scale, noise_scale = signal_and_noise_scale(schedule, t, x_t.ndim)
    return (x_t - signal_scale * x_start) / noise_scale


def posterior_mean(
    schedule: NoiseSchedule, x_start: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
    coef1 = at(schedule.posterior_mean_coef1, t, x_t.ndim)
    coef2 = at(schedule.posterior_mean_coef2, t, x_t.ndim)
    return coef1 * x_start + coef2 * x_t
