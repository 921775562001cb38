"""Features of an evaluation in a folder, block by block, so that one that was killed goes on."""

import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.data.image_files import write_whole
from cfjax.errors import UserError
from cfjax.evaluation.extractors import Features

_RECIPE_FILE = "recipe.json"
_OF_FOLDER = re.compile(r"\.?(recipe\.json|block-\d+\.npz)(\.tmp)?")


class FeatureBlocks:
    """Features of consecutive images, each block in a file that is there whole or not at all.

    Blocks of another recipe are removed; what is damaged is made again, and all after it.

    Attributes:
      num_done: images whose features are there; the caller goes on from there.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        """Opens the folder, or makes it.

        Args:
          folder: of these blocks alone.
          recipe: what fixes the features, as JSON values.

        Raises:
          UserError: the folder holds other files, or can't be written.
        """
        self._folder = folder
        text = json.dumps(recipe, sort_keys=True)
        try:
            others = [it.name for it in folder.iterdir()] if folder.exists() else []
            others = [name for name in others if not _OF_FOLDER.fullmatch(name)]
            if others:
                raise UserError(
                    f"{folder} holds {others[0]}, which is not of an evaluation; move it."
                )
            known = folder / _RECIPE_FILE
            if not known.exists() or known.read_text() != text:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_whole(known, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(f"{folder} can't be written: {error.strerror or error}.") from error
        self._begins: list[int] = []
        self.num_done = 0
        while (block := self._read(self.num_done)) is not None:
            self._begins.append(self.num_done)
            self.num_done += len(block)

    def append(self, features: Features) -> None:
        """Writes the next block; when it returns, a kill does not lose it."""
        arrays = features.arrays()
        write_whole(self._path(self.num_done), lambda file: np.savez(file, **arrays))
        self._begins.append(self.num_done)
        self.num_done += len(features)

    def __iter__(self) -> Iterator[Features]:
        for begin in self._begins:
            block = self._read(begin)
            if block is None:
                raise UserError(f"{self._path(begin)} was lost meanwhile; run again.")
            yield block

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, begin: int) -> Path:
        return self._folder / f"block-{begin:09d}.npz"

    def _read(self, begin: int) -> Features | None:
        try:
            with self._path(begin).open("rb") as file, np.load(file) as arrays:
                return Features(**{name: arrays[name] for name in arrays})
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            return None  # none, or damaged
