"""Checkpoints that describe themselves: saved asynchronously and atomically, restored anywhere.

The only importer of orbax. A checkpoint is the folder `<workdir>/checkpoints/<train step>`, which
appears under its name only when everything in it is written:

| item | content |
|---|---|
| `state/` | `train_step`, `params`, `opt_state` |
| `ema/` | `ema_params` |
| `config/config.json` | the run's config |
| `data/data.json` | `examples_seen`, the position in the data |
| `metadata/metadata.json` | versions, mesh, and every array's name, shape and dtype |
"""

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from os import PathLike
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from cfjax import checkpoint_folders, sharding
from cfjax.checkpoint_folders import document_name, read_document, short_reason, train_steps
from cfjax.errors import UserError
from cfjax.train_state import TrainState

_ARRAYS = ("state", "ema")
_DOCUMENTS = ("config", "data", "metadata")
_MAX_LISTED = 3


class CheckpointWriter:
    """Saves checkpoints of a run in the background; a context manager that waits for the last.

    Every process makes one and calls it at the same train steps. Leftovers of a killed run are
    removed on creation.
    """

    def __init__(self, workdir: str | PathLike, keep_last: int):
        """Args: the run's folder, shared by all processes; how many checkpoints to keep (>= 1)."""
        if keep_last < 1:
            raise UserError(f"at least 1 checkpoint must be kept, got keep_last={keep_last}.")
        self._directory = epath.Path(workdir).resolve() / "checkpoints"
        self._keep_last = keep_last
        self._checkpointer = ocp.AsyncCheckpointer(_handler())
        if jax.process_index() == 0:
            checkpoint_folders.remove_leftovers(self._directory)

    def save(self, state: TrainState, config_json: str, examples_seen: int) -> None:
        """Starts to save; returns when `state` may be donated or changed.

        Waits for the save before, if it has not ended. A train step that is saved already is left
        as it is.

        Args:
          state: global arrays.
          config_json: the run's config as JSON.
          examples_seen: examples taken from the data by all processes together.

        Raises:
          UserError: this save or the one before could not be written.
        """
        self.wait()
        self._delete_old()
        folder = self._directory / str(int(state.train_step))
        if folder.exists():
            return
        arrays = _split(state)
        documents = {
            "config": json.loads(config_json),
            "data": {"examples_seen": examples_seen},
            "metadata": _describe(arrays),
        }
        items = {item: ocp.args.StandardSave(tree) for item, tree in arrays.items()}
        items |= {item: ocp.args.JsonSave(document) for item, document in documents.items()}
        with self._reporting_failure():
            self._checkpointer.save(folder, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when the last save has ended.

        Raises:
          UserError: it could not be written.
        """
        with self._reporting_failure():
            self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and deletes what is more than `keep_last`."""
        try:
            self.wait()
            self._delete_old()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if error_type is None:  # else the error that is under way says more
                raise

    def _delete_old(self) -> None:
        if jax.process_index() == 0:
            for train_step in train_steps(self._directory)[: -self._keep_last]:
                checkpoint_folders.delete(self._directory / str(train_step))

    @contextlib.contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            steps = train_steps(self._directory)
            left = f"the last good one is of train step {steps[-1]}" if steps else "there is none"
            raise UserError(
                f"a checkpoint could not be written to {self._directory} ({short_reason(error)});"
                f" {left}, so give the folder space and write permission and run again."
            ) from error


def latest_train_step(directory: str | PathLike) -> int | None:
    """The newest checkpoint's train step, or None; to be called by every process.

    Raises:
      UserError: the processes do not see the same checkpoints.
    """
    latest = max(train_steps(directory), default=None)
    if jax.process_count() > 1:
        mine = np.int32(-1 if latest is None else latest)
        seen = sorted(set(multihost_utils.process_allgather(mine).tolist()))
        if len(seen) > 1:
            raise UserError(
                f"the processes see different checkpoints in {directory} (train steps {seen}, -1 for"
                " none); put the workdir on storage that all hosts share."
            )
    return latest


def restore_state(
    directory: str | PathLike, abstract_state: TrainState, train_step: int | None = None
) -> tuple[TrainState, int]:
    """The training state, placed onto today's shardings, and how many examples it has seen.

    Args:
      directory: a workdir, its `checkpoints/` folder, or one checkpoint.
      abstract_state: `ShapeDtypeStruct`s with shardings, from `sharding.abstract_sharded`. Mesh and
        number of processes may differ from those that saved.
      train_step: which checkpoint, by default the latest.

    Raises:
      UserError: there is no such checkpoint, it is corrupt, or it is of another architecture.
    """
    folder = checkpoint_folders.find(directory, train_step)
    restored = _restore(folder, _split(abstract_state))
    state = abstract_state.replace(ema_params=restored["ema"], **restored["state"])
    return state, read_document(folder, "data")["examples_seen"]


def restore_ema(
    directory: str | PathLike, abstract_params: Any = None, train_step: int | None = None
) -> Any:
    """The EMA parameters alone; neither model nor optimizer is needed.

    Args:
      directory: a workdir, its `checkpoints/` folder, or one checkpoint.
      abstract_params: `ShapeDtypeStruct`s with shardings; the arrays are cast to their dtypes. By
        default dtypes as saved, and everything on every device.
      train_step: which checkpoint, by default the latest.

    Returns:
      Nested dicts of arrays.

    Raises:
      UserError: there is no such checkpoint, it is corrupt, or it is of another architecture.
    """
    folder = checkpoint_folders.find(directory, train_step)
    if abstract_params is None:
        everywhere = sharding.replicated(sharding.make_mesh())
        abstract_params = {}
        for name, (shape, dtype) in read_document(folder, "metadata")["arrays"]["ema"].items():
            *parents, leaf = name.split("/")
            node = abstract_params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    return _restore(folder, {"ema": abstract_params})["ema"]


def read_config(directory: str | PathLike, train_step: int | None = None) -> str:
    """The config of the run that saved, as JSON.

    Args:
      directory: a workdir, its `checkpoints/` folder, or one checkpoint.
      train_step: which checkpoint, by default the latest.

    Raises:
      UserError: there is no such checkpoint, or it is corrupt.
    """
    return json.dumps(read_document(checkpoint_folders.find(directory, train_step), "config"))


def _handler() -> ocp.CompositeCheckpointHandler:
    arrays = {item: ocp.StandardCheckpointHandler() for item in _ARRAYS}
    documents = {item: ocp.JsonCheckpointHandler(document_name(item)) for item in _DOCUMENTS}
    return ocp.CompositeCheckpointHandler(**arrays, **documents)


def _split(state: TrainState) -> dict[str, Any]:
    """The array items of a checkpoint, of arrays or of abstract ones."""
    return {
        "state": {
            "train_step": state.train_step,
            "params": state.params,
            "opt_state": state.opt_state,
        },
        "ema": state.ema_params,
    }


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(arrays: dict[str, Any]) -> dict[str, Any]:
    mesh = arrays["state"]["train_step"].sharding.mesh
    return {
        "versions": {name: _version(name) for name in ("cfjax", "jax")},
        "mesh": dict(mesh.shape),
        "arrays": {
            item: {
                name: [list(leaf.shape), leaf.dtype.name]
                for name, leaf in _named_leaves(tree).items()
            }
            for item, tree in arrays.items()
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _restore(folder: epath.Path, targets: dict[str, Any]) -> dict[str, Any]:
    saved = read_document(folder, "metadata")["arrays"]
    for item, target in targets.items():
        _check_architecture(folder, item, saved[item], target)
    args = {item: ocp.args.StandardRestore(target) for item, target in targets.items()}
    with (
        checkpoint_folders.reporting_corruption(folder),
        ocp.Checkpointer(_handler()) as checkpointer,
    ):
        restored = checkpointer.restore(folder, args=ocp.args.Composite(**args))
        return {item: restored[item] for item in targets}


def _check_architecture(folder: epath.Path, item: str, saved: dict[str, list], target: Any) -> None:
    there = {name: tuple(shape) for name, (shape, _) in saved.items()}
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
