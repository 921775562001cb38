"""Checkpoints from weights that come from elsewhere, and weights out of checkpoints, in little memory.

A checkpoint of weights alone has no `opt_state`; training that starts from it begins with a fresh
one.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cfjax import checkpoint_folders, checkpoint_metadata, sharding
from cfjax.checkpoint_folders import document_name, read_document
from cfjax.errors import UserError
from cfjax.paths import absolute

# Where in a checkpoint the parameters and their average lie: the item, and a path in it.
PLACES = {"params": ("state", "params"), "ema": ("ema", "")}


def write(
    workdir: str | PathLike,
    config_json: str,
    abstract_params: Any,
    arrays: Mapping[str, Callable[[], Mapping[str, np.ndarray]]],
) -> epath.Path:
    """Writes a checkpoint of train step 0, which appears when it is whole.

    Args:
      workdir: a new run's folder, on disk.
      config_json: the run's config.
      abstract_params: `ShapeDtypeStruct`s with shardings, on one device.
      arrays: "params" and "ema" to functions that make the arrays by path, called one after the
        other, so that one of the two is in memory.

    Returns:
      The checkpoint's folder.

    Raises:
      UserError: the workdir has checkpoints already.
    """
    directory = absolute(workdir) / "checkpoints"
    if checkpoint_folders.train_steps(directory):
        raise UserError(f"there are checkpoints in {workdir} already; pass a new folder.")
    checkpoint_folders.remove_leftovers(directory)
    partial = directory / checkpoint_folders.temporary_name("0")
    mesh = jax.tree.leaves(abstract_params)[0].sharding.mesh
    train_step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    documents = {
        "config": json.loads(config_json),
        "data": {"examples_seen": 0},
        "metadata": {
            **checkpoint_metadata.describe(
                {
                    "state": {"train_step": train_step, "params": abstract_params},
                    "ema": abstract_params,
                }
            ),
            "metric": None,
            "best": None,
            "is_weights_only": True,
        },
    }
    for item, document in documents.items():
        (partial / item).mkdir(parents=True)
        (partial / item / document_name(item)).write_text(json.dumps(document))
    # Compressed buffers would stay with the allocator: half of the arrays' size more at the peak.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        for name, make in arrays.items():
            tree = flax.traverse_util.unflatten_dict(make(), sep="/")
            # Not as NumPy arrays, of which there would be one more copy.
            tree = jax.tree.map(
                lambda array, leaf: jax.device_put(array, leaf.sharding), tree, abstract_params
            )
            item, _ = PLACES[name]
            if item == "state":
                tree = {"train_step": jnp.zeros((), jnp.int32), "params": tree}
            checkpointer.save(partial / item, args=ocp.args.PyTreeSave(tree))
            del tree
    return partial.rename(directory / "0")


def arrays_by_path(
    directory: str | PathLike, name: str, abstract_params: Any, train_step: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Paths and arrays of "params" or "ema" of a checkpoint, one in memory at a time.

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
    return _arrays(folder, item, above, described)


def _arrays(
    folder: epath.Path, item: str, above: str, described: Mapping[str, list]
) -> Iterator[tuple[str, np.ndarray]]:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with contextlib.closing(
        ocp.CompositeCheckpointHandler(**{item: ocp.PyTreeCheckpointHandler()})
    ) as handler:
        for path, entry in described.items():
            target = checkpoint_metadata.abstract_tree(
                {f"{above}/{path}" if above else path: entry}, place
            )
            args = ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            )
            with checkpoint_folders.reporting_corruption(folder):
                restored = handler.restore(folder, args=ocp.args.Composite(**{item: args}))[item]
            yield path, np.asarray(jax.tree.leaves(restored)[0])
