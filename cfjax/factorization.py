"""The AR axis as data: token orders, AR-step splits, the generalized causal mask, AR loss weights.

A factorization of an image of L tokens is two integer arrays (paper section 3):

- `token_order [B, L]`: the grid index (row-major) of the token generated at each position;
- `ar_step_ids [B, L]`: the AR step that generates each position, non-decreasing from 0.

Pure diffusion is all zeros, pure autoregression is 0...L-1, everything else lies between. The mask,
the loss weights and the sampler derive from these two arrays by comparing ids; nothing branches on
a mode. All functions have static shapes and can be jitted with the arguments named static.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError, check_choice

MODES = ("diffusion", "ar", "fixed", "random", "decayed")
TOKEN_ORDERS = ("random", "raster", "block_raster", "dilated")
AR_LOSS_WEIGHT_SCHEDULES = ("linear", "cosine")

# Token kinds. A training sequence may hold several noised copies of the image (paper Table 7);
# copy k has the kind NOISED + k.
CONDITION, CLEAN, NOISED = 0, 1, 2


class FactorizationPlan(NamedTuple):
    """One factorization per example: `token_order [B, L]` and `ar_step_ids [B, L]`, both int32."""

    token_order: jax.Array
    ar_step_ids: jax.Array


@dataclasses.dataclass(frozen=True)
class Factorization:
    """How training images are factorized; `sample_plan` reads every field.

    Attributes:
      mode: "diffusion" (one AR step), "ar" (one token a step), "fixed" (`num_ar_steps` equal
        steps), "random" (number of steps uniform in 1...L) or "decayed" (number of steps drawn
        with p(S) proportional to `ar_step_decay ** (S - 1)`, paper section 3.3).
      num_ar_steps: the number of AR steps of mode "fixed".
      ar_step_decay: γ in (0, 1] of mode "decayed".
      split_per_example: draw another split for each example; otherwise one for the whole batch, as
        the published code does.
      token_order: "random" (another one for each example), "raster", "block_raster" or "dilated".
      block_size: side of the blocks of "block_raster".
      dilation_stride: distance between neighbours of one pass of "dilated".
    """

    mode: str = "decayed"
    num_ar_steps: int = 1
    ar_step_decay: float = 0.9
    split_per_example: bool = False
    token_order: str = "random"
    block_size: int = 4
    dilation_stride: int = 2

    def __post_init__(self):
        check_choice("factorization mode", self.mode, MODES)
        check_choice("token order", self.token_order, TOKEN_ORDERS)
        if not 0.0 < self.ar_step_decay <= 1.0:
            raise UserError(f"ar_step_decay is {self.ar_step_decay}, but must be in (0, 1].")
        if self.num_ar_steps < 1:
            raise UserError(f"num_ar_steps is {self.num_ar_steps}, but must be at least 1.")
        _check_order_sizes(self.block_size, self.dilation_stride)


def sample_plan(
    factorization: Factorization,
    split_key: jax.Array,
    order_keys: jax.Array,
    grid: tuple[int, int],
) -> FactorizationPlan:
    """Draws the plan of a training batch.

    Args:
      factorization: mode and token order (static).
      split_key: one key shared by the batch; with `split_per_example` keys `[B]`.
      order_keys: keys `[B]`, one per example.
      grid: (rows, columns) of the token grid; L = rows * columns.

    Returns:
      The plan, `[B, L]` each.

    Raises:
      UserError: mode "fixed" asks for more AR steps than there are tokens.
    """
    num_tokens = grid[0] * grid[1]
    batch = order_keys.shape[0]
    if factorization.split_per_example:
        draw = jax.vmap(lambda key: sample_split(factorization, key, num_tokens))
        ar_step_ids = draw(split_key)
    else:
        ids = sample_split(factorization, split_key, num_tokens)
        ar_step_ids = jnp.broadcast_to(ids, (batch, num_tokens))
    order = token_order(
        factorization.token_order,
        grid,
        order_keys,
        block_size=factorization.block_size,
        dilation_stride=factorization.dilation_stride,
    )
    return FactorizationPlan(order, ar_step_ids)


def sample_split(factorization: Factorization, key: jax.Array, num_tokens: int) -> jax.Array:
    """Draws one split by the factorization's mode: AR-step ids int32 `[L]`."""
    if factorization.mode == "diffusion":
        return jnp.zeros(num_tokens, jnp.int32)
    if factorization.mode == "ar":
        return jnp.arange(num_tokens, dtype=jnp.int32)
    if factorization.mode == "fixed":
        sizes = equal_split_sizes(num_tokens, factorization.num_ar_steps)
        return jnp.asarray(ar_step_ids_from_sizes(sizes))
    decay = factorization.ar_step_decay if factorization.mode == "decayed" else 1.0
    count_key, cut_key = jax.random.split(key)
    num_ar_steps = sample_num_ar_steps(count_key, num_tokens, decay)
    return sample_ar_step_ids(cut_key, num_tokens, num_ar_steps)


def max_clean_tokens(factorization: Factorization, num_tokens: int) -> int:
    """How many clean tokens a training sequence needs at most: those of all AR steps but the last.

    Nobody but themselves sees the clean tokens of the last AR step, so that they can be left out.
    """
    if factorization.mode == "diffusion":
        return 0
    if factorization.mode == "fixed":
        return num_tokens - equal_split_sizes(num_tokens, factorization.num_ar_steps)[-1]
    return num_tokens - 1


def num_ar_steps_probabilities(num_tokens: int, decay: float) -> np.ndarray:
    """p(S = i) ∝ `decay ** (i - 1)` for i = 1...L (paper section 3.3), float64 `[L]`."""
    weights = np.float64(decay) ** np.arange(num_tokens)
    return weights / weights.sum()


def sample_num_ar_steps(key: jax.Array, num_tokens: int, decay: float) -> jax.Array:
    """Draws the number of AR steps, int32 in 1...L, decayed (uniform if `decay` is 1)."""
    cumulative = np.cumsum(num_ar_steps_probabilities(num_tokens, decay)).astype(np.float32)
    uniform = jax.random.uniform(key)
    # The last edge is left out, so that rounding can't draw S = L + 1.
    return 1 + jnp.searchsorted(cumulative[:-1], uniform, side="right").astype(jnp.int32)


def sample_ar_step_ids(key: jax.Array, num_tokens: int, num_ar_steps: int | jax.Array) -> jax.Array:
    """Cuts L positions into S consecutive AR steps at cut points uniform without replacement.

    Args:
      key: one key.
      num_tokens: L (static).
      num_ar_steps: S, may be traced.

    Returns:
      AR-step ids `[L]`, int32, non-decreasing from 0 to S - 1.
    """
    rank = jax.random.permutation(key, num_tokens - 1)
    is_cut = jnp.concatenate([jnp.zeros(1, bool), rank < num_ar_steps - 1])
    return jnp.cumsum(is_cut, dtype=jnp.int32)


def equal_split_sizes(num_tokens: int, num_ar_steps: int) -> tuple[int, ...]:
    """Sizes of S AR steps as equal as possible, the larger ones first.

    Raises:
      UserError: S is not in 1...L.
    """
    if not 1 <= num_ar_steps <= num_tokens:
        raise UserError(
            f"num_ar_steps is {num_ar_steps}, but an image of {num_tokens} tokens takes 1 to "
            f"{num_tokens} AR steps."
        )
    size, rest = divmod(num_tokens, num_ar_steps)
    return (size + 1,) * rest + (size,) * (num_ar_steps - rest)


def check_split_sizes(split_sizes: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """Returns explicit split sizes as ints.

    Raises:
      UserError: a size is below 1 or the sizes don't sum to L.
    """
    sizes = tuple(int(size) for size in split_sizes)
    if not sizes or min(sizes) < 1:
        raise UserError(f"split sizes {list(sizes)} must be a list of numbers of at least 1.")
    if sum(sizes) != num_tokens:
        raise UserError(
            f"split sizes {list(sizes)} sum to {sum(sizes)}, but must sum to the {num_tokens} "
            "tokens of the image."
        )
    return sizes


def ar_step_ids_from_sizes(split_sizes: tuple[int, ...]) -> np.ndarray:
    """AR-step ids `[L]`, int32, of consecutive AR steps of the given sizes."""
    return np.repeat(np.arange(len(split_sizes), dtype=np.int32), split_sizes)


def token_order(
    name: str,
    grid: tuple[int, int],
    keys: jax.Array,
    *,
    block_size: int = 4,
    dilation_stride: int = 2,
) -> jax.Array:
    """Token order of each example (paper section 3.3, Table 3b).

    Args:
      name: "random": a uniform permutation per key; "raster": row by row; "block_raster": blocks
        in raster order, raster order within a block; "dilated": every `dilation_stride`-th token of
        both axes first, then the same grid shifted, in raster order of the shifts.
      grid: (rows, columns).
      keys: keys `[B]`; only "random" uses them.
      block_size: side of the blocks, in tokens; blocks at the border may be smaller.
      dilation_stride: stride of the dilated passes, in tokens.

    Returns:
      `[B, L]` int32, the row-major grid index of the token at each position.

    Raises:
      UserError: unknown name, or a size below 1.
    """
    check_choice("token order", name, TOKEN_ORDERS)
    _check_order_sizes(block_size, dilation_stride)
    num_tokens = grid[0] * grid[1]
    if name == "random":
        order = jax.vmap(lambda key: jax.random.permutation(key, num_tokens))(keys)
        return order.astype(jnp.int32)
    order = _fixed_order(name, grid, block_size, dilation_stride)
    return jnp.broadcast_to(jnp.asarray(order), (keys.shape[0], num_tokens))


def _check_order_sizes(block_size: int, dilation_stride: int) -> None:
    for name, size in (("block_size", block_size), ("dilation_stride", dilation_stride)):
        if size < 1:
            raise UserError(f"{name} is {size}, but must be at least 1.")


def _fixed_order(
    name: str, grid: tuple[int, int], block_size: int, dilation_stride: int
) -> np.ndarray:
    row, column = (axis.ravel() for axis in np.indices(grid))
    if name == "raster":
        sort_keys = (row, column)
    elif name == "block_raster":
        sort_keys = (row // block_size, column // block_size, row, column)
    else:
        sort_keys = (row % dilation_stride, column % dilation_stride, row, column)
    return np.lexsort(sort_keys[::-1]).astype(np.int32)


class MaskTerms(NamedTuple):
    """Three integers per token from which the mask follows; int32 `[..., T]` each."""

    key_rank: jax.Array
    query_rank: jax.Array
    group: jax.Array


def mask_terms(kinds: jax.Array, ar_step_ids: jax.Array, num_tokens: int) -> MaskTerms:
    """Condenses kinds and AR-step ids, both int `[..., T]`, so that the mask costs two comparisons.

    A query sees the keys of at most its rank, and the tokens of its own kind and AR step.
    `num_tokens` is L, above every AR-step id.
    """
    is_clean, is_noised = kinds == CLEAN, kinds >= NOISED
    key_rank = jnp.where(is_noised, num_tokens, jnp.where(is_clean, ar_step_ids, -1))
    query_rank = jnp.where(is_noised, ar_step_ids - 1, key_rank)
    group = kinds * num_tokens + jnp.where(kinds == CONDITION, 0, ar_step_ids)
    return MaskTerms(key_rank, query_rank, group)


def generalized_causal_mask(queries: MaskTerms, keys: MaskTerms) -> jax.Array:
    """Who may attend to whom (paper section 3.2).

    Everyone sees the condition tokens, which see only each other. A clean token of AR step s sees
    the clean tokens of steps up to s. A noised token of step s sees the clean tokens of steps
    before s and the noised tokens of its own step and copy. Nothing else is seen.

    Args:
      queries: terms of the queries, `[..., Q]`.
      keys: terms of the keys, `[..., K]`.

    Returns:
      bool `[..., Q, K]`, True where the query may attend to the key. Computed next to the softmax,
      XLA fuses it in, so that no mask is held in memory.
    """
    sees_rank = keys.key_rank[..., None, :] <= queries.query_rank[..., :, None]
    same_group = keys.group[..., None, :] == queries.group[..., :, None]
    return sees_rank | same_group


def ar_loss_weights(
    ar_step_ids: jax.Array,
    max_weight: float,
    min_weight: float = 1.0,
    schedule: str = "linear",
) -> jax.Array:
    """Loss weight of each position, falling from `max_weight` (λ) to `min_weight`.

    linear: w = λ - (λ - 1) start / L, cosine: w = (λ - 1)/2 cos(π start / L) + (λ + 1)/2, where
    start is the position at which the token's AR step begins (paper section 3.3).

    Args:
      ar_step_ids: `[..., L]`, non-decreasing.
      max_weight: λ; equal to `min_weight` for no weighting.
      min_weight: the limit at the last position.
      schedule: "linear" or "cosine".

    Returns:
      float32 `[..., L]`.
    """
    check_choice("AR loss weight schedule", schedule, AR_LOSS_WEIGHT_SCHEDULES)
    num_tokens = ar_step_ids.shape[-1]
    positions = jnp.broadcast_to(jnp.arange(num_tokens), ar_step_ids.shape)
    begins = jnp.diff(ar_step_ids, axis=-1, prepend=-1) != 0
    start = jax.lax.cummax(jnp.where(begins, positions, 0), axis=ar_step_ids.ndim - 1)
    fraction = start.astype(jnp.float32) / num_tokens
    if schedule == "linear":
        return max_weight - (max_weight - min_weight) * fraction
    half_range, middle = (max_weight - min_weight) / 2, (max_weight + min_weight) / 2
    return half_range * jnp.cos(jnp.pi * fraction) + middle
