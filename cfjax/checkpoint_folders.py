"""Where checkpoints lie: finding, listing, reading their documents, deleting; arrays aside.

`directory` may everywhere be a run's workdir, its `checkpoints/` folder, or one checkpoint.
"""

import contextlib
import json
from collections.abc import Iterator
from os import PathLike
from typing import Any

from etils import epath

from cfjax.errors import UserError

_TEMPORARY = ".orbax-checkpoint-tmp"
_DELETING = ".deleting"


def checkpoints_folder(directory: str | PathLike) -> epath.Path:
    """The absolute folder in which the checkpoints lie."""
    path = _absolute(directory)
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    return path.parent if _is_checkpoint(path) else path


def train_steps(directory: str | PathLike) -> list[int]:
    """The train steps of which there is a checkpoint, ascending; empty where there is none."""
    path = checkpoints_folder(directory)
    if not path.is_dir():
        return []
    names = {child.name for child in path.iterdir()}
    return sorted(int(n) for n in names if n.isdecimal() and n + _DELETING not in names)


def find(directory: str | PathLike, train_step: int | None = None) -> epath.Path:
    """The folder of one checkpoint, by default the latest.

    Raises:
      UserError: there is no folder, or no such checkpoint in it.
    """
    path = _absolute(directory)
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


def read_document(folder: epath.Path, item: str) -> dict[str, Any]:
    """A JSON document of one checkpoint.

    Raises:
      UserError: it is missing or not JSON.
    """
    with reporting_corruption(folder):
        return json.loads((folder / item / document_name(item)).read_text())


@contextlib.contextmanager
def reporting_corruption(folder: epath.Path) -> Iterator[None]:
    """Turns errors of reading into a `UserError` that names the checkpoint and what to do."""
    try:
        yield
    except RuntimeError:  # the device's, such as out of memory
        raise
    except Exception as error:  # orbax and tensorstore raise every kind, bare `Exception` too
        others = [step for step in train_steps(folder.parent) if str(step) != folder.name]
        mend = "there is no other, so start in a new workdir"
        if others:
            mend = f"remove that folder to use the one of train step {others[-1]} instead"
        raise UserError(
            f"the checkpoint of train step {folder.name} in {folder} is corrupt"
            f" ({short_reason(error.__cause__ or error)}); {mend}."
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


def remove_leftovers(checkpoints: epath.Path) -> None:
    """Removes half-written checkpoints and ends interrupted deletions."""
    if checkpoints.is_dir():
        for path in list(checkpoints.iterdir()):
            if path.name.endswith(_TEMPORARY):
                path.rmtree()
            elif path.name.endswith(_DELETING):
                delete(checkpoints / path.name.removesuffix(_DELETING))


def short_reason(error: BaseException) -> str:
    """The first line of an error, short enough for one sentence."""
    line = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return line if len(line) <= 120 else line[:117] + "..."


def _absolute(directory: str | PathLike) -> epath.Path:
    return epath.Path(directory).expanduser().resolve()


def _is_checkpoint(path: epath.Path) -> bool:
    return (path / "state").is_dir() or (path / "ema").is_dir()
