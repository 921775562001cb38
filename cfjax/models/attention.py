"""Multi-head attention with query and key norms, over a KV cache and the tokens at hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cfjax.models.layers import dense, layer_norm
from cfjax.models.masks import PackedMask
from cfjax.models.rotary import Rotation, rotate

HEADS = ("batch", "sequence", "activation_heads", "activation_head_width")
ATTENDED = "attended"  # what attention returns, for policies that keep it for the backward pass


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None,
    cached: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention; logits and softmax in float32.

    Args:
      queries: `[batch, Q, heads, E]`, already scaled.
      keys, values: `[batch, K, heads, E]`.
      mask: bool, True where a query may attend, broadcastable to `[batch, Q, N + K]`, or None for
        all.
      cached: keys and values before these, `[batch, heads, E, N]`; read without being copied.

    Returns:
      `[batch, Q, heads, E]` in the dtype of the values.
    """
    # Heads before tokens, as the matrix products want them.
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("bhqe,bhke->bhqk", queries, keys)
    if cached is not None:
        logits = jnp.concatenate([product("bhqe,bhen->bhqn", queries, cached[0]), logits], axis=-1)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    # Divided by their sum only after the product with the values, which is smaller.
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)

    weights = weights.astype(values.dtype)
    num_cached = weights.shape[-1] - keys.shape[2]
    attended = product("bhqk,bhke->bhqe", weights[..., num_cached:], values)
    if cached is not None:
        attended += product("bhqn,bhen->bhqe", weights[..., :num_cached], cached[1])
    return (attended / total).astype(values.dtype).swapaxes(1, 2)


class Attention(nn.Module):
    """Self-attention of `x [batch, T, D]`, with cached keys and values before its own.

    A pair of masks splits the queries: the first n see the first n keys under the first mask,
    `[batch, n, n]`, the others all keys under the second. A packed mask takes splash attention. With a
    rotation, queries and keys are turned by their positions.

    Returns `(output [batch, T, D], keys, values)`; keys (after their norm) and values are those of
    `x` alone, `[batch, T, heads, E]`, ready to be cached.
    """

    num_heads: int
    dtype: jnp.dtype
    gradient_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cached: tuple[jax.Array, jax.Array] | None,
        mask: jax.Array | tuple[jax.Array, jax.Array] | PackedMask | None,
        rotation: Rotation | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        width = x.shape[-1]
        head_width = width // self.num_heads
        dtypes = {"dtype": self.dtype, "gradient_dtype": self.gradient_dtype}
        qkv = dense(
            (3, self.num_heads, head_width),
            ("width", "qkv", "heads", "head_width"),
            use_bias=False,
            **dtypes,
            name="qkv",
        )(x)
        queries, keys, values = (part.squeeze(2) for part in jnp.split(qkv, 3, axis=2))
        queries = layer_norm("head_width", dtype=self.dtype, name="q_norm")(queries)
        queries = queries * head_width**-0.5
        keys = layer_norm("head_width", dtype=self.dtype, name="k_norm")(keys)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        queries, keys, values = (
            nn.with_logical_constraint(heads, HEADS) for heads in (queries, keys, values)
        )
        if isinstance(mask, PackedMask):
            # Imported where it is used: it needs names that not every version of jax has.
            from cfjax.models.splash_attention import splash_attention

            attended = splash_attention(queries, keys, values, mask, HEADS, ATTENDED)
        elif isinstance(mask, tuple):
            n = mask[0].shape[-1]
            first = attend(queries[:, :n], keys[:, :n], values[:, :n], mask[0])
            others = attend(queries[:, n:], keys, values, mask[1])
            attended = checkpoint_name(jnp.concatenate([first, others], axis=1), ATTENDED)
        elif cached is not None:
            attended = attend(queries, keys, values, mask, cached)
        else:
            attended = checkpoint_name(attend(queries, keys, values, mask), ATTENDED)
        output = dense(
            width, ("heads", "head_width", "width"), axis=(-2, -1), **dtypes, name="proj"
        )(attended)
        return output, keys, values
