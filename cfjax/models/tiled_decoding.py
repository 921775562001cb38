"""Decoding large latents in overlapping tiles, in the memory of one tile."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError


def decode_tiled(
    decode: Callable[[jax.Array], jax.Array],
    latents: jax.Array,
    downsampling: int,
    tile: int,
    overlap: int,
) -> jax.Array:
    """Decodes tile after tile and blends them linearly where they overlap.

    Not what `decode` gives for the whole: norms and attention of an autoencoder see one tile each.
    Latents no larger than a tile are decoded as a whole.

    Args:
      decode: latents `[batch, h, w, c]` to images `[batch, h * downsampling, w * downsampling, C]`.
      latents: of any height and width.
      downsampling: pixels a latent along one side.
      tile: height and width of a tile, in latents.
      overlap: of neighbouring tiles at least, in latents.

    Raises:
      UserError: tiles that do not advance.
    """
    if not 0 <= overlap < tile:
        raise UserError(
            f"tiles of {tile} latents cannot overlap by {overlap}; take 0 to {tile - 1}."
        )
    batch, height, width, _ = latents.shape
    if height <= tile and width <= tile:
        return decode(latents)
    size = (min(tile, height), min(tile, width))
    corners = [
        (row, column)
        for row in _starts(height, size[0], overlap)
        for column in _starts(width, size[1], overlap)
    ]
    ramps = [_ramp(side * downsampling, overlap * downsampling) for side in size]
    weight = np.outer(*ramps).astype(np.float32)
    total = np.zeros((height * downsampling, width * downsampling), np.float32)
    for row, column in np.multiply(corners, downsampling):
        total[row : row + weight.shape[0], column : column + weight.shape[1]] += weight

    first = jax.eval_shape(
        decode, jax.ShapeDtypeStruct((batch, *size, latents.shape[3]), latents.dtype)
    )
    canvas = jnp.zeros((batch, *total.shape, first.shape[3]), first.dtype)

    def add_tile(canvas, corner):
        row, column = corner
        part = jax.lax.dynamic_slice_in_dim(latents, row, size[0], axis=1)
        part = jax.lax.dynamic_slice_in_dim(part, column, size[1], axis=2)
        start = (0, row * downsampling, column * downsampling, 0)
        before = jax.lax.dynamic_slice(canvas, start, first.shape)
        decoded = before + decode(part) * weight[None, :, :, None]
        return jax.lax.dynamic_update_slice(canvas, decoded, start), None

    canvas, _ = jax.lax.scan(add_tile, canvas, jnp.asarray(corners, jnp.int32))
    return canvas / total[None, :, :, None]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side; the last ends where the side does."""
    return sorted({min(start, length - tile) for start in range(0, length, max(1, tile - overlap))})


def _ramp(length: int, overlap: int) -> np.ndarray:
    """Weights that rise over the overlap at both ends and are never zero."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
    return np.minimum(1.0, (distance - 0.5) / max(overlap, 0.5))
