"""Files that grow while a run goes on, on disk and in cloud storage, and TensorBoard's records."""

import os
import socket
import struct
import time
from typing import Any

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from cfjax.paths import is_cloud

# Cloud storage takes whole files only, which are not sent with every line.
_SECONDS_BETWEEN_UPLOADS = 60


class GrowingFile:
    """A file to append to; what is appended is in it at once, or in cloud storage after `flush`."""

    def __init__(self, path: epath.Path, content: bytes = b""):
        """Starts the file anew, in one move.

        Raises:
          OSError: as all methods, when it can't be written.
        """
        self._path = path
        self._content = bytearray(content)
        self._uploaded = time.monotonic()
        if is_cloud(path):
            path.write_bytes(content)
            self._file = None
            return
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(content)
        temporary.replace(path)
        self._file = path.open("ab")
        self._content.clear()

    def append(self, content: bytes) -> None:
        """Adds to the end."""
        if self._file is not None:
            self._file.write(content)
            self._file.flush()
            return
        self._content += content
        if time.monotonic() - self._uploaded > _SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        """Returns when all that was appended is in the file."""
        if self._file is None:
            self._path.write_bytes(bytes(self._content))
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Flushes; nothing can be appended after."""
        self.flush()
        if self._file is not None:
            self._file.close()


class EventFile:
    """TensorBoard's events of one session of a run."""

    def __init__(self, folder: epath.Path, start_train_step: int):
        """Starts a file, from which on what was logged after `start_train_step` does not count.

        Raises:
          OSError: as all methods, when it can't be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = GrowingFile(
            folder / f"events.out.tfevents.{name}.after_{start_train_step}",
            _record(Event(wall_time=time.time(), file_version="brain.Event:2")),
        )
        # TensorBoard drops what earlier sessions logged from this train step on.
        purged = start_train_step + 1 if start_train_step else 0
        self.add(purged, session_log=SessionLog(status=SessionLog.START))

    def add(self, train_step: int, **what: Any) -> None:
        """Adds an event, such as `summary=...`."""
        self._file.append(_record(Event(wall_time=time.time(), step=train_step, **what)))

    def flush(self) -> None:
        """Returns when all events are in the file."""
        self._file.flush()

    def close(self) -> None:
        """Flushes; nothing can be added after."""
        self._file.close()


def _record(event: Event) -> bytes:
    """Length, its checksum, content, its checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return length + checksums[0] + content + checksums[1]
