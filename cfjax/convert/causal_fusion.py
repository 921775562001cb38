"""Names of the published PyTorch implementation to our parameters and back, on NumPy arrays.

Published linear weights are (outputs, inputs); ours are (inputs, outputs), with heads as axes of
their own and the layers stacked on the first axis.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from cfjax.convert.report import check_names_and_shapes
from cfjax.errors import UserError
from cfjax.models.layers import sincos_positions

MEND = "check the model size, grid, condition tokens and number of classes."
POSITION_TABLE = "pos_embed"
LAYER = "blocks.{}."
# Published name, our path; in the order of the published model's parameters, in which the layers
# come before its last ones. Layer names stand once, for every layer.
NAMES = {
    POSITION_TABLE: "token_positions",
    "cond_pos_embed": "condition_positions",
    "x_proj.weight": "token_embedding/kernel",
    "x_proj.bias": "token_embedding/bias",
    "t_embedder.mlp.0.weight": "timestep_embedding/fc1/kernel",
    "t_embedder.mlp.0.bias": "timestep_embedding/fc1/bias",
    "t_embedder.mlp.2.weight": "timestep_embedding/fc2/kernel",
    "t_embedder.mlp.2.bias": "timestep_embedding/fc2/bias",
    "y_embedder.embedding_table.weight": "label_table",
    "final_layer.0.weight": "final_norm/scale",
    "final_layer.0.bias": "final_norm/bias",
    "final_layer.1.weight": "final_projection/kernel",
    "final_layer.1.bias": "final_projection/bias",
}
LAYER_NAMES = {
    "norm1.weight": "blocks/norm1/scale",
    "norm1.bias": "blocks/norm1/bias",
    "attn.qkv.weight": "blocks/attn/qkv/kernel",
    "attn.proj.weight": "blocks/attn/proj/kernel",
    "attn.proj.bias": "blocks/attn/proj/bias",
    "attn.q_norm.weight": "blocks/attn/q_norm/scale",
    "attn.q_norm.bias": "blocks/attn/q_norm/bias",
    "attn.k_norm.weight": "blocks/attn/k_norm/scale",
    "attn.k_norm.bias": "blocks/attn/k_norm/bias",
    "norm2.weight": "blocks/norm2/scale",
    "norm2.bias": "blocks/norm2/bias",
    "mlp.fc1.weight": "blocks/mlp/fc1/kernel",
    "mlp.fc1.bias": "blocks/mlp/fc1/bias",
    "mlp.fc2.weight": "blocks/mlp/fc2/kernel",
    "mlp.fc2.bias": "blocks/mlp/fc2/bias",
}


def params_from_published(
    published: Mapping[str, np.ndarray], params_shape: Any, grid: tuple[int, int]
) -> dict[str, Any]:
    """Our parameters from a published state dict.

    Args:
      published: arrays by published name.
      params_shape: the model's parameters, or their shapes (`jax.eval_shape` of the init).
      grid: (rows, columns) of image tokens. A model with frozen positions has no parameter for
        them; the published table is then checked against the sin-cos table.

    Returns:
      A nested dict like `params_shape`, of NumPy arrays in its dtypes.

    Raises:
      UserError: names are missing or extra, or shapes differ; all of them are listed.
    """
    flat = flax.traverse_util.flatten_dict(_unboxed(params_shape), sep="/")
    expected = published_shapes(params_shape, grid)
    shapes = {name: tuple(array.shape) for name, array in published.items()}
    check_names_and_shapes(shapes, expected, MEND)
    if "token_positions" not in flat:
        check_frozen_positions(published[POSITION_TABLE], grid)
    return flax.traverse_util.unflatten_dict(dict(leaves_from_published(published, flat)), sep="/")


def leaves_from_published(
    published: Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields path and array of each of our parameters; `leaves` have their shapes and dtypes."""
    for path, leaf in leaves.items():
        array = np.empty(leaf.shape, leaf.dtype)
        # Filled in place, as a list of layers would be in memory besides their stack.
        layers = array if path.startswith("blocks/") else [array]
        for name, layer in zip(published_names(path, leaf.shape[0]), layers, strict=True):
            layer[...] = _to_ours(name, np.asarray(published[name])).reshape(layer.shape)
        yield path, array


def params_to_published(params: Any, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """The published state dict of our parameters; the inverse of `params_from_published`."""
    flat = flax.traverse_util.flatten_dict(_unboxed(params), sep="/")
    shapes = published_shapes(params, grid)
    published = {}
    for path, value in flat.items():
        published |= dict(leaf_to_published(path, np.asarray(value), shapes))
    if POSITION_TABLE not in published:
        published[POSITION_TABLE] = frozen_positions(shapes[POSITION_TABLE], grid)
    return published


def leaf_to_published(
    path: str, value: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields published names and arrays of our parameter `path`; `shapes` are `published_shapes`."""
    names = published_names(path, value.shape[0])
    arrays = value if path.startswith("blocks/") else [value]
    for name, array in zip(names, arrays, strict=True):
        yield name, _to_published(name, array, shapes[name])


def frozen_positions(shape: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
    """The published table of a model that has no parameter for it."""
    return sincos_positions(shape[-1], grid).astype(np.float32).reshape(shape)


def published_shapes(params_shape: Any, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published state dict of our parameters, or of their shapes, in order."""
    flat = flax.traverse_util.flatten_dict(_unboxed(params_shape), sep="/")
    width = flat["condition_positions"].shape[-1]
    shapes = {POSITION_TABLE: (1, grid[0] * grid[1], width)}
    for path, value in flat.items():
        in_layer = path.startswith("blocks/")
        shape = value.shape[1:] if in_layer else value.shape
        for name in published_names(path, value.shape[0]):
            shapes[name] = _published_shape(name, shape)
    depth = flat["blocks/norm1/scale"].shape[0]
    return {name: shapes[name] for name in _names_in_order(depth)}


def _names_in_order(depth: int) -> list[str]:
    last = [name for name in NAMES if name.startswith("final_layer.")]
    layers = [LAYER.format(layer) + name for layer in range(depth) for name in LAYER_NAMES]
    return [*(name for name in NAMES if name not in last), *layers, *last]


def _unboxed(params: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.unbox() if hasattr(leaf, "unbox") else leaf,
        params,
        is_leaf=lambda leaf: hasattr(leaf, "unbox"),
    )


def published_names(path: str, depth: int) -> list[str]:
    """Published names of our parameter `path`: one, or one for each of `depth` layers."""
    for name, ours in NAMES.items():
        if ours == path:
            return [name]
    for name, ours in LAYER_NAMES.items():
        if ours == path:
            return [LAYER.format(layer) + name for layer in range(depth)]
    raise KeyError(f"parameter {path} has no published name")


def _published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name in (POSITION_TABLE, "cond_pos_embed"):
        return (1, *shape)
    if name == "y_embedder.embedding_table.weight":
        return shape
    if name.endswith("qkv.weight"):
        return (shape[1] * shape[2] * shape[3], shape[0])
    if name.endswith("attn.proj.weight"):
        return (shape[2], shape[0] * shape[1])
    return shape[::-1]


def _is_linear_weight(name: str, array: np.ndarray) -> bool:
    return name.endswith(".weight") and array.ndim > 1 and "embedding_table" not in name


def _to_ours(name: str, array: np.ndarray) -> np.ndarray:
    return array.T if _is_linear_weight(name, array) else array


def _to_published(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if _is_linear_weight(name, array):
        return np.ascontiguousarray(array.reshape(shape[::-1]).T)
    return array.reshape(shape)


def check_frozen_positions(table: np.ndarray, grid: tuple[int, int]) -> None:
    """Refuses a published table `[1, L, D]` other than the sin-cos table.

    Raises:
      UserError: they differ by more than another library's rounding.
    """
    difference = np.abs(table[0] - sincos_positions(table.shape[-1], grid)).max()
    if difference > 1e-5:
        raise UserError(
            f"{POSITION_TABLE} differs from the frozen sin-cos table by up to {difference:.2g}; "
            "load these weights into a model with learned positions."
        )
