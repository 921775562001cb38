"""The generalized causal mask of a training sequence: as terms, and packed for kernels.

The sequence holds C condition tokens, M clean tokens and k noised copies of L tokens. A token sees
the keys of a prefix and those of one window: the prefix holds the condition tokens and the clean
tokens of the AR steps before its own (a clean token's: its own AR step too), the window the noised
tokens of its own AR step and copy (a context token's: none). So one integer tells a kernel all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from cfjax.errors import UserError
from cfjax.factorization import CLEAN, CONDITION, NOISED, MaskTerms, mask_terms


def sequence_mask_terms(
    ar_step_ids: jax.Array, num_condition: int, num_clean: int, copies: int
) -> tuple[MaskTerms, MaskTerms]:
    """Terms of the context (condition and clean tokens) and of the noised tokens.

    Args:
      ar_step_ids: `[batch, L]`.
      num_condition, num_clean, copies: C, M and k.
    """
    batch, num_tokens = ar_step_ids.shape
    lengths = [num_condition, num_clean] + [num_tokens] * copies
    kinds = [CONDITION, CLEAN] + [NOISED + copy for copy in range(copies)]
    kinds = jnp.repeat(jnp.array(kinds), jnp.array(lengths), total_repeat_length=sum(lengths))
    condition_ids = jnp.zeros((batch, num_condition), ar_step_ids.dtype)
    ids = [condition_ids, ar_step_ids[:, :num_clean]] + [ar_step_ids] * copies
    terms = mask_terms(kinds[None], jnp.concatenate(ids, axis=1), num_tokens)
    num_context = num_condition + num_clean
    return (
        jax.tree.map(lambda term: term[:, :num_context], terms),
        jax.tree.map(lambda term: term[:, num_context:], terms),
    )


@dataclasses.dataclass(frozen=True)
class MaskFunction:
    """Unpacks the integer of a query and compares it with the position of a key.

    Attributes:
      num_condition, num_clean, num_tokens, copies: C, M, L and k.
    """

    num_condition: int
    num_clean: int
    num_tokens: int
    copies: int

    def __post_init__(self):
        if sum(self._bits) > 31:
            raise UserError(
                f"splash attention packs what a query sees in 31 bits, but {self.num_condition}"
                f" condition, {self.num_clean} clean and {self.copies} x {self.num_tokens} noised"
                f' tokens take {sum(self._bits)}; use model.attention="fused".'
            )

    @property
    def length(self) -> int:
        """T, tokens of the sequence."""
        return self.num_condition + self.num_clean + self.copies * self.num_tokens

    @property
    def _bits(self) -> tuple[int, int, int]:
        """Of the length of the prefix, the size of the window, the index of the copy."""
        largest = (self.num_condition + self.num_clean, self.num_tokens, self.copies - 1)
        return tuple(number.bit_length() for number in largest)

    def pack(self, ar_step_ids: jax.Array) -> jax.Array:
        """What each query sees: AR-step ids `[batch, L]` to int32 `[batch, T]`."""
        batch, num_tokens = ar_step_ids.shape
        positions = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (batch, num_tokens))
        begins = jnp.diff(ar_step_ids, axis=1, prepend=-1) != 0
        ends = jnp.roll(begins, -1, axis=1)  # the first token begins an AR step: the last ends one
        begin = jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)
        end = jax.lax.cummin(jnp.where(ends, positions + 1, num_tokens), axis=1, reverse=True)

        prefix_bits, window_bits, _ = self._bits
        condition = jnp.full((batch, self.num_condition), self.num_condition, jnp.int32)
        clean = self.num_condition + jnp.minimum(end, self.num_clean)[:, : self.num_clean]
        noised = self.num_condition + begin + ((end - begin) << prefix_bits)
        copies = [noised + (copy << (prefix_bits + window_bits)) for copy in range(self.copies)]
        return jnp.concatenate([condition, clean, *copies], axis=1)

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether queries of these integers see the keys at these positions; shapes broadcast."""
        prefix_bits, window_bits, _ = self._bits
        prefix = query & ((1 << prefix_bits) - 1)
        window, begin = query >> prefix_bits, prefix + self.num_clean
        if self.copies > 1:
            begin = begin + (window >> window_bits) * self.num_tokens
            window = window & ((1 << window_bits) - 1)
        return (key < prefix) | ((key >= begin) & (key < begin + window))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["queries"], meta_fields=["function"]
)
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """The mask of a batch.

    Attributes:
      queries: int32 `[batch, T]`, from `MaskFunction.pack`.
      function: what unpacks them (static).
    """

    queries: jax.Array
    function: MaskFunction
