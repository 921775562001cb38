"""From listed images to a set of array_record shards, in several processes."""

import dataclasses
import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from cfjax.data.image_files import write_whole
from cfjax.data.image_listing import ListedImage, fingerprint
from cfjax.data.image_records import KIND, Storing, pack
from cfjax.data.record_shards import ShardWriter, sha256
from cfjax.data.records import ON_CORRUPT
from cfjax.errors import UserError, check_choice, listed


@dataclasses.dataclass(frozen=True)
class _Task:
    writer: ShardWriter
    shard: int
    images: Sequence[ListedImage]
    labels: dict[str, int]
    storing: Storing
    on_corrupt: str


def write_image_set(
    folder: Path,
    images: Sequence[ListedImage],
    class_names: Sequence[str],
    storing: Storing,
    *,
    examples_per_shard: int,
    on_corrupt: str,
    num_processes: int,
    kind: str = KIND,
    about: Mapping[str, Any] = MappingProxyType({}),
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> dict[str, Any]:
    """Makes the shards of a set that are missing, then its manifest.

    The bytes depend on the images and on how they are stored alone.

    Args:
      folder: of the set.
      images: in order.
      class_names: in the order of their labels; none for images without classes, labelled -1.
      storing: how they are stored.
      examples_per_shard: images in a shard, but for the last one and what is skipped.
      on_corrupt: "refuse" an image that can't be decoded, or "skip" it and say so in the manifest.
      num_processes: that decode and encode; with 1, this one.
      kind: what the manifest calls its records.
      about: further JSON values of its description.
      files: contents of further files of the set, by name, which are written before the manifest;
        their SHA-256 stand in the description under "files".

    Returns:
      The manifest, see `cfjax.data.records.read_manifest`.

    Raises:
      UserError: images are broken and to be refused, which leaves the shards without any; the
        folder holds another set, or can't be written to.
    """
    check_choice("on_corrupt", on_corrupt, ON_CORRUPT)
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    starts = range(0, len(images), examples_per_shard)
    writer = ShardWriter(
        folder,
        kind,
        {
            **dataclasses.asdict(storing),
            "class_names": list(class_names),
            "num_listed": len(images),
            "listing_sha256": fingerprint((it.name, it.class_name, it.num_bytes) for it in images),
            "examples_per_shard": examples_per_shard,
            **about,
            **({"files": checksums} if files else {}),
        },
        num_shards=len(starts),
        compress=storing.stored_as == "raw",
    )
    writer.begin()
    for name, content in files.items():
        if not (folder / name).exists() or sha256(folder / name) != checksums[name]:
            write_whole(folder / name, lambda file, content=content: file.write(content))
    labels = {name: label for label, name in enumerate(class_names)}
    tasks = [
        _Task(
            writer,
            shard,
            images[starts[shard] : starts[shard] + examples_per_shard],
            labels,
            storing,
            on_corrupt,
        )
        for shard in writer.missing()
    ]
    with tqdm(
        desc=f"writing {folder}",
        total=len(images),
        initial=len(images) - sum(len(task.images) for task in tasks),
        delay=2,
        unit="image",
        leave=False,
        file=sys.stderr,
    ) as progress:
        broken = []
        for task_broken, count in _run(tasks, num_processes):
            broken += task_broken
            progress.update(count)
    if broken:
        noun = "image" if len(broken) == 1 else "images"
        raise UserError(
            f"{len(broken)} {noun} ({listed(sorted(broken))}) can't be decoded; remove or mend"
            " them, or pass --on_corrupt=skip."
        )
    return writer.finish()


def _run(tasks: Sequence[_Task], num_processes: int) -> Iterator[tuple[list[str], int]]:
    num_processes = min(num_processes, len(tasks))
    if num_processes <= 1:
        yield from map(_write_shard, tasks)
        return
    # Not forked, as libraries run threads here.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(_write_shard, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class _RefusedError(Exception):
    """Images of a shard are broken, so that it is not written."""


def _write_shard(task: _Task) -> tuple[list[str], int]:
    """Writes one shard; images for which it was refused, and how many were listed for it."""
    skipped: list[dict[str, str]] = []

    def records() -> Iterator[bytes]:
        for image in task.images:
            try:
                content = task.storing.encode(image.read(), image.name)
            except UserError as error:
                skipped.append({"name": image.name, "reason": str(error)})
            else:
                label = task.labels[image.class_name] if task.labels else -1
                yield pack(label, image.name, content)
        if skipped and task.on_corrupt == "refuse":
            raise _RefusedError

    try:
        task.writer.write(task.shard, records(), skipped)
    except _RefusedError:
        return [it["name"] for it in skipped], len(task.images)
    return [], len(task.images)


def _end_with_parent() -> None:
    """Ends this process when the program is killed, which would leave it waiting for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
