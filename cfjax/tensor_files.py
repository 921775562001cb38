"""Arrays by name in one file of the safetensors format, read and written one array at a time.

The format is eight bytes that give the length of a JSON header, the header with dtype, shape and
place of each array, then the arrays.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError
from cfjax.paths import absolute, is_cloud

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100_000_000  # as the format says
_ALIGNMENT = 64


class TensorFile(Mapping[str, np.ndarray]):
    """Names to arrays, which stay on disk until they are used.

    Files in cloud storage are read as a whole.
    """

    def __init__(self, path: str | PathLike):
        """Reads the header.

        Raises:
          UserError: there is no such file, or it is not whole, or not of this format.
        """
        place = absolute(path)
        if not place.is_file():
            raise UserError(f"there is no file {path}; pass the path of a .safetensors file.")
        if is_cloud(path):
            self._bytes = np.frombuffer(place.read_bytes(), np.uint8)
        elif place.stat().length:
            self._bytes = np.memmap(place, np.uint8, mode="r")
        else:
            self._bytes = np.zeros(0, np.uint8)
        try:
            self._entries, self.metadata = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the file {path} is not a whole safetensors file ({error}); fetch it again."
            ) from error

    def _read_header(self) -> tuple[dict[str, tuple], dict[str, str]]:
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if self._bytes.size < 8 or length > min(_MAX_HEADER, self._bytes.size - 8):
            raise ValueError("its header is cut off")
        header = json.loads(self._bytes[8 : 8 + length].tobytes())
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata have no names")
        entries = {}
        for name, entry in header.items():
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if not 8 + length <= begin <= end <= self._bytes.size:
                raise ValueError(f"{name} lies outside of it")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has another size than its shape")
            entries[name] = (dtype, shape, begin, end)
        return entries, metadata

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, begin, end = self._entries[name]
        return self._bytes[begin:end].view(np.ndarray).view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; reads nothing more."""
        return {name: shape for name, (_, shape, _, _) in self._entries.items()}

    def dtypes(self) -> dict[str, str]:
        """Names of dtypes by name; reads nothing more."""
        return {name: dtype.name for name, (dtype, _, _, _) in self._entries.items()}


def write_tensors(
    path: str | PathLike,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file of float32 arrays, which appears under its name only when it is whole.

    Args:
      path: on disk.
      shapes: of all arrays by name.
      arrays: the same names in the same order, with their arrays; taken one at a time.
      metadata: what else `TensorFile.metadata` shall have.
    """
    header, offset = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    partial = Path(f"{path}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for (name, shape), (given, array) in zip(shapes.items(), arrays, strict=True):
            if (given, array.shape, array.dtype) != (name, tuple(shape), np.float32):
                raise ValueError(f"{given} {array.shape} came where {name} {shape} was due")
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
