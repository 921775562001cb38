"""A place for generated images, what is refused there, and the simplest: a folder of PNGs."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cfjax.data.image_files import read_image, write_png
from cfjax.errors import UserError, listed
from cfjax.sample_recipe import (
    FILE_SUFFIXES,
    PROGRAM,
    difference,
    is_finished,
    json_of,
    label_noun,
    read_document,
    write_document,
)

ANOTHER_RUN, UNFINISHED_RUN = "another run", "an unfinished run of another recipe"
_READ_AT_ONCE = 256
_IMAGE_NAME = re.compile(r"(\d{6,})_(?:class|prompt)(\d+)\.png")
_OF_FOLDER = re.compile(r"\.?(\d{6,}_(class|prompt)\d+\.png|generation(\.partial)?\.json)(\.tmp)?")


class Place(Protocol):
    """What `SampleOutput` needs of a place. `check` changes nothing, and comes first."""

    is_complete: bool

    def check(self, overwrite: bool) -> None:
        """Refuses (`UserError`) what must not be replaced; sets `is_complete`."""

    def begin(self) -> None:
        """Makes the place, or goes on in it; deletes what it replaces, if it is in the way."""

    def done(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images uint8 `[n, H, W, C]` and labels int32 `[n]` that are there and whole, in order."""

    def write(self, start: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Writes the images from index `start` on."""

    def publish(self, document: Mapping[str, Any], labels: np.ndarray) -> None:
        """Makes the output of what is done, and writes its JSON last."""

    def clean(self) -> None:
        """Deletes what only an unfinished run needs."""


def image_name(index: int, label: int, noun: str = "class") -> str:
    """`000012_class3.png`."""
    return f"{index:06d}_{noun}{label}.png"


class PngFolder:
    """A folder of PNGs, written in place, with `generation.partial.json` until all are there."""

    def __init__(self, out: Path, asked: dict[str, Any]):
        self.is_complete = False
        self._out, self._asked = out, asked
        self._num_samples = asked["results"]["num_samples"]
        self._json, self._unfinished = json_of(out), out / "generation.partial.json"
        self._replaces = False

    def check(self, overwrite: bool) -> None:
        if self._out.exists() and not self._out.is_dir():
            raise UserError(
                f"{self._out} is a file; name a folder as --out, or end it in one of"
                f" {', '.join(FILE_SUFFIXES)}."
            )
        names = sorted(it.name for it in self._out.iterdir()) if self._out.exists() else []
        found = read_document(self._json) or read_document(self._unfinished)
        others = [name for name in names if not _OF_FOLDER.fullmatch(name)]
        left_over = [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]
        if found is None and left_over:
            raise UserError(
                f"the folder {self._out} is not of {PROGRAM} (it has"
                f" {listed(others or left_over)}); name another --out."
            )
        if found and (what := difference(found, self._asked)):
            noun = ANOTHER_RUN if is_finished(found) else UNFINISHED_RUN
            check_may_replace(self._out, noun, what, overwrite)
            check_none_foreign(self._out, others)
            self._replaces = True
        elif found:
            count = len(self._files())
            self.is_complete = is_finished(found) and count == self._num_samples
        if not self.is_complete:
            check_writable(self._out)

    def begin(self) -> None:
        if self._replaces:  # the JSON last, so that a folder says whose its images are
            for path in sorted(self._out.iterdir()):
                if _IMAGE_NAME.fullmatch(path.name):
                    path.unlink()
            self._unfinished.unlink(missing_ok=True)
            self._json.unlink(missing_ok=True)
        self._out.mkdir(parents=True, exist_ok=True)
        write_document(self._unfinished, self._asked)
        self._json.unlink(missing_ok=True)

    def done(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        files = self._files()
        present = list(itertools.takewhile(files.__contains__, range(self._num_samples)))
        with ThreadPool() as pool:
            for start in range(0, len(present), _READ_AT_ONCE):
                some = [files[index] for index in present[start : start + _READ_AT_ONCE]]
                read = pool.map(self._read, [path for path, _ in some])
                sound = list(itertools.takewhile(lambda image: image is not None, read))
                if sound:
                    labels = [label for _, label in some[: len(sound)]]
                    yield np.stack(sound), np.array(labels, np.int32)
                if len(sound) < len(some):
                    return

    def write(self, start: int, images: np.ndarray, labels: np.ndarray) -> None:
        noun = label_noun(self._asked)
        names = [image_name(start + i, label, noun) for i, label in enumerate(labels.tolist())]
        with ThreadPool() as pool:
            pool.starmap(write_png, zip([self._out / name for name in names], images, strict=True))

    def publish(self, document: Mapping[str, Any], labels: np.ndarray) -> None:
        del labels  # they are in the names
        write_document(self._json, document)
        self.clean()

    def clean(self) -> None:
        for path in self._out.glob(".*.tmp"):
            if _OF_FOLDER.fullmatch(path.name):
                path.unlink(missing_ok=True)
        self._unfinished.unlink(missing_ok=True)

    def _files(self) -> dict[int, tuple[Path, int]]:
        """Path and label by index."""
        files = {}
        for path in sorted(self._out.iterdir()):
            if match := _IMAGE_NAME.fullmatch(path.name):
                index = int(match[1])
                if index in files or index >= self._num_samples:
                    raise UserError(
                        f"the image {path} is not of the run that its folder is of; move it away or"
                        " name another --out."
                    )
                files[index] = path, int(match[2])
        return files

    def _read(self, path: Path) -> np.ndarray | None:
        """uint8 `[H, W, C]`; None if it is damaged, so that it is made again."""
        shape = self._asked["results"]["image_shape"]
        try:
            pixels = np.asarray(read_image(path))
        except UserError:
            return None
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        return pixels if list(pixels.shape) == shape else None


def check_may_replace(out: Path, noun: str, what: str, overwrite: bool) -> None:
    """Refuses a run of another recipe without `overwrite`; `what` is from `difference`."""
    if not overwrite:
        raise UserError(f"{out} holds {noun}, with {what}; name another --out or pass --overwrite.")


def check_none_foreign(folder: Path, names: list[str]) -> None:
    """Refuses a folder with files of other names than ours; `names` are these."""
    if names:
        raise UserError(
            f"the folder {folder} has {listed(names)}, not of {PROGRAM}; name another --out, or move"
            " them away."
        )


def check_writable(folder: Path) -> None:
    """Refuses a folder, there or to be made, that can't be written to."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"{folder} can't be made, as {nearest} is a file; name another --out.")
    # The write bits bind everybody but root, of whom we expect the same.
    if not nearest.stat().st_mode & 0o222 or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"the folder {nearest} is read-only; allow writing or name another --out.")
