"""From images to a set of shards with their moments, each process its own shards."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from cfjax import processes
from cfjax.data.images import to_model_range
from cfjax.data.latents import KIND, pack
from cfjax.data.loader import read_ahead
from cfjax.data.record_shards import ShardWriter
from cfjax.data.records import ON_CORRUPT, read_manifest
from cfjax.data.sources import Source
from cfjax.errors import UserError, check_choice, listed

# Images float32 [rows, H, W, C] to moments [rows, 2, h, w, 2 c] and whether each is finite [rows],
# on devices that are still at work.
Encode = Callable[[np.ndarray], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass
class _Batch:
    """Some images of one shard.

    Attributes:
      shard: its number.
      indices: of the images in the source.
      images: float32 `[rows, H, W, C]`, zeros where none could be read and behind the last.
      labels: int `[rows]`.
      broken: why an image can't be read, by its index.
    """

    shard: int
    indices: range
    images: np.ndarray
    labels: np.ndarray
    broken: dict[int, str]


def write_latent_set(
    folder: Path,
    source: Source,
    encode: Encode,
    description: Mapping[str, Any],
    *,
    rows: int,
    examples_per_shard: int,
    on_corrupt: str,
    num_threads: int,
) -> dict[str, Any]:
    """Makes the shards of a set that are missing, then its manifest.

    Process k of n makes the shards with number % n == k; all must see the folder. Where an image lies
    in a batch depends on its place in its shard alone, and what is broken leaves its row empty, so
    that the bytes are the same however the work is shared.

    Args:
      folder: of the set.
      source: the images; opened so that it replaces none.
      encode: called with `rows` images.
      description: JSON values that fix the bytes of the set, besides those of the source.
      rows: images of a batch.
      examples_per_shard: images in a shard, but for the last one and what is skipped.
      on_corrupt: "refuse" an image that can't be read, or "skip" it and say so in the manifest.
      num_threads: that read and decode ahead.

    Returns:
      The manifest, see `cfjax.data.records.read_manifest`.

    Raises:
      UserError: images are broken and to be refused, which leaves the shards without any; moments are
        not finite; the folder holds another set, can't be written to or is not the same for all.
    """
    check_choice("data.on_corrupt", on_corrupt, ON_CORRUPT)
    starts = range(0, len(source), examples_per_shard)
    writer = ShardWriter(
        folder,
        KIND,
        {
            **description,
            "class_names": list(source.class_names),
            "num_images": len(source),
            "source_sha256": source.fingerprint,
            "examples_per_shard": examples_per_shard,
        },
        num_shards=len(starts),
    )
    writer.begin()
    images_of = {
        shard: range(starts[shard], min(starts[shard] + examples_per_shard, len(source)))
        for shard in range(jax.process_index(), len(starts), jax.process_count())
    }
    missing = [shard for shard in writer.missing() if shard in images_of]
    parts = [
        (shard, images_of[shard][first : first + rows])
        for shard in missing
        for first in range(0, len(images_of[shard]), rows)
    ]
    refused: list[str] = []
    total = sum(map(len, images_of.values()))
    with (
        contextlib.closing(_encoded(source, parts, rows, encode, num_threads)) as encoded,
        tqdm(
            desc=f"encoding {folder}",
            total=total,
            initial=total - sum(len(indices) for _, indices in parts),
            delay=2,
            unit="image",
            leave=False,
            disable=jax.process_index() != 0,
            file=sys.stderr,
        ) as progress,
    ):
        for shard, batches in itertools.groupby(encoded, lambda it: it[0].shard):
            skipped = [] if shard else list(source.left_out)
            try:
                records = _records(batches, skipped, on_corrupt, progress)
                writer.write(shard, records, skipped)
            except _RefusedError:
                refused += [it["reason"] for it in skipped]
    return _finish(writer, refused)


def _encoded(
    source: Source,
    parts: Sequence[tuple[int, range]],
    rows: int,
    encode: Encode,
    num_threads: int,
) -> Iterator[tuple[_Batch, np.ndarray, np.ndarray]]:
    """Batches with what `encode` gives for them, of which one is always at work."""
    if not parts:
        return
    batches = read_ahead(
        lambda number: _read(source, *parts[number], rows), len(parts), num_threads
    )
    with contextlib.closing(batches):
        running = None
        for batch in batches:
            started = batch, *encode(batch.images)
            if running is not None:
                yield _fetched(*running)
            running = started
        yield _fetched(*running)


def _fetched(batch: _Batch, *arrays: jax.Array) -> tuple[_Batch, np.ndarray, np.ndarray]:
    return batch, *map(np.asarray, arrays)


def _read(source: Source, shard: int, indices: range, rows: int) -> _Batch:
    images = np.zeros((rows, *source.image_shape), np.float32)
    labels = np.zeros(rows, np.int32)
    broken: dict[int, str] = {}

    def read(part: range) -> None:
        try:
            examples = source.examples_at(np.asarray(part))
        except UserError as error:
            if len(part) == 1:
                broken[part[0]] = str(error)
            else:
                for index in part:
                    read(range(index, index + 1))
        else:
            place = slice(part.start - indices.start, part.stop - indices.start)
            images[place], labels[place] = to_model_range(examples["image"]), examples["label"]

    read(indices)
    return _Batch(shard, indices, images, labels, broken)


class _RefusedError(Exception):
    """Images of a shard are broken, so that it is not written."""


def _records(
    batches: Iterable[tuple[_Batch, np.ndarray, np.ndarray]],
    skipped: list[dict[str, str]],
    on_corrupt: str,
    progress: tqdm,
) -> Iterator[bytes]:
    """The records of a shard; adds to `skipped` what is broken."""
    for batch, moments, is_finite in batches:
        for row, index in enumerate(batch.indices):
            if index in batch.broken:
                skipped.append({"name": f"image {index}", "reason": batch.broken[index]})
                continue
            if not is_finite[row]:
                raise UserError(
                    f"the moments of image {index} are not finite; convert the autoencoder again, or"
                    " set autoencoder.dtype=float32."
                )
            yield pack(moments[row], batch.labels[row], index)
        progress.update(len(batch.indices))
    if skipped and on_corrupt == "refuse":
        raise _RefusedError


def _finish(writer: ShardWriter, refused: Sequence[str]) -> dict[str, Any]:
    """Waits for all processes, of which the first writes the manifest."""
    processes.wait_for_all(f"the shards of {writer.folder}")
    refusing = np.flatnonzero(multihost_utils.process_allgather(np.int32(len(refused))))
    if refused:
        noun = "image" if len(refused) == 1 else "images"
        reasons = [reason.partition(";")[0] for reason in refused]
        raise UserError(
            f"{len(refused)} {noun} can't be encoded ({listed(reasons)}); mend or remove them, or set"
            " data.on_corrupt=skip."
        )
    if refusing.size:
        raise UserError(
            f"process {refusing[0]} has images that can't be encoded; see what it said."
        )
    if jax.process_index() == 0:
        if missing := writer.missing():
            raise UserError(
                f"{len(missing)} shards that other processes wrote are not in {writer.folder}; let all"
                " write to one folder that they share."
            )
        writer.finish()
    processes.wait_for_all(f"the manifest of {writer.folder}")
    return read_manifest(writer.folder, KIND)
