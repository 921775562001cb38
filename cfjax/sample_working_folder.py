"""Generated images that become a file or a set: chunks in a hidden folder beside it, then the whole.

`.<name>.partial` has `recipe.json`, chunks, and in the end the product, which is moved to its place.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.data.image_files import encode_png, read_images, write_npz, write_npz_stream, write_png
from cfjax.data.image_records import KIND, Storing, pack
from cfjax.data.record_shards import ShardWriter
from cfjax.errors import UserError
from cfjax.sample_places import (
    ANOTHER_RUN,
    UNFINISHED_RUN,
    check_may_replace,
    check_none_foreign,
    check_writable,
    image_name,
)
from cfjax.sample_recipe import (
    PROGRAM,
    difference,
    images_per_document,
    is_finished,
    json_of,
    label_noun,
    read_document,
    write_document,
)
from cfjax.visualization import image_grid

EXAMPLES_PER_SHARD = 8192
_GRID_COLUMNS = 10
_RECIPE_FILE, _PUBLISHED_FILE, _REPLACED = "recipe.json", "published.json", "replaced"
_SPLIT = "train"
_OF_WORKING_FOLDER = re.compile(
    r"\.?(recipe\.json|published\.json|chunk-\d+\.npz|product\.\w+|replaced)(\.tmp)?"
)
_OF_SET = re.compile(
    r"\.?(description\.json|manifest\.json|images-\d+-of-\d+\.(array_record|json))(\..+\.tmp|\.tmp)?"
)


class WorkingFolder:
    """A hidden folder beside an output that is a file, or a set of array_record shards."""

    def __init__(self, out: Path, asked: dict[str, Any]):
        self.is_complete = False
        self._out, self._asked = out, asked
        self._num_samples = asked["results"]["num_samples"]
        self._image_shape = tuple(asked["results"]["image_shape"])
        self._json, self._folder = json_of(out), _working_folder(out)
        self._kind = out.suffix.lower()
        self._is_set = self._kind == ".array_record"
        self._product = self._folder / f"product{self._kind}"
        self._folder_is_ours = False

    def check(self, overwrite: bool) -> None:
        if self._out.exists() and self._out.is_dir() != self._is_set:
            noun = "file" if self._is_set else "folder"
            raise UserError(f"{self._out} is a {noun}; name another --out.")
        finished, unfinished = (
            read_document(path) for path in (self._json, self._folder / _RECIPE_FILE)
        )
        exists = self._out.exists() and (not self._is_set or any(self._out.iterdir()))
        of_finished, of_unfinished = (
            difference(found, self._asked) if found else "" for found in (finished, unfinished)
        )
        self._folder_is_ours = bool(unfinished) and not of_unfinished
        if exists and finished and not of_finished and is_finished(finished):
            self.is_complete = True
            return
        if of_finished:
            check_may_replace(self._out, ANOTHER_RUN, of_finished, overwrite)
        is_ours = finished or (self._folder_is_ours and self._is_published())
        if exists and not is_ours and (self._is_set or not overwrite):
            mend = "" if self._is_set else " or pass --overwrite"
            raise UserError(f"{self._out} is not of {PROGRAM}; name another --out{mend}.")
        self._check_set_is_ours()
        names = sorted(it.name for it in self._folder.iterdir()) if self._folder.exists() else []
        if not unfinished:
            others = [name for name in names if name != f".{_RECIPE_FILE}.tmp"]
        else:
            others = [name for name in names if not _OF_WORKING_FOLDER.fullmatch(name)]
        check_none_foreign(self._folder, others)
        if of_unfinished:
            check_may_replace(self._out, UNFINISHED_RUN, of_unfinished, overwrite)
        check_writable(self._out.parent)

    def begin(self) -> None:
        if not self._folder_is_ours:
            self._empty_folder()
            self._folder.mkdir(parents=True, exist_ok=True)
            write_document(self._folder / _RECIPE_FILE, self._asked)
            self._folder_is_ours = True

    def done(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        position = 0
        while position < self._num_samples:
            try:
                images, labels = read_images(self._chunk(position))
            except UserError:  # none, or damaged, so that it is made again
                return
            position += len(images)
            if labels is None or position > self._num_samples:
                return
            yield images, labels

    def write(self, start: int, images: np.ndarray, labels: np.ndarray) -> None:
        write_npz(self._chunk(start), images, labels)

    def publish(self, document: Mapping[str, Any], labels: np.ndarray) -> None:
        if not self._is_published():
            self._make_product(document, labels)
            write_document(self._folder / _PUBLISHED_FILE, self._identity(self._product))
            # A file that is replaced is there until the new one is; its JSON goes before, so that
            # none describes what it is not of.
            self._check_set_is_ours()
            if self._is_set and self._out.exists():
                shutil.rmtree(self._folder / _REPLACED, ignore_errors=True)
                os.replace(self._out, self._folder / _REPLACED)
            self._json.unlink(missing_ok=True)
            os.replace(self._product, self._out)
        write_document(self._json, document)
        self.clean()

    def clean(self) -> None:
        if self._folder_is_ours:  # and not that of another run, which is yet to finish
            self._empty_folder()
        with contextlib.suppress(OSError):  # there is none, or it is not empty
            self._folder.rmdir()

    def _empty_folder(self) -> None:
        """The recipe last, so that the folder says whose it is as long as it has anything."""
        if not self._folder.exists():
            return
        for path in sorted(self._folder.iterdir()):
            if path.is_dir() and path.name in (_REPLACED, self._product.name):
                shutil.rmtree(path)
            elif path.name != _RECIPE_FILE and _OF_WORKING_FOLDER.fullmatch(path.name):
                path.unlink()
        (self._folder / _RECIPE_FILE).unlink(missing_ok=True)

    def _chunk(self, start: int) -> Path:
        return self._folder / f"chunk-{start:08d}.npz"

    def _make_product(self, document: Mapping[str, Any], labels: np.ndarray) -> None:
        if self._kind == ".npz":
            batches = (images for images, _ in self.done())
            write_npz_stream(self._product, batches, self._image_shape, labels)
        elif self._kind == ".png":
            images = np.concatenate([images for images, _ in self.done()])
            columns = images_per_document(self._asked)  # a row a document
            if columns == 1:
                columns = min(_GRID_COLUMNS, self._num_samples)
            write_png(self._product, image_grid(images, num_columns=columns))
        else:
            self._write_set(document, labels)

    def _write_set(self, document: Mapping[str, Any], labels: np.ndarray) -> None:
        """All of the images are of the split "train"; for a held-out one, sample with another seed."""
        shutil.rmtree(self._product, ignore_errors=True)
        storing = Storing("png", size=self._image_shape[0], channels=self._image_shape[-1])
        num_classes = max(document["recipe"].get("num_classes", 0), int(labels.max()) + 1)
        writer = ShardWriter(
            self._product / _SPLIT,
            KIND,
            {
                **dataclasses.asdict(storing),
                "class_names": [str(label) for label in range(num_classes)],
                "num_listed": self._num_samples,
                "listing_sha256": document["results"]["images_sha256"],
                "examples_per_shard": EXAMPLES_PER_SHARD,
                "recipe": document["recipe"],
            },
            num_shards=-(-self._num_samples // EXAMPLES_PER_SHARD),
        )
        writer.begin()
        records = self._records()
        for shard in range(writer.num_shards):
            writer.write(shard, itertools.islice(records, EXAMPLES_PER_SHARD))
        writer.finish()

    def _records(self) -> Iterator[bytes]:
        start, noun = 0, label_noun(self._asked)
        with ThreadPool() as pool:
            for images, labels in self.done():
                encoded = pool.map(encode_png, images)
                for i, (label, png) in enumerate(zip(labels.tolist(), encoded, strict=True), start):
                    yield pack(label, image_name(i, label, noun), png)
                start += len(images)

    def _check_set_is_ours(self) -> None:
        if self._is_set and self._out.exists():
            split = self._out / _SPLIT
            members = list(split.iterdir()) if split.is_dir() else []
            others = [it.name for it in self._out.iterdir() if it != split]
            others += [it.name for it in members if not _OF_SET.fullmatch(it.name)]
            check_none_foreign(self._out, sorted(others))

    def _identity(self, product: Path) -> dict[str, Any]:
        """What a file keeps when it is moved, to know it by after a kill."""
        stat = (product / _SPLIT / "manifest.json" if self._is_set else product).stat()
        return {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}

    def _is_published(self) -> bool:
        """Whether a run that was killed before it wrote the JSON has moved its product."""
        published = self._folder / _PUBLISHED_FILE
        try:
            return json.loads(published.read_text()) == self._identity(self._out)
        except (OSError, ValueError):
            return False


def _working_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")
