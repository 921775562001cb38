"""Noise schedules: betas, their cumulative products, respacing for few denoising steps.

Everything is computed in float64 NumPy once, and read as float32 constants inside jitted code.
"""

import dataclasses

import numpy as np

from cfjax.errors import UserError, check_choice

NOISE_SCHEDULES = ("linear", "cosine")
TIMESTEP_SPACINGS = ("linear", "quadratic", "karras", "logsnr")

# The exponent of the noise levels of EDM (Karras et al. 2022, eq. 5).
_KARRAS_RHO = 7.0


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete noise schedule of N timesteps; index i runs from 0 (least noise) to N - 1.

    Equal by content and hashable, so that equal schedules share one compilation as static
    arguments.

    Attributes:
      betas: float64 `[N]`, variance added at each timestep.
      timestep_map: int32 `[N]`, the training timestep t that the network is told at index i; the
        identity unless respaced.
    """

    betas: np.ndarray
    timestep_map: np.ndarray

    # By content, so that equal schedules share a compiled program.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @property
    def _content(self) -> tuple[bytes, bytes]:
        return self.betas.tobytes(), self.timestep_map.tobytes()

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ, float64 `[N]`: x_t = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) ε (DDPM eq. 4)."""
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """ᾱ of the next less noisy index, 1 at index 0."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def snr(self) -> np.ndarray:
        """Signal-to-noise ratio ᾱ / (1 - ᾱ), float64 `[N]`."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7), 0 at index 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Logarithm of `posterior_variance`, with entry 1 in the place of entry 0 (-inf)."""
        variance = _with_first_replaced(self.posterior_variance, self.posterior_variance)
        return np.log(np.maximum(variance, 1e-20))

    @property
    def fixed_large_variance(self) -> np.ndarray:
        """The betas as model variance, with the posterior's at index 0 (the published default)."""
        return _with_first_replaced(self.betas, self.posterior_variance)

    @property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        keep = 1.0 - self.alphas_cumprod_prev
        return keep * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)


def _with_first_replaced(values: np.ndarray, variance: np.ndarray) -> np.ndarray:
    # A schedule of one denoising step has no entry 1; its last step adds no noise anyway.
    second = variance[1] if len(variance) > 1 else values[0]
    return np.append(second, values[1:])


def make_noise_schedule(name: str, num_timesteps: int = 1000) -> NoiseSchedule:
    """A schedule of T timesteps.

    Args:
      name: "linear": betas from 1e-4 to 0.02, scaled by 1000 / T (DDPM); "cosine": squared-cosine ᾱ
        with offset 0.008 and betas of at most 0.999 (improved DDPM eq. 17).
      num_timesteps: T.

    Raises:
      UserError: unknown name, or T so small that a beta would leave (0, 1).
    """
    check_choice("noise schedule", name, NOISE_SCHEDULES)
    if num_timesteps < 1:
        raise UserError(f"num_timesteps is {num_timesteps}, but must be at least 1.")
    if name == "linear":
        scale = 1000 / num_timesteps
        betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
        if betas[-1] >= 1.0:
            raise UserError(
                f"num_timesteps is {num_timesteps}, but the linear noise schedule needs more than "
                "20; train with more timesteps and respace them for sampling."
            )
    else:
        edges = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        alphas_cumprod = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    return NoiseSchedule(betas, np.arange(num_timesteps, dtype=np.int32))


def respace(
    schedule: NoiseSchedule, respacing: str | int, spacing: str = "linear"
) -> NoiseSchedule:
    """The schedule seen at fewer timesteps, with the same ᾱ there (improved DDPM section 4).

    Args:
      schedule: a schedule of T timesteps.
      respacing: how many: "250", or with `spacing` "linear" also "ddim50" (a constant integer
        stride) or "10,15,20" (that many in each of three equal sections).
      spacing: where, always from 0 to T - 1: "linear": evenly in t; "quadratic": evenly in sqrt(t)
        (DDIM appendix D.2); "karras": evenly in σ^(1/7) of σ = sqrt((1 - ᾱ) / ᾱ) (EDM eq. 5);
        "logsnr": evenly in log SNR (DPM-Solver section 3.4).

    Raises:
      UserError: unknown spacing, malformed text, or more timesteps asked for than there are.
    """
    check_choice("timestep spacing", spacing, TIMESTEP_SPACINGS)
    if spacing == "linear":
        timesteps = respaced_timesteps(schedule.num_timesteps, str(respacing))
    else:
        timesteps = _spaced_timesteps(schedule, str(respacing), spacing)
    kept = np.asarray(timesteps, np.int32)
    alphas_cumprod = schedule.alphas_cumprod[kept]
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return NoiseSchedule(betas, schedule.timestep_map[kept])


def _spaced_timesteps(schedule: NoiseSchedule, respacing: str, spacing: str) -> np.ndarray:
    if not respacing.isdecimal() or int(respacing) < 1:
        raise UserError(
            f"respacing {respacing!r} is not understood with {spacing} timestep spacing; write a "
            "number of denoising steps such as '50'."
        )
    count, num_timesteps = int(respacing), schedule.num_timesteps
    if count > num_timesteps:
        raise UserError(_too_many(respacing, count, num_timesteps))
    if count == 1:
        return np.zeros(1, np.int64)
    if spacing == "quadratic":
        nearest = np.rint(np.linspace(0.0, np.sqrt(num_timesteps - 1), count) ** 2)
    else:
        log_sigma = -0.5 * np.log(schedule.snr)
        if spacing == "karras":
            ends = np.exp(log_sigma[[0, -1]] / _KARRAS_RHO)
            wanted = _KARRAS_RHO * np.log(np.linspace(*ends, count))
        else:
            wanted = np.linspace(log_sigma[0], log_sigma[-1], count)
        nearest = np.searchsorted((log_sigma[1:] + log_sigma[:-1]) / 2, wanted)
    return _moved_apart(nearest.astype(np.int64), num_timesteps)


def _moved_apart(timesteps: np.ndarray, num_timesteps: int) -> np.ndarray:
    # Each at least one above the last, then as low as leaves room for those that follow.
    rank = np.arange(len(timesteps))
    distinct = np.maximum.accumulate(timesteps - rank) + rank
    return np.minimum(distinct, num_timesteps - len(timesteps) + rank)


def respaced_timesteps(num_timesteps: int, respacing: str) -> list[int]:
    """The kept timesteps of "linear" spacing, increasing; see `respace`."""
    malformed = UserError(
        f"respacing {respacing!r} is not understood; write a number of denoising steps such as "
        "'250', 'ddim50' for a constant stride, or sections such as '10,15,20'."
    )
    if respacing.startswith("ddim"):
        if not respacing[4:].isdigit() or int(respacing[4:]) == 0:
            raise malformed
        count = int(respacing[4:])
        if count > num_timesteps:
            raise UserError(_too_many(respacing, count, num_timesteps))
        for stride in range(1, num_timesteps + 1):
            kept = range(0, num_timesteps, stride)
            if len(kept) == count:
                return list(kept)
        raise UserError(
            f"respacing {respacing!r}: no integer stride keeps exactly {count} of {num_timesteps} "
            f"timesteps; use '{count}' for an uneven spacing."
        )
    try:
        counts = [int(count) for count in respacing.split(",")]
    except ValueError:
        raise malformed from None
    if min(counts) < 1:
        raise malformed
    size, rest = divmod(num_timesteps, len(counts))
    kept, begin = [], 0
    for section, count in enumerate(counts):
        length = size + (1 if section < rest else 0)
        if count > length:
            raise UserError(_too_many(respacing, count, length))
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        # A running sum rounded half to even, as the published code does, decides ties.
        for _ in range(count):
            kept.append(begin + round(position))
            position += stride
        begin += length
    return kept


def _too_many(respacing: str, count: int, available: int) -> str:
    return (
        f"respacing {respacing!r} asks for {count} of {available} timesteps; ask for at most "
        f"{available}."
    )
