"""Generation (paper section 3.1): AR steps x denoising steps over a KV cache, in one jitted program.

Each AR step denoises its tokens from noise, given the condition tokens and the clean tokens of the
AR steps before, which the KV cache holds; then its own tokens are pushed into the cache.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.diffusion.solvers import Solver, denoising_step
from cfjax.errors import UserError, check_choice
from cfjax.factorization import TOKEN_ORDERS, check_split_sizes, token_order
from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.kv_cache import KVCache

# (AR step, index of the denoising step) -> noise [batch, tokens of the AR step, token_width]
NoiseAt = Callable[[int | jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: prediction = uncond + scale (cond - uncond).

    Attributes:
      scale: at most 1 for none; the unconditional half is then not computed.
      interval: guided where low <= t < high, in timesteps of training.
    """

    scale: float = 1.0
    interval: tuple[int, int] = (0, 1_000_000)

    def __post_init__(self):
        low, high = self.interval
        if not 0 <= low < high:
            raise UserError(
                f"guidance_interval is ({low}, {high}), but must be (low, high) with 0 <= low <"
                " high."
            )

    @property
    def is_used(self) -> bool:
        """Whether the unconditional half is needed."""
        return self.scale > 1.0


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """A place on the factorization plane and how to go there; hashable, static in `generate`.

    Attributes:
      split_sizes: tokens of each AR step; they sum to L.
      token_order: "random", "raster", "block_raster" or "dilated".
      block_size, dilation_stride: of the orders of these names, in tokens.
      solver: the denoising rule.
      guidance: classifier-free guidance.
    """

    split_sizes: tuple[int, ...]
    token_order: str = "random"
    block_size: int = 4
    dilation_stride: int = 2
    solver: Solver = dataclasses.field(default_factory=Solver)
    guidance: Guidance = dataclasses.field(default_factory=Guidance)

    def __post_init__(self):
        check_choice("token order", self.token_order, TOKEN_ORDERS)


@functools.partial(jax.jit, static_argnames=("model", "schedule", "settings", "return_trajectory"))
def generate(
    model: CausalFusion,
    params: Any,
    schedule: NoiseSchedule,
    settings: SamplingSettings,
    labels: jax.Array,
    keys: jax.Array,
    return_trajectory: bool = False,
) -> Any:
    """Generates one image per key; image i depends on its label and key alone.

    Args:
      model: the transformer.
      params: its parameters.
      schedule: respaced to the denoising steps of an AR step.
      settings: AR steps, order, solver, guidance.
      labels: int `[batch]`.
      keys: typed keys `[batch]`.
      return_trajectory: also return how the image emerged.

    Returns:
      Tokens `[batch, L, token_width]` in grid order; with `return_trajectory` a pair with the
      `Trajectory`.

    Raises:
      UserError: the split sizes don't sum to L.
    """
    check_split_sizes(settings.split_sizes, model.num_tokens)
    order_keys, start_keys, noise_keys = jnp.moveaxis(
        jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0
    )
    order = token_order(
        settings.token_order,
        model.grid,
        order_keys,
        block_size=settings.block_size,
        dilation_stride=settings.dilation_stride,
    )
    # By grid position, so that another split starts from the same noise.
    token_shape = (model.num_tokens, model.token_width)
    start_noise = jax.vmap(lambda key: jax.random.normal(key, token_shape))(start_keys)

    def noise_at(size: int) -> NoiseAt:
        def draw(ar_step, index):
            def draw_one(key):
                key = jax.random.fold_in(jax.random.fold_in(key, ar_step), index)
                return jax.random.normal(key, (size, model.token_width))

            return jax.vmap(draw_one)(noise_keys)

        return draw

    tokens, trajectory = generate_from_noise(
        model, params, schedule, settings, labels, order, start_noise, noise_at, return_trajectory
    )
    return (tokens, trajectory) if return_trajectory else tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """How images emerged.

    Attributes:
      token_order: `[batch, L]`, grid index of each position.
      x_t: one array an AR step, `[denoising steps, batch, tokens of the AR step, token_width]`,
        after each denoising step, in generation order.
      x_start: like `x_t`, the clean tokens predicted at each denoising step.
    """

    token_order: jax.Array
    x_t: list[jax.Array]
    x_start: list[jax.Array]


def generate_from_noise(
    model: CausalFusion,
    params: Any,
    schedule: NoiseSchedule,
    settings: SamplingSettings,
    labels: jax.Array,
    order: jax.Array,
    start_noise: jax.Array,
    noise_at: Callable[[int], NoiseAt],
    record: bool = False,
) -> tuple[jax.Array, Trajectory | None]:
    """`generate` for given randomness.

    Args:
      model, params, schedule, settings, labels: see `generate`.
      order: token order `[batch, L]`.
      start_noise: `[batch, L, token_width]` in grid order.
      noise_at: size of an AR step -> noise of its denoising steps. The AR step is a Python int
        where its neighbours have other sizes.
      record: also return the trajectory.

    Returns:
      Tokens `[batch, L, token_width]` in grid order, and the trajectory or None.
    """
    guidance = settings.guidance
    batch, num_tokens = order.shape
    start_noise = jnp.take_along_axis(start_noise, order[..., None], axis=1)
    runs = _runs(settings.split_sizes)
    capacity = cache_capacity(model, settings.split_sizes)
    kv_cache = prefill(model, params, labels, capacity, guidance)

    def ar_step(kv_cache, index, begin, size, push=True):
        def chunk(x):
            return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)

        grid_indices = chunk(order)
        x, trajectory = denoise_tokens(
            model,
            params,
            schedule,
            settings.solver,
            guidance,
            kv_cache,
            chunk(start_noise),
            grid_indices,
            functools.partial(noise_at(size), index),
            record,
        )
        if push:
            kv_cache = push_clean_tokens(model, params, kv_cache, x, grid_indices)
        return kv_cache, (x, trajectory)

    chunks, x_t, x_start = [], [], []
    first, begin = 0, 0
    for size, count in runs:
        if count == 1:
            push = begin + size < num_tokens
            kv_cache, outputs = ar_step(kv_cache, first, begin, size, push)
            outputs = jax.tree.map(lambda x: x[None], outputs)
        else:

            def scanned(kv_cache, i, first=first, begin=begin, size=size):
                return ar_step(kv_cache, first + i, begin + i * size, size)

            kv_cache, outputs = jax.lax.scan(scanned, kv_cache, jnp.arange(count))
        x, trajectory = outputs
        chunks.append(jnp.moveaxis(x, 0, 1).reshape(batch, count * size, model.token_width))
        if record:
            x_t.extend(trajectory[0])
            x_start.extend(trajectory[1])
        first, begin = first + count, begin + count * size
    grid_order = jnp.argsort(order, axis=1)[..., None]
    tokens = jnp.take_along_axis(jnp.concatenate(chunks, axis=1), grid_order, axis=1)
    return tokens, Trajectory(order, x_t, x_start) if record else None


def _runs(split_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(size, count) of AR steps of one size in a row: each run is one loop."""
    return [(size, len(list(same))) for size, same in itertools.groupby(split_sizes)]


def cache_capacity(model: CausalFusion, split_sizes: Sequence[int]) -> int:
    """Tokens for which `generate` makes room in the KV cache."""
    # The last AR step is pushed only where it is one of a loop.
    last_size, last_count = _runs(split_sizes)[-1]
    return model.condition_length + model.num_tokens - (last_size if last_count == 1 else 0)


def prefill(
    model: CausalFusion, params: Any, labels: jax.Array, capacity: int, guidance: Guidance
) -> KVCache:
    """The KV cache of the condition tokens alone, with room for `capacity` tokens.

    With guidance the batch doubles: each label, followed by the null class. So both rows of an image
    are on the same device.
    """
    if guidance.is_used:
        labels = jnp.stack([labels, jnp.full_like(labels, model.null_class)], axis=1).reshape(-1)

    def fill(model, labels):
        kv_cache = model.empty_cache(labels.shape[0], capacity)
        return model.extend(kv_cache, model.condition_tokens(labels))

    return model.apply({"params": params}, labels, method=fill)


def push_clean_tokens(
    model: CausalFusion, params: Any, kv_cache: KVCache, tokens: jax.Array, grid_indices: jax.Array
) -> KVCache:
    """The cache after the clean tokens of an AR step.

    Args:
      model, params: the transformer.
      kv_cache: of the batch or, with guidance, of twice the batch.
      tokens: `[batch, M, token_width]`.
      grid_indices: `[batch, M]`.
    """
    copies = kv_cache.keys.shape[1] // tokens.shape[0]
    tokens, grid_indices = _repeat(tokens, copies), _repeat(grid_indices, copies)

    def push(model, kv_cache, tokens, grid_indices):
        return model.extend(kv_cache, model.clean_image_tokens(tokens, grid_indices))

    return model.apply({"params": params}, kv_cache, tokens, grid_indices, method=push)


def guided_prediction(
    model: CausalFusion,
    params: Any,
    guidance: Guidance,
    kv_cache: KVCache,
    x_t: jax.Array,
    t: jax.Array,
    grid_indices: jax.Array,
) -> jax.Array:
    """The network's prediction for the noised tokens of one AR step, with guidance.

    Args:
      model, params, guidance: see `generate`.
      kv_cache: of the batch, or of twice the batch with guidance (see `prefill`).
      x_t: `[batch, M, token_width]`.
      t: int scalar, the timestep of training.
      grid_indices: `[batch, M]`.

    Returns:
      float32 `[batch, M, token_width]`.
    """
    batch = x_t.shape[0]
    copies = 2 if guidance.is_used else 1
    prediction = model.apply(
        {"params": params},
        kv_cache,
        _repeat(x_t, copies),
        jnp.broadcast_to(t, copies * batch),
        _repeat(grid_indices, copies),
        method=model.denoise,
    )
    if not guidance.is_used:
        return prediction
    prediction = prediction.reshape(batch, copies, *prediction.shape[1:])
    conditional, unconditional = prediction[:, 0], prediction[:, 1]
    low, high = guidance.interval
    scale = jnp.where((low <= t) & (t < high), guidance.scale, 1.0)
    return unconditional + scale * (conditional - unconditional)


def denoise_tokens(
    model: CausalFusion,
    params: Any,
    schedule: NoiseSchedule,
    solver: Solver,
    guidance: Guidance,
    kv_cache: KVCache,
    x_t: jax.Array,
    grid_indices: jax.Array,
    noise_at: Callable[[jax.Array], jax.Array],
    record: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Denoises the tokens of one AR step from noise to clean.

    Args:
      model, params, schedule, solver, guidance: see `generate`.
      kv_cache: from `prefill` and `push_clean_tokens`.
      x_t: noise `[batch, M, token_width]`.
      grid_indices: `[batch, M]`.
      noise_at: index of the denoising step, counted down -> noise like `x_t`.
      record: also return what each denoising step gave.

    Returns:
      Clean tokens like `x_t`, and with `record` (x_t, predicted x_0) after each denoising step,
      `[denoising steps, ...]`.
    """
    timesteps = jnp.asarray(schedule.timestep_map)

    def step(x_t, index):
        prediction = guided_prediction(
            model, params, guidance, kv_cache, x_t, timesteps[index], grid_indices
        )
        noise = noise_at(index) if solver.needs_noise else None
        x_t, x_start = denoising_step(solver, schedule, x_t, prediction, index, noise)
        return x_t, (x_t, x_start) if record else None

    return jax.lax.scan(step, x_t, jnp.arange(schedule.num_timesteps)[::-1])


def _repeat(x: jax.Array, copies: int) -> jax.Array:
    return jnp.repeat(x, copies, axis=0) if copies > 1 else x
