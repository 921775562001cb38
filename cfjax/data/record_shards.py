"""Writing sets of records: array_record shards, whole or not at all, and a manifest of checksums.

A set is a folder of `<kind>-<i>-of-<n>.array_record`, each with a `.json` of its counts and SHA-256
beside it, `description.json`, which says what was asked for, and, once all shards are there,
`manifest.json`. What a killed run left is kept; a shard without its `.json` is made again. Several
processes make shards of one set; the bytes don't depend on who makes which.
"""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from cfjax.errors import UserError
from cfjax.paths import absolute, is_cloud

MANIFEST_FILE = "manifest.json"
_DESCRIPTION_FILE = "description.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Makes the shards of one set, those that are missing.

    Process k of n calls `begin`, then `write` for each of `missing()` with shard % n == k, and when
    all have done so, one calls `finish`.

    Attributes:
      folder: of the set; may be made by several writers at once, each with other shards.
      kind: what a record is: "images", "moments".
      description: JSON values that fix the bytes of the set; a folder that was begun with others
        is refused.
      num_shards: of the set.
      compress: with zstd; not for what is compressed already, such as JPEG.
    """

    folder: Path
    kind: str
    description: Mapping[str, Any]
    num_shards: int
    compress: bool = False

    def begin(self) -> None:
        """Makes the folder, or refuses one that holds something else.

        Raises:
          UserError: another description, or a place that can't be written to.
        """
        check_on_disk(self.folder)
        asked = {"kind": self.kind, **self.description, "num_shards": self.num_shards}
        path = self.folder / _DESCRIPTION_FILE
        if path.exists():
            check_description(self.folder, _read_json(path), asked)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(path, asked)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{self.kind}-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def missing(self) -> list[int]:
        """The shards that are yet to be made: not there, or not of the size that was written."""
        return [shard for shard in range(self.num_shards) if self._entry(shard) is None]

    def write(
        self, shard: int, records: Iterable[bytes], skipped: Sequence[Mapping[str, str]] = ()
    ) -> None:
        """Writes a shard; a run that is killed meanwhile leaves none.

        Args:
          shard: its number.
          records: in order; may be a generator.
          skipped: `{"name", "reason"}` of what was left out. It is read when the records are
            exhausted, so that their generator may extend it.

        Raises:
          UserError: the disk is full, or the folder can't be written to.
        """
        path = self.path(shard)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            num_records = _write_records(temporary, records, self.compress)
            entry = {
                "file": path.name,
                "num_records": num_records,
                "num_bytes": temporary.stat().st_size,
                "sha256": sha256(temporary),
                "skipped": list(skipped),
            }
            os.replace(temporary, path)
            _write_json(path.with_suffix(".json"), entry)
        except (OSError, RuntimeError) as error:  # array_record raises the latter
            raise _unwritable(path, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        """Writes the manifest; one of the processes does, when all have written their shards.

        Returns:
          The manifest, see `cfjax.data.records.read_manifest`.

        Raises:
          ValueError: a shard is missing.
        """
        if missing := self.missing():
            raise ValueError(f"shards {missing} of {self.folder} are missing")
        shards = [self._entry(shard) for shard in range(self.num_shards)]
        skipped = [it for entry in shards for it in entry.pop("skipped")]
        manifest = {
            "format": FORMAT,
            "kind": self.kind,
            "description": dict(self.description),
            "num_records": sum(entry["num_records"] for entry in shards),
            "num_skipped": len(skipped),
            "skipped": skipped,
            "shards": shards,
        }
        _write_json(self.folder / MANIFEST_FILE, manifest)
        return manifest

    def _entry(self, shard: int) -> dict[str, Any] | None:
        path = self.path(shard)
        try:
            entry = json.loads(path.with_suffix(".json").read_text())
            return entry if path.stat().st_size == entry["num_bytes"] else None
        except (OSError, ValueError):
            return None


def check_on_disk(folder: str | PathLike) -> None:
    """Refuses a folder in cloud storage, to which shards can't be written.

    Raises:
      UserError: it is one.
    """
    if is_cloud(folder):
        raise UserError(
            f"shards can't be written to {fspath(folder)}; write them to a disk and copy the folder."
        )


def check_description(
    folder: str | PathLike, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Refuses a set that was made of, or for, something else.

    Args:
      folder: of the set.
      found: what its description says.
      expected: what it must say; keys that are not among these may be anything.

    Raises:
      UserError: the first value that differs.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise UserError(
                f"the set {folder} was made with {key} {_short(found.get(key))}, not"
                f" {_short(value)}; name another folder, or delete it and make it again."
            )


def sha256(path: str | PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with absolute(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_records(path: Path, records: Iterable[bytes], compress: bool) -> int:
    options = "group_size:1" if compress else "group_size:1,uncompressed"
    path.touch()  # a folder that can't be written to says so here
    writer = array_record_module.ArrayRecordWriter(fspath(path), options)
    num_records = 0
    try:
        for record in records:
            writer.write(record)
            num_records += 1
    finally:
        writer.close()
    reader = array_record_module.ArrayRecordReader(fspath(path))
    found = reader.num_records()
    reader.close()
    if found != num_records:
        raise OSError(f"of {num_records} records {found} were written; the disk may be full")
    return num_records


def _write_json(path: Path, value: Any) -> None:
    # Processes that write the same file write the same bytes, but not into each other's.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); delete its folder.") from error


def _unwritable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path} can't be written: {reason}; free space or name another folder.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
