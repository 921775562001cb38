"""Layers of the transformer: norm, linear maps, MLP, timestep embedding, sin-cos positions.

Parameters are float32 and carry logical axes; norms and softmax run in float32, matrix products in
the compute dtype. The gradients of the weights are summed, over examples and devices, in a dtype of
their own.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from cfjax.sharding import with_logical_axes

TIMESTEP_FEATURES = 256
LINEAR = "linear"  # what a linear map returns, for policies that keep it for the backward pass


def dense(
    features: int | tuple[int, ...],
    kernel_axes: tuple[str, ...],
    *,
    axis: int | tuple[int, ...] = -1,
    use_bias: bool = True,
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform(),  # noqa: B008
    dtype: jnp.dtype,
    gradient_dtype: jnp.dtype,
    name: str | None = None,
) -> nn.DenseGeneral:
    """A linear map with Xavier-uniform weights, zero bias and logical axes.

    The gradient of the weights is summed in `gradient_dtype`, over devices too.
    """
    num_inputs = 1 if isinstance(axis, int) else len(axis)
    outputs = kernel_axes[num_inputs:]
    bias_axes = tuple("vector_width" if name == "width" else name for name in outputs)
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=dtype,
        promote_dtype=_promote_all_but_kernel,
        dot_general=functools.partial(_linear_map, gradient_dtype=jnp.dtype(gradient_dtype)),
        kernel_init=with_logical_axes(kernel_init, kernel_axes),
        bias_init=with_logical_axes(nn.initializers.zeros_init(), bias_axes),
        name=name,
    )


def _promote_all_but_kernel(inputs: jax.Array, kernel: jax.Array, bias: Any, *, dtype: Any) -> Any:
    return inputs.astype(dtype), kernel, bias if bias is None else bias.astype(dtype)


def _linear_map(
    x: jax.Array, kernel: jax.Array, dimensions: Any, precision: None, gradient_dtype: jnp.dtype
) -> jax.Array:
    """`x [..., inputs]` times a float32 `kernel [inputs, outputs]`, each of one or more dimensions.

    Autodiff would cast the kernel's gradient to the dtype of `x` before devices add up theirs.
    """
    if gradient_dtype == x.dtype:
        product = jax.lax.dot_general(x, kernel.astype(x.dtype), dimensions, precision)
    else:
        product = _product(x, kernel, dimensions, gradient_dtype)
    return checkpoint_name(product, LINEAR)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, kernel: jax.Array, dimensions: Any, _: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(x, kernel.astype(x.dtype), dimensions)


def _product_forward(x, kernel, dimensions, gradient_dtype):
    return _product(x, kernel, dimensions, gradient_dtype), (x, kernel)


def _product_backward(dimensions, gradient_dtype, saved, gradient):
    x, kernel = saved
    num_inputs = len(dimensions[0][0])
    outputs = tuple(range(num_inputs, kernel.ndim))
    last = tuple(range(gradient.ndim - len(outputs), gradient.ndim))
    of_x = jax.lax.dot_general(gradient, kernel.astype(x.dtype), ((last, outputs), ((), ())))
    examples = tuple(range(x.ndim - num_inputs))
    of_kernel = jax.lax.dot_general(
        x, gradient, ((examples, examples), ((), ())), preferred_element_type=gradient_dtype
    )
    return of_x, of_kernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def layer_norm(axis_name: str, *, dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
    """Layer normalization over the last axis with scale and bias (ε = 1e-5).

    Computed in float32 and returned in `dtype`.
    """
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    return nn.LayerNorm(
        epsilon=1e-5,
        use_fast_variance=False,
        dtype=dtype,
        scale_init=with_logical_axes(ones, (axis_name,)),
        bias_init=with_logical_axes(zeros, (axis_name,)),
        name=name,
    )


class Mlp(nn.Module):
    """Two linear maps with tanh-approximated GELU between them: `[batch, T, D]` to the same."""

    hidden_width: int
    dtype: jnp.dtype
    gradient_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        dtypes = {"dtype": self.dtype, "gradient_dtype": self.gradient_dtype}
        x = dense(self.hidden_width, ("width", "mlp"), **dtypes, name="fc1")(x)
        x = nn.with_logical_constraint(x, ("batch", "sequence", "activation_mlp"))
        x = nn.gelu(x, approximate=True)
        return dense(width, ("mlp", "width"), **dtypes, name="fc2")(x)


def timestep_features(t: jax.Array, num_features: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoidal features of timesteps: `t [...]` to float32 `[..., num_features]`.

    Cosines first, then sines, of t times frequencies falling from 1 towards 1 / `max_period`; an
    odd width ends with a zero.
    """
    half = num_features // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = t[..., None].astype(jnp.float32) * frequencies.reshape((1,) * t.ndim + (half,))
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    padding = [(0, 0)] * t.ndim + [(0, num_features - 2 * half)]
    return jnp.pad(features, padding)


class TimestepEmbedding(nn.Module):
    """Timesteps `[...]` to embeddings `[..., D]`: sinusoidal features, linear, SiLU, linear."""

    width: int
    dtype: jnp.dtype
    gradient_dtype: jnp.dtype

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        features = timestep_features(t, TIMESTEP_FEATURES).astype(self.dtype)
        dtypes = {"dtype": self.dtype, "gradient_dtype": self.gradient_dtype}
        hidden = dense(self.width, ("features", "mlp"), **dtypes, name="fc1")(features)
        return dense(self.width, ("mlp", "width"), **dtypes, name="fc2")(nn.silu(hidden))


def sincos_positions(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Frozen 2-D sin-cos position table, float64 `[L, D]` in row-major grid order.

    The first half of the width encodes the column and the second half the row, each as sines then
    cosines of the index times 10000^(-4 i / D).
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    row, column = (axis.ravel() for axis in np.indices(grid))
    parts = []
    for index in (column, row):
        angles = np.outer(index, frequencies)
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, axis=1)
