"""Checkpoints that describe themselves: saved asynchronously and atomically, restored anywhere.

A checkpoint is the folder `<workdir>/checkpoints/<train step>`, which
appears under its name only when everything in it is written:

| item | content |
|---|---|
| `state/` | `train_step`, `params`, `opt_state` |
| `ema/` | `ema_params` |
| `config/config.json` | the run's config |
| `data/data.json` | `examples_seen`, the position in the data |
| `metadata/metadata.json` | versions, mesh, number of processes; every array's name, shape and |
|  | dtype; this one's metric, and which is the best |
"""

import contextlib
import json
from collections.abc import Iterator
from os import PathLike
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from cfjax import checkpoint_folders, checkpoint_metadata, processes, sharding
from cfjax.checkpoint_folders import (
    CorruptCheckpoint,
    document_name,
    read_document,
    short_reason,
    train_steps,
)
from cfjax.checkpoint_retention import Best, Retention
from cfjax.errors import UserError
from cfjax.paths import absolute
from cfjax.train_state import TrainState

_ARRAYS = ("state", "ema")
_DOCUMENTS = ("config", "data", "metadata")


class CheckpointWriter:
    """Saves checkpoints of a run in the background; a context manager that waits for the last.

    Every process makes one and calls it at the same train steps. Leftovers of a killed run are
    removed on creation.
    """

    def __init__(
        self,
        workdir: str | PathLike,
        keep_last: int,
        keep_every: int = 0,
        best_metric: str = "",
    ):
        """Looks for the best one so far.

        Args:
          workdir: the run's folder, shared by all processes.
          keep_last, keep_every, best_metric: which checkpoints stay, see `Retention`.
        """
        self._retention = Retention(keep_last, keep_every, best_metric)
        self._directory = absolute(workdir) / "checkpoints"
        self._best = Best.of_run(self._directory, best_metric)
        self._checkpointer = ocp.AsyncCheckpointer(_handler())
        if jax.process_index() == 0:
            checkpoint_folders.remove_leftovers(self._directory)

    def save(
        self,
        state: TrainState,
        config_json: str,
        examples_seen: int,
        metric: float | None = None,
    ) -> None:
        """Starts to save; returns when `state` may be donated or changed.

        Waits for the save before, if it has not ended. A train step that is saved already is left
        as it is.

        Args:
          state: global arrays.
          config_json: the run's config as JSON.
          examples_seen: examples taken from the data by all processes together.
          metric: value of `best_metric`; without one, this checkpoint can't be the best.

        Raises:
          UserError: this save or the one before could not be written.
        """
        self.wait()
        self._delete_old()
        train_step = int(state.train_step)
        folder = self._directory / str(train_step)
        if folder.exists():
            return
        arrays = _split(state)
        self._best = self._best.against(train_step, metric)
        name = self._retention.best_metric
        documents = {
            "config": json.loads(config_json),
            "data": {"examples_seen": examples_seen},
            "metadata": {
                **checkpoint_metadata.describe(arrays),
                "metric": None if metric is None else {"name": name, "value": metric},
                "best": self._best.document(),
            },
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
        """Waits for the last save and deletes what need not stay."""
        try:
            self.wait()
            self._delete_old()
        finally:
            with self._reporting_failure():  # of what this writes, too
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
            saved = train_steps(self._directory)
            for train_step in self._retention.superfluous(saved, self._best.train_step):
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


def restore_newest(
    directory: str | PathLike, abstract_state: TrainState
) -> tuple[TrainState, int] | None:
    """What `restore_state` gives for the newest checkpoint that is whole, or None; with a warning.

    To be called by every process; all take the same one. Newer ones, which can't be read, are set
    aside under the name `<train step>.damaged`; but nothing is touched when none can be read, as
    then the storage may be at fault.

    Raises:
      UserError: no checkpoint can be read, or the newest is of another architecture, or the
        processes do not see the same checkpoints.
    """
    if latest_train_step(directory) is None:
        return None
    damaged: list[tuple[int, str]] = []
    for train_step in reversed(train_steps(directory)):
        restored, reason = None, None
        try:
            restored = restore_state(directory, abstract_state, train_step)
        except CorruptCheckpoint as error:
            reason = error.reason
        if not _is_so_somewhere(reason is not None):
            _set_aside(directory, damaged, train_step)
            return restored
        damaged.append((train_step, reason or "another process cannot read it"))
    train_step, reason = damaged[0]
    raise UserError(
        f"no checkpoint in {directory} can be read, not the newest of train step {train_step}"
        f" ({reason}); if the storage is at fault, mend it and run again, else start in a new"
        " workdir."
    )


def _set_aside(directory: str | PathLike, damaged: list[tuple[int, str]], whole: int) -> None:
    if jax.process_index() == 0:
        for train_step, reason in damaged:
            place = checkpoint_folders.set_aside(checkpoint_folders.find(directory, train_step))
            logging.warning(
                "The checkpoint of train step %d can't be read (%s) and is now %s; going on from the"
                " one of train step %d.",
                train_step,
                reason,
                place,
                whole,
            )
    processes.wait_for_all("damaged checkpoints set aside")


def _is_so_somewhere(mine: bool) -> bool:
    """Whether it is so in any process; to be called by all."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(np.bool_(mine)).any())


def restore_state(
    directory: str | PathLike, abstract_state: TrainState, train_step: int | None = None
) -> tuple[TrainState, int]:
    """The training state, placed onto today's shardings, and how many examples it has seen.

    A checkpoint of weights from elsewhere (`checkpoint_weights`) gives a fresh `opt_state`.

    Args:
      directory: a workdir, its `checkpoints/` folder, or one checkpoint.
      abstract_state: `ShapeDtypeStruct`s with shardings, from `sharding.abstract_sharded`. Mesh and
        number of processes may differ from those that saved.
      train_step: which checkpoint, by default the latest.

    Raises:
      UserError: there is no such checkpoint, it is corrupt (`CorruptCheckpoint`), or it is of another
        architecture.
    """
    folder = checkpoint_folders.find(directory, train_step)
    targets = _split(abstract_state)
    if is_weights_only := read_document(folder, "metadata").get("is_weights_only", False):
        del targets["state"]["opt_state"]
    restored = _restore(folder, targets)
    if is_weights_only:
        restored["state"]["opt_state"] = _fresh(abstract_state.opt_state)
    state = abstract_state.replace(ema_params=restored["ema"], **restored["state"])
    return state, read_document(folder, "data")["examples_seen"]


def _fresh(abstract_opt_state: Any) -> Any:
    """AdamW's state before the first update: zeros."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract_opt_state
    )


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
      UserError: there is no such checkpoint, it is corrupt (`CorruptCheckpoint`), or it is of another
        architecture.
    """
    folder = checkpoint_folders.find(directory, train_step)
    if abstract_params is None:
        abstract_params = checkpoint_metadata.abstract_tree(
            read_document(folder, "metadata")["arrays"]["ema"],
            sharding.replicated(sharding.make_mesh()),
        )
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


def _restore(folder: epath.Path, targets: dict[str, Any]) -> dict[str, Any]:
    saved = read_document(folder, "metadata")["arrays"]
    for item, target in targets.items():
        checkpoint_metadata.check_architecture(folder, item, saved[item], target)
    args = {item: ocp.args.StandardRestore(target) for item, target in targets.items()}
    # Not by a Checkpointer, in which the processes that can read would wait for one that can't.
    with (
        checkpoint_folders.reporting_corruption(folder),
        contextlib.closing(_handler()) as handler,
    ):
        restored = handler.restore(folder, args=ocp.args.Composite(**args))
        return {item: restored[item] for item in targets}
