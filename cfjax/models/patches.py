"""Images or latents to tokens and back."""

import jax


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """`[batch, H, W, C]` to tokens `[batch, L, p * p * C]`.

    Tokens are in row-major grid order; within a token the order is row, column, channel.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(tokens: jax.Array, patch_size: int, grid: tuple[int, int]) -> jax.Array:
    """Inverse of `patchify`: tokens `[batch, L, p * p * C]` to `[batch, H, W, C]`."""
    batch, _, token_width = tokens.shape
    rows, columns = grid
    channels = token_width // (patch_size * patch_size)
    patches = tokens.reshape(batch, rows, columns, patch_size, patch_size, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, rows * patch_size, columns * patch_size, channels)
