"""Layers of the 2015 Inception network (arXiv 1512.00567): pixels, convolutions, pools and blocks.

All run in float32 at the highest precision, since FID depends on it. Convolutions of one pixel that
share an input are one wide convolution; an average pool comes after the convolution of one pixel that
it precedes in the paper, with which it commutes, and so has fewer channels.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INPUT_SIZE = 299
_EPSILON = 1e-3  # of the batch normalization
_PRECISION = lax.Precision.HIGHEST


def resize(images: jax.Array, size: int = INPUT_SIZE) -> jax.Array:
    """Bilinear, float32 `[batch, size, size, channels]`, as TensorFlow 1 does in the graph.

    Pixel i of the result lies at i * input / output, without the half pixel that other rules add, and
    nothing is smoothed before it shrinks. (`jax.image.resize` differs by up to 32 of 255 levels.)
    """
    images = images.astype(jnp.float32)
    for axis in (2, 1):
        low, high, weight = _places(images.shape[axis], size)
        weight = jnp.asarray(weight.reshape([-1 if i == axis else 1 for i in range(images.ndim)]))
        low, high = jnp.take(images, low, axis), jnp.take(images, high, axis)
        images = low + (high - low) * weight
    return images


def _places(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both neighbours of each new pixel, and the weight of the second."""
    places = np.arange(after, dtype=np.float32) * np.float32(before / after)
    low = places.astype(np.int32)
    return low, np.minimum(low + 1, before - 1), places - low.astype(np.float32)


class Unit(NamedTuple):
    """A convolution without bias and the affine map that its batch normalization is.

    Attributes:
      kernel: `[height, width, inputs, outputs]`.
      scale: `[outputs]`.
      shift: `[outputs]`.
    """

    kernel: jax.Array
    scale: jax.Array
    shift: jax.Array


class UnitParams(nn.Module):
    """Parameters of a `Unit`, one to one those of the published files."""

    outputs: int
    kernel_size: tuple[int, int]

    @nn.compact
    def __call__(self, inputs: int) -> Unit:
        """The unit for so many input channels."""
        shape = (*self.kernel_size, inputs, self.outputs)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        gamma = self.param("gamma", nn.initializers.ones, (self.outputs,))
        beta = self.param("beta", nn.initializers.zeros, (self.outputs,))
        mean = self.param("mean", nn.initializers.zeros, (self.outputs,))
        variance = self.param("variance", nn.initializers.ones, (self.outputs,))
        scale = gamma / jnp.sqrt(variance + _EPSILON)
        return Unit(kernel, scale, beta - mean * scale)


def convolve(
    x: jax.Array,
    name: str,
    outputs: int,
    kernel_size: tuple[int, int] = (3, 3),
    stride: int = 1,
    padding: str = "SAME",
) -> jax.Array:
    """Convolution, batch normalization and ReLU, with the parameters of that name."""
    unit = UnitParams(outputs, kernel_size, name=name)(x.shape[-1])
    return nn.relu(_affine(_convolve(x, unit.kernel, stride, padding), unit))


def pointwise(x: jax.Array, outputs: Mapping[str, int], pool: str | None = None) -> list[jax.Array]:
    """Several convolutions of one pixel at once.

    Args:
      x: `[batch, height, width, channels]`.
      outputs: channels by name of the parameters.
      pool: the name among them that an average pool comes with.

    Returns:
      What `convolve` gives for each, and for `pool` of the pooled `x`.
    """
    units = [UnitParams(n, (1, 1), name=name)(x.shape[-1]) for name, n in outputs.items()]
    wide = _convolve(x, jnp.concatenate([unit.kernel for unit in units], axis=-1))
    parts = jnp.split(wide, np.cumsum([*outputs.values()])[:-1], axis=-1)
    return [
        nn.relu(_affine(average_pool(part) if name == pool else part, unit))
        for name, unit, part in zip(outputs, units, parts, strict=True)
    ]


def _convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    # XLA's CPU backend is three to four times as fast with padding as without, also if what touches
    # it is cut off again; the numbers are the same.
    crops = padding == "VALID" and stride == 1 and kernel.shape[:2] == (3, 3)
    x = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME" if crops else padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_PRECISION,
    )
    return x[:, 1:-1, 1:-1] if crops else x


def _affine(x: jax.Array, unit: Unit) -> jax.Array:
    scale, shift = (value.reshape(1, 1, 1, -1) for value in (unit.scale, unit.shift))
    return x * scale + shift


def average_pool(x: jax.Array) -> jax.Array:
    """Mean over 3x3 pixels, of those within the image alone: padding does not count."""
    return _sum_of_3x3(x) / _sum_of_3x3(jnp.ones((1, *x.shape[1:3], 1)))


def _sum_of_3x3(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")


def max_pool(x: jax.Array, stride: int, padding: str) -> jax.Array:
    """Maximum over 3x3 pixels."""
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


class BlockA(nn.Module):
    """35x35 pixels: Mixed_5b, 5c, 5d."""

    pool_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, 224 + pool_outputs]`."""
        outputs = {"branch1x1": 64, "branch5x5_1": 48, "branch3x3dbl_1": 64}
        pooled = {"branch_pool": self.pool_outputs}
        one, five, double, pool = pointwise(x, outputs | pooled, "branch_pool")
        five = convolve(five, "branch5x5_2", 64, (5, 5))
        double = convolve(double, "branch3x3dbl_2", 96)
        double = convolve(double, "branch3x3dbl_3", 96)
        return jnp.concatenate([one, five, double, pool], axis=-1)


class BlockB(nn.Module):
    """From 35x35 to 17x17 pixels: Mixed_6a."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height', width', 480 + channels]`."""
        three = convolve(x, "branch3x3", 384, (3, 3), 2, "VALID")
        double = convolve(x, "branch3x3dbl_1", 64, (1, 1))
        double = convolve(double, "branch3x3dbl_2", 96)
        double = convolve(double, "branch3x3dbl_3", 96, (3, 3), 2, "VALID")
        return jnp.concatenate([three, double, max_pool(x, 2, "VALID")], axis=-1)


class BlockC(nn.Module):
    """17x17 pixels: Mixed_6b to 6e."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, 768]`, of which the first 192 channels are branch1x1."""
        outputs = {"branch1x1": 192, "branch7x7_1": self.width, "branch7x7dbl_1": self.width}
        one, seven, double, pool = pointwise(x, outputs | {"branch_pool": 192}, "branch_pool")
        seven = convolve(seven, "branch7x7_2", self.width, (1, 7))
        seven = convolve(seven, "branch7x7_3", 192, (7, 1))
        double = convolve(double, "branch7x7dbl_2", self.width, (7, 1))
        double = convolve(double, "branch7x7dbl_3", self.width, (1, 7))
        double = convolve(double, "branch7x7dbl_4", self.width, (7, 1))
        double = convolve(double, "branch7x7dbl_5", 192, (1, 7))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class BlockD(nn.Module):
    """From 17x17 to 8x8 pixels: Mixed_7a."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height', width', 512 + channels]`."""
        three, seven = pointwise(x, {"branch3x3_1": 192, "branch7x7x3_1": 192})
        three = convolve(three, "branch3x3_2", 320, (3, 3), 2, "VALID")
        seven = convolve(seven, "branch7x7x3_2", 192, (1, 7))
        seven = convolve(seven, "branch7x7x3_3", 192, (7, 1))
        seven = convolve(seven, "branch7x7x3_4", 192, (3, 3), 2, "VALID")
        return jnp.concatenate([three, seven, max_pool(x, 2, "VALID")], axis=-1)


class BlockE(nn.Module):
    """8x8 pixels: Mixed_7b, and Mixed_7c, which pools by the maximum (likely an error of 2015)."""

    is_last: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, 2048]`."""
        outputs = {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448}
        if self.is_last:
            one, three, double = pointwise(x, outputs)
            pool = convolve(max_pool(x, 1, "SAME"), "branch_pool", 192, (1, 1))
        else:
            one, three, double, pool = pointwise(x, outputs | {"branch_pool": 192}, "branch_pool")
        double = convolve(double, "branch3x3dbl_2", 384)
        branches = [one, *_fork(three, "branch3x3_2"), *_fork(double, "branch3x3dbl_3"), pool]
        return jnp.concatenate(branches, axis=-1)


def _fork(x: jax.Array, name: str) -> Sequence[jax.Array]:
    """A flat and an upright convolution of the same input."""
    return convolve(x, f"{name}a", 384, (1, 3)), convolve(x, f"{name}b", 384, (3, 1))
