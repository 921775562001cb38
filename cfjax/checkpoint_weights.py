"""Checkpoints from weights that come from elsewhere, and weights out of checkpoints, in little memory.

A checkpoint of weights alone has no `opt_state`; training that starts from it begins with a fresh
one. With Adam's moments it goes on.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cfjax import checkpoint_folders, checkpoint_metadata
from cfjax.checkpoint_folders import document_name, read_document
from cfjax.errors import UserError
from cfjax.paths import absolute
from cfjax.train_state import TrainState

# Where in a checkpoint parameters, their average, and Adam's moments lie: the item, a path in it.
PLACES = {
    "ema": ("ema", ""),
    "params": ("state", "params"),
    "mu": ("state", "opt_state/1/0/mu"),
    "nu": ("state", "opt_state/1/0/nu"),
}
Arrays = Callable[[], Iterable[tuple[str, np.ndarray]]]


def write(
    workdir: str | PathLike,
    config_json: str,
    abstract_state: TrainState,
    arrays: Mapping[str, Arrays],
    train_step: int = 0,
    examples_seen: int = 0,
) -> epath.Path:
    """Writes a checkpoint, which appears when it is whole.

    Args:
      workdir: a new run's folder, on disk.
      config_json: the run's config.
      abstract_state: `ShapeDtypeStruct`s with shardings, on one device; of the run.
      arrays: "params" and "ema", and with an optimizer state "mu" and "nu" too, to functions that
        make paths and arrays; called one after the other.
      train_step: how many train steps were taken; 0 without an optimizer state.
      examples_seen: in them.

    Returns:
      The checkpoint's folder.

    Raises:
      UserError: the workdir has checkpoints already.
    """
    directory = absolute(workdir) / "checkpoints"
    if checkpoint_folders.train_steps(directory):
        raise UserError(f"there are checkpoints in {workdir} already; pass a new folder.")
    checkpoint_folders.remove_leftovers(directory)
    name = str(train_step)
    partial = directory / checkpoint_folders.temporary_name(name)
    is_weights_only = "mu" not in arrays
    state = {"train_step": abstract_state.train_step, "params": abstract_state.params}
    if not is_weights_only:
        state["opt_state"] = abstract_state.opt_state
    items = {"ema": abstract_state.ema_params, "state": state}
    documents = {
        "config": json.loads(config_json),
        "data": {"examples_seen": examples_seen},
        "metadata": {
            **checkpoint_metadata.describe(items),
            "metric": None,
            "best": None,
            "is_weights_only": is_weights_only,
        },
    }
    for item, document in documents.items():
        (partial / item).mkdir(parents=True)
        (partial / item / document_name(item)).write_text(json.dumps(document))
    # Compressed buffers would stay with the allocator: half of the arrays' size more at the peak.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        for item, abstract in items.items():
            tree = _filled(item, abstract, arrays, train_step)
            checkpointer.save(partial / item, args=ocp.args.PyTreeSave(tree))
            del tree
    return partial.rename(directory / name)


def _filled(item: str, abstract: Any, arrays: Mapping[str, Arrays], train_step: int) -> Any:
    """One item of a checkpoint; its scalars count train steps."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    # Not as NumPy arrays, of which there would be one more copy.
    made = {
        place: jax.device_put(np.full((), train_step, leaf.dtype), leaf.sharding)
        for place, leaf in leaves.items()
        if not leaf.shape
    }
    for name, make in arrays.items():
        there, above = PLACES[name]
        if there == item:
            for path, array in make():
                place = f"{above}/{path}" if above else path
                made[place] = jax.device_put(array, leaves[place].sharding)
    return jax.tree.unflatten(jax.tree.structure(abstract), [made[place] for place in leaves])


def has_optimizer_state(directory: str | PathLike, train_step: int | None = None) -> bool:
    """Whether a checkpoint has more than weights.

    Raises:
      UserError: there is no such checkpoint, or it is corrupt.
    """
    folder = checkpoint_folders.find(directory, train_step)
    return not read_document(folder, "metadata").get("is_weights_only", False)


def arrays_by_path(
    directory: str | PathLike, name: str, abstract_params: Any, train_step: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Paths and arrays of one of `PLACES` in a checkpoint, one in memory at a time.

    Raises:
      UserError: there is no such checkpoint, it is corrupt (`CorruptCheckpoint`), or it is of another
        architecture.
    """
    folder = checkpoint_folders.find(directory, train_step)
    item, above = PLACES[name]
    saved = read_document(folder, "metadata")["arrays"][item]
    described = {
        path.removeprefix(f"{above}/"): entry
        for path, entry in saved.items()
        if path.startswith(above)
    }
    checkpoint_metadata.check_architecture(folder, item, described, abstract_params)
    return _arrays(folder, item, above, described, list(saved))


def _arrays(
    folder: epath.Path,
    item: str,
    above: str,
    described: Mapping[str, list],
    saved: Sequence[str],
) -> Iterator[tuple[str, np.ndarray]]:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with contextlib.closing(
        ocp.CompositeCheckpointHandler(**{item: ocp.PyTreeCheckpointHandler()})
    ) as handler:
        for path, entry in described.items():
            leaf = checkpoint_metadata.abstract_tree({path: entry}, place)
            target = _placed(leaf, above, saved)
            args = ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            )
            with checkpoint_folders.reporting_corruption(folder):
                restored = handler.restore(folder, args=ocp.args.Composite(**{item: args}))[item]
            yield path, np.asarray(jax.tree.leaves(restored)[0])


def _placed(tree: Any, above: str, saved: Sequence[str]) -> Any:
    """The tree at its place in an item; `saved` names its leaves, which tell how long lists are."""
    parts = above.split("/") if above else []
    for depth in reversed(range(len(parts))):
        name, before = parts[depth], "".join(f"{part}/" for part in parts[:depth])
        if name.isdecimal():  # of an optimizer in a chain of some
            beside = [other.removeprefix(before) for other in saved if other.startswith(before)]
            chain = [None] * (1 + max(int(other.split("/")[0]) for other in beside))
            chain[int(name)] = tree
            tree = chain
        else:
            tree = {name: tree}
    return tree
