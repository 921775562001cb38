"""What a checkpoint says of its arrays, and whether they fit a model."""

import importlib.metadata
from typing import Any

import jax
from etils import epath

from cfjax.checkpoint_folders import document_name
from cfjax.errors import UserError

_MAX_LISTED = 3


def describe(arrays: dict[str, Any]) -> dict[str, Any]:
    """Versions, mesh, number of processes, and every array's name, shape and dtype, as JSON.

    Args:
      arrays: trees of global arrays by item.
    """
    (mesh, *_) = (leaf.sharding.mesh for leaf in jax.tree.leaves(arrays))
    return {
        "versions": {name: _version(name) for name in ("cfjax", "jax")},
        "mesh": dict(mesh.shape),
        "num_processes": jax.process_count(),
        "arrays": {
            item: {
                name: [list(leaf.shape), leaf.dtype.name]
                for name, leaf in _named_leaves(tree).items()
            }
            for item, tree in arrays.items()
        },
    }


def abstract_tree(described: dict[str, list], sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """Nested dicts of `ShapeDtypeStruct`s from the names, shapes and dtypes of one item."""
    tree = {}
    for name, (shape, dtype) in described.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return tree


def check_architecture(
    folder: epath.Path, item: str, described: dict[str, list], target: Any
) -> None:
    """Refuses a tree whose names or shapes differ from what an item of a checkpoint describes.

    Raises:
      UserError: they differ; some are named.
    """
    there = {name: tuple(shape) for name, (shape, _) in described.items()}
    here = {name: leaf.shape for name, leaf in _named_leaves(target).items()}
    differing = [name for name in there.keys() | here.keys() if there.get(name) != here.get(name)]
    if differing:
        # Parameters say more than the optimizer's moments, which differ with them.
        differing.sort(key=lambda name: (name.startswith("opt_state"), name))
        prefix = "ema_params/" if item == "ema" else ""
        listed = [
            f"{prefix}{name} is {there.get(name, 'absent')} in the checkpoint but {here.get(name, 'absent')}"
            " in the config"
            for name in differing[:_MAX_LISTED]
        ]
        if len(differing) > _MAX_LISTED:
            listed.append(f"and {len(differing) - _MAX_LISTED} more")
        config_path = folder / "config" / document_name("config")
        raise UserError(
            f"the checkpoint {folder} is of another architecture: {', '.join(listed)}; use the"
            f" config it was trained with ({config_path}) or another workdir."
        )


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
