"""The KV cache of generation: keys and values of condition and clean tokens, as an explicit value."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


class KVCache(NamedTuple):
    """Keys and values of the condition and clean tokens so far.

    Attributes:
      keys, values: `[layers, batch, heads, head_width, capacity]`: as TPUs hold them without padding
        narrow heads, and as the products with queries and attention weights read them.
      length: int32 scalar, how many entries are filled.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return self.keys.shape[-1]

    @property
    def num_rows(self) -> int:
        """Examples, or with guidance two rows an example."""
        return self.keys.shape[1]

    def of_layer(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, `[batch, heads, head_width, capacity]`."""
        return tuple(
            jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False) for whole in self[:2]
        )

    def with_written(self, layer: jax.Array, keys: jax.Array, values: jax.Array) -> "KVCache":
        """The cache with keys and values `[batch, M, heads, head_width]` of one layer after its own.

        Its length stays: it grows once all layers are written. The cache needs room for M more: as
        the length is traced, a write past its end is not refused but lands on earlier entries.
        """

        def write(whole: jax.Array, new: jax.Array) -> jax.Array:
            # Where a loop fills the cache before anything reads it, the compiler would choose another
            # layout there, and copy it all.
            whole = with_layout_constraint(whole, Layout(tuple(range(whole.ndim))))
            new = jnp.moveaxis(new, 1, -1)[None].astype(whole.dtype)
            return jax.lax.dynamic_update_slice(whole, new, (layer, 0, 0, 0, self.length))

        return KVCache(write(self.keys, keys), write(self.values, values), self.length)


def empty_cache(
    num_layers: int, batch: int, num_heads: int, head_width: int, capacity: int, dtype: Any
) -> KVCache:
    """A KV cache with room for `capacity` tokens and none in it."""
    zeros = jnp.zeros((num_layers, batch, num_heads, head_width, capacity), dtype)
    return KVCache(zeros, zeros, jnp.zeros((), jnp.int32))


def first_row_of_each(keys_or_values: jax.Array, batch: int) -> jax.Array:
    """Of one layer's `[batch * rows, heads, head_width, capacity]` each example's first row."""
    rows = len(keys_or_values) // batch
    if rows == 1:
        return keys_or_values
    return keys_or_values.reshape(batch, rows, *keys_or_values.shape[1:])[:, 0]


def after(earlier: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The arrays `[batch, ...]` as they are, not to be used before `earlier [batch, ...]` is there.

    Compilers for CPUs drop the barrier, so that the arrays depend on `earlier` by value too: on zero
    times one of its numbers, which no compiler may leave out, as it is NaN where that is.
    """
    earlier, arrays = jax.lax.optimization_barrier((earlier, arrays))
    zero = 0.0 * earlier.reshape(len(earlier), -1)[:, 0]
    return tuple(x + zero.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) for x in arrays)
