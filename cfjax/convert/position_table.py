"""Position tables for another grid of tokens: learned ones interpolated, frozen ones computed anew."""

import math

import numpy as np

# Of Keys' cubic kernel. PyTorch's, by which DeiT, MAE and DINO take their tables to other sizes.
_SHARPNESS = -0.75


def is_of_other_grid(table: tuple[int, ...] | None, expected: tuple[int, ...]) -> bool:
    """Whether a shape `(1, L, D)` is that of as wide a model with another square grid."""
    return (
        table is not None
        and len(table) == 3
        and (table[0], table[2]) == (expected[0], expected[2])
        and table[1] != expected[1]
        and math.isqrt(table[1]) ** 2 == table[1]
    )


def interpolate(table: np.ndarray, before: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """A learned table for another grid, bicubically.

    As `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: the image is the same
    and its edges are repeated outwards.

    Args:
      table: `[rows * columns, D]`, of the grid `before`.
      before: (rows, columns).
      grid: (rows, columns) of the result.

    Returns:
      `[rows * columns, D]` of float32.
    """
    width = table.shape[-1]
    rows, columns = (_matrix(*sizes) for sizes in zip(before, grid, strict=True))
    images = table.reshape(*before, width).astype(np.float64)
    resized = np.einsum("ab,bcd->acd", rows, images, optimize=True)
    resized = np.einsum("ab,cbd->cad", columns, resized, optimize=True)
    return resized.astype(np.float32).reshape(-1, width)


def remark(before: tuple[int, int], grid: tuple[int, int], is_learned: bool) -> str:
    """The sentence that says what becomes of the table."""
    how = "interpolated bicubically to the"
    if not is_learned:
        how = "the frozen sin-cos table, and gives way to that of"
    sizes = [f"{rows}x{columns}" for rows, columns in (before, grid)]
    return f"The position table of {sizes[0]} tokens is {how} {sizes[1]} of the config."


def _matrix(size: int, new_size: int) -> np.ndarray:
    """`[new_size, size]`: the weights of the old values in each of the new ones."""
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centres).astype(np.int64)
    matrix = np.zeros((new_size, size))
    for offset in (-1, 0, 1, 2):
        neighbour = first + offset
        inside = np.clip(neighbour, 0, size - 1)
        np.add.at(matrix, (np.arange(new_size), inside), _kernel(np.abs(centres - neighbour)))
    return matrix


def _kernel(distance: np.ndarray) -> np.ndarray:
    a = _SHARPNESS
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
