"""Where checkpoints lie: finding, listing, reading their documents, deleting; arrays aside.

`directory` may everywhere be a run's workdir, its `checkpoints/` folder, or one checkpoint, on disk
or in cloud storage.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from os import PathLike
from typing import Any

from etils import epath

from cfjax.errors import UserError
from cfjax.paths import absolute

_TEMPORARY = ".orbax-checkpoint-tmp"
_DELETING = ".deleting"
_DAMAGED = ".damaged"
# Where folders can't be renamed, this file is written last.
_FINISHED = "commit_success.txt"


class CorruptCheckpoint(UserError):
    """A checkpoint that can't be read, for a `reason` of a few words."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def checkpoints_folder(directory: str | PathLike) -> epath.Path:
    """The absolute folder in which the checkpoints lie."""
    path = absolute(directory)
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    return path.parent if _is_checkpoint(path) else path


def train_steps(directory: str | PathLike) -> list[int]:
    """The train steps of which there is a checkpoint, ascending; empty where there is none."""
    path = checkpoints_folder(directory)
    if not path.is_dir():
        return []
    names = {child.name for child in path.iterdir()}
    return sorted(
        int(name)
        for name in names
        if name.isdecimal() and name + _DELETING not in names and _is_finished(path / name)
    )


def find(directory: str | PathLike, train_step: int | None = None) -> epath.Path:
    """The folder of one checkpoint, by default the latest.

    Raises:
      UserError: there is no folder, or no such checkpoint in it.
    """
    path = absolute(directory)
    if train_step is None and _is_checkpoint(path):
        return path
    if not path.is_dir():
        raise UserError(f"there is no folder {directory}; pass the workdir of a run.")
    steps = train_steps(path)
    if not steps:
        raise UserError(
            f"there is no checkpoint in {directory}; pass the workdir of a run that has saved one."
        )
    train_step = steps[-1] if train_step is None else train_step
    if train_step not in steps:
        raise UserError(
            f"there is no checkpoint of train step {train_step} in {directory}; there are those of"
            f" train steps {', '.join(map(str, steps))}."
        )
    return checkpoints_folder(path) / str(train_step)


def document_name(item: str) -> str:
    """The file that holds the JSON document `item` in its folder."""
    return f"{item}.json"


def temporary_name(name: str) -> str:
    """The name of the folder `name` while it is written; leftovers of this name are removed."""
    return name + _TEMPORARY


def read_document(folder: epath.Path, item: str) -> dict[str, Any]:
    """A JSON document of one checkpoint.

    Raises:
      CorruptCheckpoint: it is missing or not JSON.
    """
    with reporting_corruption(folder):
        return json.loads((folder / item / document_name(item)).read_text())


@contextlib.contextmanager
def reporting_corruption(folder: epath.Path) -> Iterator[None]:
    """Turns errors of reading into one that names the checkpoint and what to do.

    Raises:
      CorruptCheckpoint: whatever was wrong.
    """
    try:
        yield
    except RuntimeError:  # the device's, such as out of memory
        raise
    except Exception as error:  # orbax and tensorstore raise every kind, bare `Exception` too
        others = [step for step in train_steps(folder.parent) if str(step) != folder.name]
        mend = "there is no other, so start in a new workdir"
        if others:
            mend = f"remove that folder to use the one of train step {others[-1]} instead"
        reason = short_reason(error.__cause__ or error)
        raise CorruptCheckpoint(
            f"the checkpoint of train step {folder.name} in {folder} is corrupt ({reason}); {mend}.",
            reason,
        ) from error


def delete(folder: epath.Path) -> None:
    """Deletes a checkpoint so that, if this is interrupted, the rest never counts as one.

    The deletion is announced by a file beside it, `<train step>.deleting`.
    """
    announcement = folder.parent / (folder.name + _DELETING)
    announcement.touch()
    if folder.exists():
        folder.rmtree()
    announcement.unlink()


def set_aside(folder: epath.Path) -> epath.Path:
    """Renames a damaged checkpoint so that it counts no more; returns its new place."""
    taken = {path.name for path in folder.parent.iterdir()}
    name = folder.name + _DAMAGED
    if name in taken:
        name = next(n for n in (f"{name}.{i}" for i in itertools.count(2)) if n not in taken)
    return folder.rename(folder.parent / name)


def remove_leftovers(checkpoints: epath.Path) -> None:
    """Removes half-written checkpoints and ends interrupted deletions."""
    if checkpoints.is_dir():
        for path in list(checkpoints.iterdir()):
            is_half = path.name.isdecimal() and not _is_finished(path)
            if is_half or path.name.endswith(_TEMPORARY):
                path.rmtree()
            elif path.name.endswith(_DELETING):
                delete(checkpoints / path.name.removesuffix(_DELETING))


def short_reason(error: BaseException) -> str:
    """The first line of an error, short enough for one sentence."""
    line = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return line if len(line) <= 120 else line[:117] + "..."


def _is_finished(folder: epath.Path) -> bool:
    return not str(folder).startswith("gs://") or (folder / _FINISHED).exists()


def _is_checkpoint(path: epath.Path) -> bool:
    return (path / "state").is_dir() or (path / "ema").is_dir()
