"""Improved precision and recall, as ADM's evaluation computes them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError, check_choice

ADM_BLOCK_SIZE = 10_000
_ARITHMETICS = ("adm", "float32")
_NO_BALL = -1.0  # squared radius of a padding row: no distance is that small


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """Two shares and how they were computed.

    Attributes:
      precision: of the samples that lie in the reference's manifold.
      recall: of the reference that lies in the samples' manifold.
      k: the nearest neighbour that bounds a ball.
      arithmetic: "adm" or "float32".
    """

    precision: float
    recall: float
    k: int
    arithmetic: str


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    k: int = 3,
    arithmetic: str = "adm",
    block_size: int = ADM_BLOCK_SIZE,
) -> PrecisionRecall:
    """Shares of each set within a ball of the other (Kynkäänniemi et al. 2019, equations 1 and 2).

    A manifold is a union of balls, one about each of a set's vectors, which reaches its k-th nearest
    neighbour in the same set (itself not counted) and holds its border. All distances are squared
    and come in blocks: memory is that of some blocks, 400 MB each at 10,000 x 10,000.

    Args:
      reference, samples: features float32 `[M, F]` and `[N, F]`.
      k: the neighbour.
      arithmetic: of the distances in a block. "adm": float16 as in ADM's evaluation (sums are taken
        in float32 and rounded, what is below 6e-5 is 0), but float32 if one of the block overflows.
        "float32": that everywhere.
      block_size: rows and columns of a block; with "adm" it says which distances overflow together.

    Raises:
      UserError: a set has no k-th neighbours, `k` or `block_size` is below 1, `arithmetic` is
        unknown, a feature is not finite, or the numbers of features differ.
    """
    check_choice("arithmetic", arithmetic, _ARITHMETICS)
    _check(reference, samples, k, block_size)
    reference_radii = _squared_radii(reference, k, arithmetic, block_size)
    samples_radii = _squared_radii(samples, k, arithmetic, block_size)
    is_covered, is_sample_covered = np.zeros(len(reference), bool), np.zeros(len(samples), bool)
    for rows, block, radii in _blocks(reference, reference_radii, block_size):
        for columns, sample_block, sample_radii in _blocks(samples, samples_radii, block_size):
            in_samples, in_reference = jax.device_get(
                _covered(block, sample_block, radii, sample_radii, arithmetic)
            )
            is_covered[rows] |= in_samples[: len(is_covered[rows])]
            is_sample_covered[columns] |= in_reference[: len(is_sample_covered[columns])]
    return PrecisionRecall(float(is_sample_covered.mean()), float(is_covered.mean()), k, arithmetic)


def _squared_radii(x: np.ndarray, k: int, arithmetic: str, block_size: int) -> np.ndarray:
    """float32 `[N]`: the squared distance of each vector to its k-th nearest neighbour."""
    no_radii = np.zeros(len(x), np.float32)  # real rows, though: padding has another number
    radii = np.empty(len(x), np.float32)
    for rows, block, _ in _blocks(x, no_radii, block_size):
        nearest = jnp.full((len(block), k + 1), jnp.inf)  # the vector itself is one of them
        for _, other, other_radii in _blocks(x, no_radii, block_size):
            nearest = _nearest(nearest, block, other, other_radii != _NO_BALL, arithmetic)
        radii[rows] = np.asarray(nearest[:, k])[: len(radii[rows])]
    return radii


@functools.partial(jax.jit, static_argnames="arithmetic")
def _nearest(
    nearest: jax.Array, a: jax.Array, b: jax.Array, is_real: jax.Array, arithmetic: str
) -> jax.Array:
    """The k + 1 smallest `[A, k + 1]`, rising, of those so far and those to the real rows of `b`."""
    distances = jnp.where(is_real[None], _squared_distances(a, b, arithmetic), jnp.inf)
    of_block = -jax.lax.top_k(-distances, min(nearest.shape[1], distances.shape[1]))[0]
    return jnp.sort(jnp.concatenate([nearest, of_block], axis=1))[:, : nearest.shape[1]]


@functools.partial(jax.jit, static_argnames="arithmetic")
def _covered(
    a: jax.Array, b: jax.Array, a_radii: jax.Array, b_radii: jax.Array, arithmetic: str
) -> tuple[jax.Array, jax.Array]:
    """Which of `a` lie in a ball of `b`, `[A]`, and which of `b` in one of `a`, `[B]`."""
    distances = _squared_distances(a, b, arithmetic)
    return (distances <= b_radii[None]).any(axis=1), (distances <= a_radii[:, None]).any(axis=0)


def _squared_distances(a: jax.Array, b: jax.Array, arithmetic: str) -> jax.Array:
    """float32 `[A, B]` of rows of `a` and `b`, not below 0."""

    def distances(round_: Callable[[jax.Array], jax.Array]) -> jax.Array:
        x, y = round_(a), round_(b)
        squares = [round_(jnp.sum(round_(jnp.square(z)), axis=1)) for z in (x, y)]
        products = round_(jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST))
        differences = round_(squares[0][:, None] - 2.0 * products)
        return jnp.maximum(round_(differences + squares[1][None]), 0.0)

    if arithmetic == "float32":
        return distances(lambda x: x)
    in_float16 = distances(_to_float16)
    return jax.lax.cond(
        jnp.isfinite(in_float16).all(), lambda: in_float16, lambda: distances(lambda x: x)
    )


def _to_float16(x: jax.Array) -> jax.Array:
    # A conversion there and back may be taken out by the compiler; this may not.
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)


def _blocks(
    x: np.ndarray, radii: np.ndarray, block_size: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Rows, features and squared radii of blocks of one size: the last padded by zeros and no balls."""
    block_size = min(block_size, len(x))
    for begin in range(0, len(x), block_size):
        rows = slice(begin, begin + block_size)
        block = np.asarray(x[rows], np.float32)
        if not np.isfinite(block).all():
            raise UserError(
                "a feature is not finite; check the images and the extractor's weights."
            )
        padding = block_size - len(block)
        yield (
            rows,
            np.pad(block, [(0, padding), (0, 0)]),
            np.pad(radii[rows], (0, padding), constant_values=_NO_BALL),
        )


def _check(reference: np.ndarray, samples: np.ndarray, k: int, block_size: int) -> None:
    if k < 1 or block_size < 1:
        raise UserError(f"k={k} and block_size={block_size} must be at least 1.")
    if reference.shape[1] != samples.shape[1]:
        raise UserError(
            f"features of sizes {reference.shape[1]} and {samples.shape[1]} can't be compared; take"
            " both from the same extractor."
        )
    if min(len(reference), len(samples)) <= k:
        raise UserError(
            f"{len(reference)} reference images and {len(samples)} samples have no {k} neighbours"
            f" each; give more than {k} of both."
        )
