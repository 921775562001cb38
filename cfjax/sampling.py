"""Generation (paper section 3.1): AR steps x denoising steps over a KV cache, in one jitted program.

Each AR step denoises its tokens from noise, given the condition tokens and the clean tokens of the
AR steps before, which the KV cache holds; then its own tokens are pushed into the cache. Tokens that
are known from the start (editing) are pushed before the first AR step.

Longer than most files: the loops over AR steps share one state and are read with what they loop over.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.denoising import denoise_tokens
from cfjax.denoising_tables import denoising_tables
from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.diffusion.solvers import Solver
from cfjax.errors import UserError, check_choice
from cfjax.factorization import TOKEN_ORDERS, token_order
from cfjax.guidance import Guidance
from cfjax.guided_network import Caches, Network, NoisedContext, prefill, push_clean_tokens
from cfjax.models.causal_fusion import CausalFusion

KEPT_AS = ("clean", "noised")

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
      kept_as: how known tokens are seen: "clean", as those of earlier AR steps, or "noised" to the
        timestep of the tokens that are denoised beside them.
    """

    split_sizes: tuple[int, ...]
    schedules: tuple[NoiseSchedule, ...]
    token_order: str = "random"
    block_size: int = 4
    dilation_stride: int = 2
    solver: Solver = dataclasses.field(default_factory=Solver)
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    kept_as: str = "clean"

    def __post_init__(self):
        check_choice("token order", self.token_order, TOKEN_ORDERS)
        check_choice("kept_as", self.kept_as, KEPT_AS)
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
    order, start_noise, noise_at = draw_noise(model, settings, keys)
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


def draw_noise(
    model: CausalFusion, settings: SamplingSettings, keys: jax.Array
) -> tuple[jax.Array, jax.Array, Callable[[int], NoiseAt]]:
    """All that is drawn for one image a key.

    Args:
      model: gives the grid and the width of a token (static).
      settings: gives the token order (static).
      keys: typed keys `[batch]`.

    Returns:
      `order`, `start_noise` and `noise_at` of `generate_from_noise`.
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

    return order, start_noise, noise_at


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
    room = num_pushed_tokens(model, settings)
    num_cached = room - num_known if settings.kept_as == "noised" else room
    caches = prefill(network, guide, labels, num_cached, settings.is_guided)
    tokens, trajectory, _ = generate_over_caches(
        *(network, settings, caches, room, order, start_noise, noise_at),
        known=known,
        guide=guide,
        record=record,
    )
    return tokens, trajectory


def generate_over_caches(
    network: Network,
    settings: SamplingSettings,
    caches: Caches,
    room: int,
    order: jax.Array,
    start_noise: jax.Array,
    noise_at: Callable[[int], NoiseAt],
    *,
    known: Known | None = None,
    guide: Network | None = None,
    record: bool = False,
) -> tuple[jax.Array, Trajectory | None, Caches]:
    """`generate_from_noise` after what the caches hold: condition tokens, or a document so far.

    Args:
      caches: with room for `room` image tokens, at least those before the last AR step.
      room: with L, all tokens are pushed, so that something may follow the image.
      network, settings, order, start_noise, noise_at, known, guide, record: see there; at least one
        token is generated.

    Returns:
      Tokens, the trajectory or None, and the caches with what was pushed.
    """
    model = network.model
    num_known = model.num_tokens - settings.num_generated
    if num_known:
        order = known_first(order, known.is_known)
    start_noise = jnp.take_along_axis(start_noise, order[..., None], axis=1)
    tables = denoising_tables(
        settings.split_sizes,
        settings.schedules,
        settings.solver,
        settings.guidance,
        model.num_tokens,
    )

    def take_ar_step(state, index, row, begin, size, push=True):
        def chunk(x):
            return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)

        x, trajectory = denoise_tokens(
            network,
            guide,
            tables,
            settings.solver,
            index,
            row,
            state.caches,
            chunk(start_noise),
            chunk(order),
            functools.partial(noise_at(size), index),
            record,
        )
        caches = state.caches
        if push:
            caches = push_clean_tokens(network, guide, caches, x, chunk(order))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, x, begin, axis=1)
        return _State(caches, tokens), trajectory

    tokens = jnp.zeros_like(start_noise)
    if num_known:
        tokens = jnp.take_along_axis(known.tokens, order[..., None], axis=1)
        clean, indices = tokens[:, :num_known], order[:, :num_known]
        if settings.kept_as == "noised":
            rates = jnp.asarray(_rates(settings.schedules), jnp.float32)
            noised = NoisedContext(clean, start_noise[:, :num_known], indices, rates)
            caches = caches._replace(noised=noised)
        else:
            caches = push_clean_tokens(network, guide, caches, clean, indices)
    state = _State(caches, tokens)
    trajectories = []
    if _sizes_come_again(settings) and not record:
        state = _take_any_ar_steps(settings, tables.row_of_ar_step, num_known, take_ar_step, state)
    else:
        state, trajectories = _take_runs(
            _runs(settings, record), tables.row_of_ar_step, num_known, room, take_ar_step, state
        )
    tokens = jnp.take_along_axis(state.tokens, jnp.argsort(order, axis=1)[..., None], axis=1)
    trajectory = None
    if record:
        x_t, x_start = ([parts[i] for parts in trajectories] for i in (0, 1))
        trajectory = Trajectory(order, x_t, x_start)
    return tokens, trajectory, state.caches


class _State(NamedTuple):
    """What passes from AR step to AR step; tokens `[batch, L, token_width]` in generation order."""

    caches: Caches
    tokens: jax.Array


def _take_runs(runs, row_of_ar_step, begin, room, take_ar_step, state):
    """AR steps of one size in a row as one loop each."""
    first, trajectories = 0, []
    for size, count in runs:
        rows = row_of_ar_step[first : first + count]
        if count == 1:
            push = begin + size <= room
            state, trajectory = take_ar_step(state, first, int(rows[0]), begin, size, push)
            trajectories.append(trajectory)
        else:
            # Known to the compiler where it is the same for all of them.
            row = int(rows[0]) if (rows == rows[0]).all() else None

            def scanned(state, i, first=first, begin=begin, size=size, row=row):
                if row is None:
                    row = jnp.asarray(row_of_ar_step)[first + i]
                return take_ar_step(state, first + i, row, begin + i * size, size)

            state, stacked = jax.lax.scan(scanned, state, jnp.arange(count))
            trajectories += [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
        first, begin = first + count, begin + count * size
    return state, trajectories


def _take_any_ar_steps(settings, row_of_ar_step, num_known, take_ar_step, state):
    """AR steps whose sizes come again later: one loop, in which each size is compiled once."""
    sizes = np.array(settings.split_sizes)
    distinct = sorted(set(settings.split_sizes))
    begins = num_known + np.cumsum(sizes) - sizes
    is_one_row = (row_of_ar_step == row_of_ar_step[0]).all()

    def scanned(state, ar_step):
        index, begin, which, row = ar_step
        row = int(row_of_ar_step[0]) if is_one_row else row
        for place, size in enumerate(distinct):
            # Loops of one round or none, as branches of a conditional would copy the KV cache.
            def body(_, state, size=size):
                return take_ar_step(state, index, row, begin, size)[0]

            state = jax.lax.fori_loop(0, jnp.int32(which == place), body, state)
        return state, None

    ar_steps = (np.arange(len(sizes)), begins, np.searchsorted(distinct, sizes), row_of_ar_step)
    return jax.lax.scan(scanned, state, jax.tree.map(jnp.asarray, ar_steps))[0]


def _rates(schedules: Sequence[NoiseSchedule]) -> np.ndarray:
    """Those of clean tokens and of noise at the timesteps of training that occur, `[T, 2]`."""
    rates = np.zeros((max(it.timestep_map.max() for it in schedules) + 1, 2))
    for schedule in schedules:
        alphas_cumprod = schedule.alphas_cumprod
        rates[schedule.timestep_map] = np.sqrt([alphas_cumprod, 1.0 - alphas_cumprod]).T
    return rates


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


def _sizes_come_again(settings: SamplingSettings) -> bool:
    """Whether AR steps of one size have others between them."""
    return len(_runs(settings)) > len(set(settings.split_sizes))


def num_pushed_tokens(model: CausalFusion, settings: SamplingSettings) -> int:
    """The image tokens that `generate` pushes into the KV cache."""
    last_size, last_count = _runs(settings)[-1]
    # The last AR step is pushed only where it is one of a loop.
    is_in_a_loop = last_count > 1 or _sizes_come_again(settings)
    return model.num_tokens - (0 if is_in_a_loop else last_size)
