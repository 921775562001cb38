"""Generation (paper section 3.1): AR steps x denoising steps over a KV cache, in one jitted program.

Each AR step denoises its tokens from noise, given the condition tokens and the clean tokens of the
AR steps before, which the KV cache holds; then its own tokens are pushed into the cache. Tokens that
are known from the start (editing) are pushed before the first AR step.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfjax.denoising_tables import DenoisingTables, denoising_tables
from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.diffusion.solvers import Solver, StepCoefficients, denoising_step
from cfjax.errors import UserError, check_choice
from cfjax.factorization import TOKEN_ORDERS, token_order
from cfjax.guidance import Guidance
from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.kv_cache import KVCache

# (AR step, index of the denoising step) -> noise [batch, tokens of the AR step, token_width]
NoiseAt = Callable[[int | jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """A place on the factorization plane and how to go there; hashable, static in `generate`.

    Attributes:
      split_sizes: tokens of each AR step; they sum to L, or to less if the others are known.
      schedules: the noise schedule of each AR step, respaced to its denoising steps.
      token_order: "random", "raster", "block_raster" or "dilated".
      block_size, dilation_stride: of the orders of these names, in tokens.
      solver: the denoising rule.
      guidance: how strongly to guide, and where.
    """

    split_sizes: tuple[int, ...]
    schedules: tuple[NoiseSchedule, ...]
    token_order: str = "random"
    block_size: int = 4
    dilation_stride: int = 2
    solver: Solver = dataclasses.field(default_factory=Solver)
    guidance: Guidance = dataclasses.field(default_factory=Guidance)

    def __post_init__(self):
        check_choice("token order", self.token_order, TOKEN_ORDERS)
        if len(self.schedules) != len(self.split_sizes):
            raise UserError(
                f"there are {len(self.split_sizes)} AR steps, but {len(self.schedules)} numbers of"
                " denoising steps; pass one for each."
            )

    @property
    def num_generated(self) -> int:
        """How many tokens are generated; the other ones are known."""
        return sum(self.split_sizes)

    @property
    def is_guided(self) -> bool:
        """Whether a weaker prediction is needed anywhere."""
        return any(self.guidance.is_guided(it.timestep_map).any() for it in self.schedules)

    @property
    def num_rows(self) -> int:
        """Rows of an image in the KV cache, without autoguidance."""
        return 2 if self.is_guided else 1

    @property
    def num_passes(self) -> tuple[int, ...]:
        """Forward passes in the denoising of each AR step: one a denoising step, two a guided one."""
        guided = (int(self.guidance.is_guided(it.timestep_map).sum()) for it in self.schedules)
        return tuple(
            schedule.num_timesteps + count
            for schedule, count in zip(self.schedules, guided, strict=True)
        )


class Network(NamedTuple):
    """A transformer and its parameters."""

    model: CausalFusion
    params: Any


class Caches(NamedTuple):
    """KV caches while an image is generated.

    Attributes:
      main: of the model; with classifier-free guidance two rows an example, with its class and with
        the null class. So both are on the same device.
      guide: of the weaker model of autoguidance, or None.
    """

    main: KVCache
    guide: KVCache | None


class Known(NamedTuple):
    """Tokens that are there before the first AR step.

    Attributes:
      tokens: clean tokens `[batch, L, token_width]` in grid order.
      is_known: bool `[batch, L]` in grid order; the same number of them in each example.
    """

    tokens: jax.Array
    is_known: jax.Array


@functools.partial(
    jax.jit, static_argnames=("model", "settings", "guide_model", "return_trajectory")
)
def generate(
    model: CausalFusion,
    params: Any,
    settings: SamplingSettings,
    labels: jax.Array,
    keys: jax.Array,
    *,
    known: Known | None = None,
    guide_model: CausalFusion | None = None,
    guide_params: Any = None,
    return_trajectory: bool = False,
) -> Any:
    """Generates one image per key; image i depends on its label, key and known tokens alone.

    Args:
      model: the transformer.
      params: its parameters.
      settings: AR steps, denoising steps, order, solver, guidance.
      labels: int `[batch]`.
      keys: typed keys `[batch]`.
      known: tokens that stay as they are, L - `settings.num_generated` in each example.
      guide_model, guide_params: the weaker model of autoguidance; with None the null class guides.
      return_trajectory: also return how the image emerged.

    Returns:
      Tokens `[batch, L, token_width]` in grid order; with `return_trajectory` a pair with the
      `Trajectory`.

    Raises:
      UserError: the split sizes don't sum to L and no tokens are known.
    """
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
        Network(model, params),
        settings,
        labels,
        order,
        start_noise,
        noise_at,
        known=known,
        guide=None if guide_model is None else Network(guide_model, guide_params),
        record=return_trajectory,
    )
    return (tokens, trajectory) if return_trajectory else tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """How images emerged.

    Attributes:
      token_order: `[batch, L]`, grid index of each position; known tokens come first.
      x_t: one array an AR step, `[denoising steps, batch, tokens of the AR step, token_width]`,
        after each denoising step, in generation order.
      x_start: like `x_t`, the clean tokens predicted at each denoising step.
    """

    token_order: jax.Array
    x_t: list[jax.Array]
    x_start: list[jax.Array]


def generate_from_noise(
    network: Network,
    settings: SamplingSettings,
    labels: jax.Array,
    order: jax.Array,
    start_noise: jax.Array,
    noise_at: Callable[[int], NoiseAt],
    *,
    known: Known | None = None,
    guide: Network | None = None,
    record: bool = False,
) -> tuple[jax.Array, Trajectory | None]:
    """`generate` for given randomness.

    Args:
      network: the transformer.
      settings, labels, known: see `generate`.
      order: token order `[batch, L]`.
      start_noise: `[batch, L, token_width]` in grid order.
      noise_at: size of an AR step -> noise of its denoising steps. The AR step is a Python int
        where its neighbours differ in size.
      guide: the weaker model of autoguidance.
      record: also return the trajectory.

    Returns:
      Tokens `[batch, L, token_width]` in grid order, and the trajectory or None.
    """
    model = network.model
    num_known = model.num_tokens - settings.num_generated
    if num_known < 0 or (num_known and known is None):
        raise UserError(
            f"split sizes {list(settings.split_sizes)} sum to {settings.num_generated}, but must sum"
            f" to the {model.num_tokens} tokens of the image."
        )
    if known is not None and settings.num_generated == 0:
        return known.tokens, Trajectory(order, [], []) if record else None
    chunks = []
    caches = prefill(network, guide, settings, labels)
    if num_known:
        order = known_first(order, known.is_known)
        chunks.append(jnp.take_along_axis(known.tokens, order[:, :num_known, None], axis=1))
        caches = push_clean_tokens(network, guide, caches, chunks[0], order[:, :num_known])
    start_noise = jnp.take_along_axis(start_noise, order[..., None], axis=1)
    tables = denoising_tables(
        settings.split_sizes,
        settings.schedules,
        settings.solver,
        settings.guidance,
        model.num_tokens,
    )

    def ar_step(caches, index, row, begin, size, push=True):
        def chunk(x):
            return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)

        grid_indices = chunk(order)
        x, trajectory = denoise_tokens(
            network,
            guide,
            tables,
            settings.solver,
            index,
            row,
            caches,
            chunk(start_noise),
            grid_indices,
            functools.partial(noise_at(size), index),
            record,
        )
        if push:
            caches = push_clean_tokens(network, guide, caches, x, grid_indices)
        return caches, (x, trajectory)

    x_t, x_start = [], []
    first, begin = 0, num_known
    for size, count in _runs(settings, record):
        rows = tables.row_of_ar_step[first : first + count]
        if count == 1:
            push = begin + size < model.num_tokens
            caches, outputs = ar_step(caches, first, int(rows[0]), begin, size, push)
            outputs = jax.tree.map(lambda x: x[None], outputs)
        else:
            # Known to the compiler where it is the same for all of them.
            row = int(rows[0]) if (rows == rows[0]).all() else None

            def scanned(caches, i, first=first, begin=begin, size=size, row=row):
                if row is None:
                    row = jnp.asarray(tables.row_of_ar_step)[first + i]
                return ar_step(caches, first + i, row, begin + i * size, size)

            caches, outputs = jax.lax.scan(scanned, caches, jnp.arange(count))
        x, trajectory = outputs
        x = jnp.moveaxis(x, 0, 1)
        chunks.append(x.reshape(x.shape[0], count * size, model.token_width))
        if record:
            x_t.extend(trajectory[0])
            x_start.extend(trajectory[1])
        first, begin = first + count, begin + count * size
    grid_order = jnp.argsort(order, axis=1)[..., None]
    tokens = jnp.take_along_axis(jnp.concatenate(chunks, axis=1), grid_order, axis=1)
    return tokens, Trajectory(order, x_t, x_start) if record else None


def known_first(order: jax.Array, is_known: jax.Array) -> jax.Array:
    """The token order in which known tokens come first; within both parts it stays as it was.

    Args:
      order: `[batch, L]`, grid index of each position.
      is_known: bool `[batch, L]` in grid order.
    """
    is_generated = ~jnp.take_along_axis(is_known, order, axis=1)
    return jnp.take_along_axis(order, jnp.argsort(is_generated, axis=1, stable=True), axis=1)


def _runs(settings: SamplingSettings, record: bool = False) -> list[tuple[int, int]]:
    """(size, count) of AR steps of one size in a row: each run is one loop.

    What is recorded has the shape of the denoising steps, so that these must be as many too.
    """
    steps = zip(settings.split_sizes, settings.schedules, strict=True)
    sizes = ((size, schedule if record else None) for size, schedule in steps)
    return [(size, len(list(same))) for (size, _), same in itertools.groupby(sizes)]


def cache_capacity(model: CausalFusion, settings: SamplingSettings) -> int:
    """Tokens for which `generate` makes room in the KV cache."""
    runs = _runs(settings)
    # The last AR step is pushed only where it is one of a loop.
    last_size, last_count = runs[-1]
    return model.condition_length + model.num_tokens - (last_size if last_count == 1 else 0)


def prefill(
    network: Network, guide: Network | None, settings: SamplingSettings, labels: jax.Array
) -> Caches:
    """The KV caches of the condition tokens alone, with room for the image's."""

    def fill(network, labels):
        def filled(model, labels):
            capacity = cache_capacity(model, settings)
            kv_cache = model.empty_cache(labels.shape[0], capacity)
            return model.extend(kv_cache, model.condition_tokens(labels))

        return network.model.apply({"params": network.params}, labels, method=filled)

    if not settings.is_guided:
        return Caches(fill(network, labels), None)
    if guide is not None:
        return Caches(fill(network, labels), fill(guide, labels))
    null = jnp.full_like(labels, network.model.null_class)
    return Caches(fill(network, jnp.stack([labels, null], axis=1).reshape(-1)), None)


def push_clean_tokens(
    network: Network,
    guide: Network | None,
    caches: Caches,
    tokens: jax.Array,
    grid_indices: jax.Array,
) -> Caches:
    """The caches after the clean tokens of an AR step.

    Args:
      network, guide: the transformers.
      caches: from `prefill`.
      tokens: `[batch, M, token_width]`.
      grid_indices: `[batch, M]`.
    """

    def push(network, kv_cache):
        copies = kv_cache.keys.shape[1] // tokens.shape[0]

        def pushed(model, kv_cache, tokens, grid_indices):
            return model.extend(kv_cache, model.clean_image_tokens(tokens, grid_indices))

        return network.model.apply(
            {"params": network.params},
            kv_cache,
            _repeat(tokens, copies),
            _repeat(grid_indices, copies),
            method=pushed,
        )

    guide_cache = None if caches.guide is None else push(guide, caches.guide)
    return Caches(push(network, caches.main), guide_cache)


def guided_prediction(
    network: Network,
    guide: Network | None,
    caches: Caches,
    x_t: jax.Array,
    t: jax.Array,
    grid_indices: jax.Array,
    scale: jax.Array | float | None,
) -> jax.Array:
    """The network's prediction for the noised tokens of one AR step, with guidance.

    Args:
      network, guide: the transformers.
      caches: from `prefill`.
      x_t: `[batch, M, token_width]`.
      t: int scalar, the timestep of training.
      grid_indices: `[batch, M]`.
      scale: of the guidance; None for none, then the weaker prediction is not computed.

    Returns:
      float32 `[batch, M, token_width]`.
    """
    batch = x_t.shape[0]

    def predict(network, kv_cache, copies):
        return network.model.apply(
            {"params": network.params},
            kv_cache,
            _repeat(x_t, copies),
            jnp.broadcast_to(t, copies * batch),
            _repeat(grid_indices, copies),
            method=network.model.denoise,
        )

    if scale is None:
        return predict(network, caches.main, 1)
    if caches.guide is not None:
        stronger = predict(network, caches.main, 1)
        weaker = predict(guide, caches.guide, 1)
    else:
        both = predict(network, caches.main, 2)
        both = both.reshape(batch, 2, *both.shape[1:])
        stronger, weaker = both[:, 0], both[:, 1]
    return weaker + scale * (stronger - weaker)


def denoise_tokens(
    network: Network,
    guide: Network | None,
    tables: DenoisingTables,
    solver: Solver,
    ar_step: int | jax.Array,
    row: int | jax.Array,
    caches: Caches,
    x_t: jax.Array,
    grid_indices: jax.Array,
    noise_at: Callable[[jax.Array], jax.Array],
    record: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Denoises the tokens of one AR step from noise to clean.

    Args:
      network, guide: the transformers.
      tables: of all AR steps.
      solver: the denoising rule.
      ar_step: which AR step.
      row: its row of the tables; traced where AR steps of one loop differ in denoising steps.
      caches: from `prefill` and `push_clean_tokens`.
      x_t: noise `[batch, M, token_width]`.
      grid_indices: `[batch, M]`.
      noise_at: index of the denoising step, counted down -> noise like `x_t`.
      record: also return what each denoising step gave; `row` is an int then.

    Returns:
      Clean tokens like `x_t`, and with `record` (x_t, predicted x_0) after each denoising step,
      `[denoising steps, ...]`.
    """

    def look_up(table, index):
        return jnp.asarray(table, jnp.float32)[row, index]

    by_ar_step = jnp.asarray(tables.guidance_by_ar_step, jnp.float32)[ar_step]

    def step(carry, index, is_guided):
        x_t, x_start = carry
        t = jnp.asarray(tables.timesteps)[row, index]
        scale = None
        if is_guided:
            by_timestep = look_up(tables.guidance_by_timestep, index)
            scale = 1.0 + (tables.guidance_scale - 1.0) * by_ar_step * by_timestep
        prediction = guided_prediction(network, guide, caches, x_t, t, grid_indices, scale)
        noise = noise_at(index) if solver.needs_noise else None
        coefficients = StepCoefficients(*(look_up(it, index) for it in tables.coefficients))
        x_t, x_start = denoising_step(solver, coefficients, x_t, prediction, x_start, noise)
        carry = x_t, x_start if solver.is_multistep else None
        return carry, (x_t, x_start) if record else None

    carry = x_t, jnp.zeros_like(x_t) if solver.is_multistep else None
    recorded = []
    for segment, is_guided in enumerate((False, True, False)):
        begins, ends = tables.segments[:, segment], tables.segments[:, segment + 1]
        if isinstance(row, int):
            if begins[row] > ends[row]:
                indices = jnp.arange(ends[row], begins[row])[::-1]
                body = functools.partial(step, is_guided=is_guided)
                carry, outputs = jax.lax.scan(body, carry, indices)
                recorded.append(outputs)
        elif (begins > ends).any():
            begin = jnp.asarray(begins)[row]
            num_denoising_steps = begin - jnp.asarray(ends)[row]

            def body(i, carry, begin=begin, is_guided=is_guided):
                return step(carry, begin - 1 - i, is_guided)[0]

            carry = jax.lax.fori_loop(0, num_denoising_steps, body, carry)
    if not record:
        return carry[0], None
    return carry[0], jax.tree.map(lambda *parts: jnp.concatenate(parts), *recorded)


def _repeat(x: jax.Array, copies: int) -> jax.Array:
    return jnp.repeat(x, copies, axis=0) if copies > 1 else x
