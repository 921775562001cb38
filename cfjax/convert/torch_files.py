"""PyTorch's files: read without running what is in them, written one array at a time.

torch is imported when it is needed, as most of cfjax does without.
"""

import argparse
import collections
import dataclasses
import math
import pickle
import re
import zipfile
from collections.abc import Hashable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.checkpoint_folders import short_reason
from cfjax.errors import UserError

_ALIGNMENT = 64
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")


def import_torch() -> Any:
    """The package torch.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "PyTorch's files need the package torch; install it with pip install 'cfjax[convert]'."
        ) from error
    return torch


def read(path: str | PathLike, allow_pickle: bool = False) -> Any:
    """The object in a file of `torch.save`, its tensors mapped from disk.

    Only tensors, plain values and `argparse.Namespace` are read, none of which runs code.

    Args:
      path: the file.
      allow_pickle: read anything, which may run code that is in the file.

    Raises:
      UserError: there is no such file, it is damaged, or it holds something else.
    """
    torch = import_torch()
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; pass the path of a checkpoint of PyTorch.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path,
                map_location="cpu",
                mmap=zipfile.is_zipfile(path),  # not the format before PyTorch 1.6
                weights_only=not allow_pickle,
            )
    except pickle.UnpicklingError as error:
        found = _FORBIDDEN.search(str(error))
        what = f"besides arrays ({found[1]})" if found else "besides arrays"
        raise UserError(
            f"the file {path} holds objects {what}, and reading them could run code that is in it;"
            " if you trust whoever made it, pass --allow_pickle, else take another file."
        ) from error
    except (ImportError, AttributeError) as error:  # of pickled objects, with --allow_pickle
        raise UserError(
            f"the file {path} holds objects of code that is not installed ({short_reason(error)});"
            " install what it names, or take a file with weights alone."
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise UserError(
            f"the file {path} cannot be read ({short_reason(error)}); fetch it again."
        ) from error


class StateDict(Mapping[str, np.ndarray]):
    """A state dict of torch as NumPy arrays, floats in float32, which stay on disk until used."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].detach()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; reads nothing."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, str]:
        """Names of dtypes by name; reads nothing."""
        return {name: str(t.dtype).removeprefix("torch.") for name, t in self._tensors.items()}


def is_state_dict(value: Any) -> bool:
    """Whether these are tensors by name, and some."""
    torch = import_torch()
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Stands for a float32 tensor in a document that is written; its values come under `key`."""

    key: Hashable
    shape: tuple[int, ...]


def entries(group: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    """A state dict to write, whose values come under (group, name)."""
    return collections.OrderedDict(
        (name, TensorEntry((group, name), tuple(shape))) for name, shape in shapes.items()
    )


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Stands for a tensor's values in the pickle."""

    name: str
    size: int


def write(
    path: str | PathLike, document: Any, arrays: Iterable[tuple[Hashable, np.ndarray]]
) -> None:
    """Writes a file for `torch.load`, which appears under its name when it is whole.

    As `torch.save` would write it, but that it needs every tensor in memory at once.

    Args:
      path: on disk.
      document: plain values, with a `TensorEntry` for each tensor.
      arrays: key and array of each, in any order; taken one at a time.
    """
    torch = import_torch()
    shapes, names = {}, {}

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, TensorEntry):
                return NotImplemented
            shape = shapes[value.key] = value.shape
            names[value.key] = str(len(names))
            storage = _Storage(names[value.key], math.prod(shape))
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            parts = (storage, 0, shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, parts

        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, _Storage):
                return None
            return "storage", torch.FloatStorage, value.name, "cpu", value.size

    partial, folder = Path(f"{path}.partial"), Path(path).stem
    with zipfile.ZipFile(partial, "w") as archive:
        with archive.open(f"{folder}/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(document)
        archive.writestr(f"{folder}/byteorder", "little")
        for key, array in arrays:
            shape = shapes.pop(key)
            if (array.shape, array.dtype) != (shape, np.float32):
                raise ValueError(f"{key} is {array.dtype} {array.shape}, not float32 {shape}")
            _write_aligned(archive, f"{folder}/data/{names[key]}", array)
        if shapes:
            raise ValueError(f"there came no {next(iter(shapes))}")
        archive.writestr(f"{folder}/version", "3\n")
    partial.replace(path)


def _write_aligned(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """An entry whose content begins at a multiple of 64 bytes, as `torch.load(mmap=True)` likes."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = array.nbytes
    header = archive.fp.tell() + 30 + len(name.encode())
    padding = -(header + 4) % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(entry, "w") as file:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
