"""Rotary positions (RoFormer, arXiv 2104.09864): queries and keys turned by where they stand.

The product of a query and a key then depends on the distance between them alone, so that a sequence
may be longer than those trained on as long as what is attended to is not farther away.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_PERIOD = 10_000.0


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each token, float32 `[batch, T, 1, E / 2]`."""

    cosines: jax.Array
    sines: jax.Array


def rotation(positions: jax.Array, head_width: int) -> Rotation:
    """The rotation of tokens at integer positions `[batch, T]`; at position 0 it changes no bit.

    Args:
      positions: of the tokens in their document.
      head_width: E, even.
    """
    half = head_width // 2
    frequencies = (MAX_PERIOD ** (-np.arange(half) / half)).astype(np.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(heads: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns `[batch, T, heads, E]`, of which feature i and i + E / 2 are a pair; in float32."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosines, sines = rotation
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1).astype(heads.dtype)
