"""Editing: which tokens of an image are kept, from masks over its pixels.

What is kept becomes the clean context of the tokens that are generated (see `sampling.Known`). A
token is kept if all of its pixels are, so that at least what was asked for is generated anew.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError, check_choice

KEEPS = ("center", "outside", "top", "bottom", "left", "right", "box", "random")


def kept_pixels(keep: str, size: tuple[int, int], box: Sequence[int] = ()) -> np.ndarray:
    """A mask over an image.

    Args:
      keep: what is kept: "center" (the middle half of both axes), "outside" (all but the center),
        "top", "bottom", "left", "right" (a half) or "box".
      size: (height, width) in pixels.
      box: of "box": (top, left, bottom, right); bottom and right are not in it.

    Returns:
      bool `[H, W]`.

    Raises:
      UserError: an unknown name, or a box that is missing, not needed, or not in the image.
    """
    check_choice("mask", keep, [name for name in KEEPS if name != "random"])
    height, width = size
    if keep != "box":
        if len(box):
            raise UserError(f"the box {list(box)} is for the mask 'box', not for {keep!r}.")
        box = {
            "top": (0, 0, height // 2, width),
            "bottom": (height // 2, 0, height, width),
            "left": (0, 0, height, width // 2),
            "right": (0, width // 2, height, width),
        }.get(keep, (height // 4, width // 4, height - height // 4, width - width // 4))
    if len(box) != 4:
        raise UserError(
            f"the box {list(box)} must be four numbers of pixels: top, left, bottom, right."
        )
    top, left, bottom, right = box
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise UserError(
            f"the box {list(box)} (top, left, bottom, right) is not in the image of {height} x"
            f" {width} pixels."
        )
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return ~mask if keep == "outside" else mask


def kept_tokens(pixels: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Tokens of which all pixels are kept.

    Args:
      pixels: bool `[H, W]`.
      size: (H, W) of the image.
      grid: (rows, columns) of tokens.

    Returns:
      bool `[L]` in grid order.

    Raises:
      UserError: the mask is of another size than the image.
    """
    pixels = np.asarray(pixels)
    if pixels.shape != tuple(size) or pixels.dtype != bool:
        raise UserError(
            f"the mask is {pixels.dtype} {list(pixels.shape)}, but must be bool of the image's"
            f" {list(size)} pixels."
        )
    rows, columns = grid
    patches = pixels.reshape(rows, size[0] // rows, columns, size[1] // columns)
    return patches.all(axis=(1, 3)).reshape(-1)


def random_tokens(keys: jax.Array, ratio: float, grid: tuple[int, int]) -> np.ndarray:
    """As many random tokens in each image; those of a smaller ratio are among those of a larger one.

    Args:
      keys: keys `[batch]`.
      ratio: the share of tokens to be kept, in [0, 1]; rounded to whole tokens.
      grid: (rows, columns) of tokens.

    Returns:
      bool `[batch, L]` in grid order.

    Raises:
      UserError: the ratio is out of range.
    """
    if not 0.0 <= ratio <= 1.0:
        raise UserError(f"keep_ratio is {ratio:g}, but must be in [0, 1].")
    num_tokens = grid[0] * grid[1]
    rank = jax.vmap(lambda key: jax.random.permutation(key, num_tokens))(keys)
    return np.asarray(rank < jnp.int32(round(ratio * num_tokens)))


def generated_pixels(
    is_known: np.ndarray, size: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """The pixels that are generated anew: bool `[..., H, W]` of kept tokens bool `[..., L]`."""
    generated = ~is_known.reshape(*is_known.shape[:-1], *grid)
    for axis in (0, 1):
        generated = generated.repeat(size[axis] // grid[axis], axis=axis - 2)
    return generated
