"""The KV cache of a document that goes on without end: a ring whose oldest segments make room.

Rows of a batch are pushed to together and into the same slots; a row that has fewer tokens has empty
slots among them. A segment of which a part is overwritten is forgotten wholly, so that no token sees
half an image. Keys are turned by their positions before they are cached, and only distances matter,
so that nothing has to be moved or renumbered.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfjax.errors import UserError
from cfjax.models.kv_cache import KVCache, empty_cache

_NEVER_WRITTEN = -1


class DocumentCache(NamedTuple):
    """Keys and values of what is remembered of the documents so far.

    Attributes:
      kv_cache: of which `length` is the slot that is written next.
      is_filled: bool `[rows, capacity]`, which slots a row sees.
      segment_of_slot: int32 `[capacity]`, -1 where nothing was ever written.
      segment: int32 scalar, the segment that is being pushed.
      position: int32 `[rows]`, that of the token or image which comes next.
    """

    kv_cache: KVCache
    is_filled: jax.Array
    segment_of_slot: jax.Array
    segment: jax.Array
    position: jax.Array

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return self.kv_cache.capacity

    @property
    def num_rows(self) -> int:
        """Documents, or with guidance two rows a document."""
        return self.kv_cache.num_rows

    def with_room(self, num_tokens: int) -> "DocumentCache":
        """The cache with as many slots free from `kv_cache.length` on.

        Raises:
          UserError: they are more than the cache has.
        """
        if num_tokens > self.capacity:
            raise UserError(
                f"{num_tokens} tokens don't fit into a KV cache of {self.capacity}; give it more room."
            )
        begin = self.kv_cache.length
        begin = jnp.where(begin + num_tokens <= self.capacity, begin, 0)
        slots = jnp.arange(self.capacity)
        is_overwritten = (slots >= begin) & (slots < begin + num_tokens)
        # Of all rows alike, whichever of them the slots are empty in.
        oldest_kept = jnp.max(jnp.where(is_overwritten, self.segment_of_slot + 1, 0))
        is_kept = ~is_overwritten & (self.segment_of_slot >= oldest_kept)
        return self._replace(
            kv_cache=self.kv_cache._replace(length=begin),
            is_filled=self.is_filled & is_kept[None],
        )

    def with_pushed(self, kv_cache: KVCache, is_real: jax.Array) -> "DocumentCache":
        """The cache after all layers are written of tokens, `is_real [rows, M]` where there is one."""
        begin, num_tokens = self.kv_cache.length, is_real.shape[1]
        write = jax.lax.dynamic_update_slice_in_dim
        return self._replace(
            kv_cache=kv_cache._replace(length=begin + num_tokens),
            is_filled=write(self.is_filled, is_real, begin, axis=1),
            segment_of_slot=write(
                self.segment_of_slot, jnp.full(num_tokens, self.segment), begin, axis=0
            ),
        )

    def after_segment(self, num_positions: jax.Array | int) -> "DocumentCache":
        """The cache when a segment is whole; it took so many positions, scalar or `[rows]`."""
        return self._replace(segment=self.segment + 1, position=self.position + num_positions)

    def forgotten(self, is_forgotten: jax.Array) -> "DocumentCache":
        """The cache with nothing in some rows, bool `[rows]`, whose documents begin anew."""
        return self._replace(
            is_filled=self.is_filled & ~is_forgotten[:, None],
            position=jnp.where(is_forgotten, 0, self.position),
        )


def empty_document_cache(
    num_layers: int, rows: int, num_heads: int, head_width: int, capacity: int, dtype: Any
) -> DocumentCache:
    """A cache with room for `capacity` tokens and none in it."""
    return DocumentCache(
        kv_cache=empty_cache(num_layers, rows, num_heads, head_width, capacity, dtype),
        is_filled=jnp.zeros((rows, capacity), bool),
        segment_of_slot=jnp.full(capacity, _NEVER_WRITTEN, jnp.int32),
        segment=jnp.zeros((), jnp.int32),
        position=jnp.zeros(rows, jnp.int32),
    )
