"""Reading records of array_record shards at random, and what is damaged."""

import dataclasses
import hashlib
import json
import os
import resource
import threading
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from os import PathLike, fspath
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np
from absl import logging
from array_record.python import array_record_module

from cfjax.data.record_shards import FORMAT, MANIFEST_FILE, sha256
from cfjax.errors import UserError, check_choice, listed
from cfjax.paths import absolute

ON_CORRUPT = ("refuse", "skip")
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER_BYTES = 2**16

_Decoded = TypeVar("_Decoded")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file, and which of its records are meant.

    Attributes:
      path: the file.
      num_records: that the file must hold.
      first: the first that is meant.
      count: how many are; None for all from `first` on.
      num_bytes: its size, where it is known.
      sha256: of the file, where it is known; not compared.
    """

    path: str
    num_records: int
    first: int = 0
    count: int | None = None
    num_bytes: int | None = None
    sha256: str = ""


def read_manifest(folder: str | PathLike, kind: str) -> dict[str, Any]:
    """Reads the manifest of a set that `record_shards.ShardWriter` made.

    Args:
      folder: of the set.
      kind: what its records must be.

    Returns:
      `{"format", "kind", "description": what fixed the bytes, "num_records", "num_skipped",
      "skipped": [{"name", "reason"}], "shards": [{"file", "num_records", "num_bytes", "sha256"}]}`.

    Raises:
      UserError: there is none, as the set is not complete, or it is damaged or of another kind.
    """
    path = absolute(folder) / MANIFEST_FILE
    if not path.exists():
        raise UserError(
            f"there is no {path}, which is written when all shards are; run the program that makes"
            " them, to its end."
        )
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"], manifest["kind"]
        total = sum(shard["num_records"] for shard in manifest["shards"])
        if total != manifest["num_records"]:
            raise ValueError(f"{manifest['num_records']} records, but its shards have {total}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}); delete it and run the program that made it again."
        ) from error
    if found != (FORMAT, kind):
        raise UserError(
            f"the set {folder} holds {found[1]} in format {found[0]}, not {kind} in format"
            f" {FORMAT}; name another folder."
        )
    return manifest


def shards_of(folder: str | PathLike, manifest: dict[str, Any]) -> list[Shard]:
    """The shards that a manifest lists."""
    place = absolute(folder)
    return [
        Shard(
            fspath(place / it["file"]),
            it["num_records"],
            num_bytes=it["num_bytes"],
            sha256=it["sha256"],
        )
        for it in manifest["shards"]
    ]


def verify_checksums(folder: str | PathLike, manifest: dict[str, Any]) -> None:
    """Reads all shards and compares their SHA-256 with the manifest.

    Raises:
      UserError: those that are missing or have changed.
    """
    place = absolute(folder)

    def is_damaged(entry: dict[str, Any]) -> bool:
        path = place / entry["file"]
        return not path.exists() or sha256(path) != entry["sha256"]

    with ThreadPool() as pool:
        damaged = pool.map(is_damaged, manifest["shards"])
    names = [it["file"] for it, bad in zip(manifest["shards"], damaged, strict=True) if bad]
    if names:
        raise UserError(
            f"{listed(names)} of {folder} are missing or changed; delete them and run the program"
            " that made them again."
        )


class RecordReader:
    """Random access to the records of several shards, from several threads.

    Attributes:
      left_out: of each damaged shard that was skipped, its `{"name", "reason"}`.
    """

    def __init__(self, shards: Sequence[Shard], on_corrupt: str, mend: str, replaces: bool = True):
        """Opens all shards and compares them with what they must be.

        Args:
          shards: the set, in order.
          on_corrupt: "refuse" what is damaged; or "skip" it and name it in the log: a shard is
            left out, and instead of a record the next sound one is read.
          mend: how a shard is made again, for errors: "delete it and run ...".
          replaces: read the next sound record where one is to be skipped; else refuse it all the
            same, for a caller who leaves it out.

        Raises:
          UserError: a shard is missing or damaged and to be refused, or there is no record.
        """
        check_choice("data.on_corrupt", on_corrupt, ON_CORRUPT)
        self._on_corrupt, self._mend, self._replaces = on_corrupt, mend, replaces
        _allow_open_files(len(shards))
        with ThreadPool(16) as pool:
            opened = pool.map(_open, shards)
        damage = [reason for _, reason in opened if reason]
        if damage and on_corrupt == "refuse":
            raise UserError(f"{listed(damage)}; {mend}, or set data.on_corrupt=skip.")
        for reason in damage:
            logging.warning("skipped a shard: %s", reason)
        self.left_out = tuple(
            {"name": PurePath(shard.path).name, "reason": f"{reason}; {mend}."}
            for shard, (_, reason) in zip(shards, opened, strict=True)
            if reason
        )
        sound = [(s, r) for s, (r, reason) in zip(shards, opened, strict=True) if not reason]
        self._shards = [shard for shard, _ in sound]
        self._readers = [reader for _, reader in sound]
        counts = [s.num_records - s.first if s.count is None else s.count for s in self._shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not len(self):
            raise UserError(f"there are no records to read; {mend}.")
        self._named: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def fingerprint(self) -> str:
        """A hash of the shards' names, counts, sizes and known checksums."""
        digest = hashlib.sha256()
        for shard in self._shards:
            place = absolute(shard.path)
            part = shard.first, shard.count, shard.num_records, place.stat().length, shard.sha256
            digest.update(os.fsencode(f"{place.name}\0{part}\n"))
        return digest.hexdigest()

    def records_at(self, indices: Sequence[int]) -> list[bytes]:
        """The records at some indices, read shard by shard.

        Raises:
          UserError: one is damaged and to be refused, or all are.
        """
        indices = np.asarray(indices, np.int64)
        records: list[bytes | None] = [None] * len(indices)
        for row, record in self._read(indices):
            records[row] = record
        for row, record in enumerate(records):
            if record is None:
                records[row] = self._sound_after(int(indices[row]), lambda record: record)
        return records

    def decoded_at(
        self, indices: Sequence[int], decode: Callable[[bytes], _Decoded]
    ) -> list[_Decoded]:
        """`decode` of the records at some indices.

        Args:
          indices: of the records.
          decode: raises a `UserError` for a record that is whole, but not what it should be.

        Raises:
          UserError: one is damaged and to be refused, or all are.
        """
        decoded = []
        for index, record in zip(indices, self.records_at(indices), strict=True):
            try:
                decoded.append(decode(record))
            except UserError as error:
                self._complain(int(index), error)
                decoded.append(self._sound_after(int(index), decode))
        return decoded

    def _read(self, indices: np.ndarray) -> list[tuple[int, bytes]]:
        """`(row, record)` of those that can be read."""
        which = np.searchsorted(self._ends, indices, side="right")
        found = []
        for number in np.unique(which):
            rows = np.flatnonzero(which == number)
            shard, end = self._shards[number], self._ends[number]
            begin = self._ends[number - 1] if number else 0
            if not (begin <= indices[rows]).all() or not (indices[rows] < end).all():
                raise IndexError(f"records {indices} of {len(self)}")
            positions = (indices[rows] - begin + shard.first).tolist()
            reader = self._readers[number]
            try:
                found += zip(rows.tolist(), reader.read(positions), strict=True)
            except RuntimeError:
                for row, position in zip(rows.tolist(), positions, strict=True):
                    try:
                        found.append((row, reader.read([position])[0]))
                    except RuntimeError:
                        reason = f"record {position} of the shard {shard.path} is corrupt"
                        self._complain(int(indices[row]), UserError(f"{reason}; {self._mend}."))
        return found

    def _sound_after(self, index: int, decode: Callable[[bytes], _Decoded]) -> _Decoded:
        for following in range(index + 1, index + len(self)):
            for _, record in self._read(np.array([following % len(self)])):
                try:
                    return decode(record)
                except UserError as error:
                    self._complain(following % len(self), error)
        raise UserError(f"no record can be read; {self._mend}.")

    def _complain(self, index: int, error: UserError) -> None:
        if self._on_corrupt == "refuse":
            sentence = str(error).removesuffix(".")
            raise UserError(f"{sentence}, or set data.on_corrupt=skip.") from error
        if not self._replaces:
            raise error
        with self._lock:
            if index not in self._named:
                self._named.add(index)
                logging.warning("skipped, and the next one read instead: %s", error)


class RecordSource:
    """What sources of records share; each sets `_reader`. See `cfjax.data.sources.Source`."""

    _reader: RecordReader

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def left_out(self) -> tuple[dict[str, str], ...]:
        return self._reader.left_out

    @property
    def fingerprint(self) -> str:
        return self._reader.fingerprint


def _open(shard: Shard) -> tuple[Any, str]:
    """A reader, or what is wrong with the shard."""
    path = absolute(shard.path)
    if not path.exists():
        return None, f"the shard {shard.path} is missing"
    num_bytes = path.stat().length
    if shard.num_bytes not in (None, num_bytes):
        return None, f"the shard {shard.path} has {num_bytes} bytes instead of {shard.num_bytes}"
    reader = array_record_module.ArrayRecordReader(
        shard.path, _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
    )
    found = reader.num_records()
    if found != shard.num_records:
        return None, f"the shard {shard.path} has {found} records instead of {shard.num_records}"
    return reader, ""


def _allow_open_files(count: int) -> None:
    """Of the 1,024 files that a process may usually have open, TFDS's ImageNet takes all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 1024
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
