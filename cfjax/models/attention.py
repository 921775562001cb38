"""Multi-head attention with query and key norms, over a KV cache and the tokens at hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfjax.models.layers import dense, layer_norm

HEADS = ("batch", "sequence", "activation_heads", "activation_head_width")


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Softmax attention; logits and softmax in float32.

    Args:
      queries: `[batch, Q, heads, E]`, already scaled.
      keys, values: `[batch, K, heads, E]`.
      mask: bool, True where a query may attend, broadcastable to `[batch, Q, K]`, or None for all.

    Returns:
      `[batch, Q, heads, E]` in the dtype of `values`.
    """
    logits = jnp.einsum("bqhe,bkhe->bhqk", queries, keys, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    return jnp.einsum("bhqk,bkhe->bqhe", weights, values)


class Attention(nn.Module):
    """Self-attention of `x [batch, T, D]`, with cached keys and values before its own.

    A pair of masks splits the queries: the first n see the first n keys under the first mask,
    `[batch, n, n]`, the others all keys under the second.

    Returns `(output [batch, T, D], keys, values)`; keys (after their norm) and values are those of
    `x` alone, `[batch, T, heads, E]`, ready to be cached.
    """

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cached: tuple[jax.Array, jax.Array] | None,
        mask: jax.Array | tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        width = x.shape[-1]
        head_width = width // self.num_heads
        qkv = dense(
            (3, self.num_heads, head_width),
            ("width", "qkv", "heads", "head_width"),
            use_bias=False,
            dtype=self.dtype,
            name="qkv",
        )(x)
        queries, keys, values = (qkv[:, :, i] for i in range(3))
        queries = layer_norm("head_width", dtype=self.dtype, name="q_norm")(queries)
        queries = queries * head_width**-0.5
        keys = layer_norm("head_width", dtype=self.dtype, name="k_norm")(keys)
        queries, keys, values = (
            nn.with_logical_constraint(heads, HEADS) for heads in (queries, keys, values)
        )
        all_keys, all_values = keys, values
        if cached is not None:
            all_keys = jnp.concatenate([cached[0].astype(keys.dtype), keys], axis=1)
            all_values = jnp.concatenate([cached[1].astype(values.dtype), values], axis=1)
        if isinstance(mask, tuple):
            n = mask[0].shape[-1]
            first = attend(queries[:, :n], keys[:, :n], values[:, :n], mask[0])
            others = attend(queries[:, n:], keys, values, mask[1])
            attended = jnp.concatenate([first, others], axis=1)
        else:
            attended = attend(queries, all_keys, all_values, mask)
        output = dense(
            width, ("heads", "head_width", "width"), axis=(-2, -1), dtype=self.dtype, name="proj"
        )(attended)
        return output, keys, values
