"""The constants of a frozen TensorFlow graph (`.pb`), read without TensorFlow and without protobuf.

A GraphDef is a protocol buffer: fields of a number, a kind and a value, in which messages nest as
bytes. Only the fields on the way to a constant's values are looked into:

    GraphDef.node (1) = NodeDef: name (1), op (2), attr (5) = an entry: key (1), value (2) = AttrValue
    AttrValue.tensor (8) = TensorProto: dtype (1), tensor_shape (2), tensor_content (4), float_val (5)
    TensorShapeProto.dim (2): size (1)
"""

import math
import mmap
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import numpy as np

from cfjax.errors import UserError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT = 1  # DT_FLOAT
_LONGEST_VARINT = 10


def read_constants(path: str | PathLike) -> dict[str, np.ndarray]:
    """The float32 constants of a graph by the names of their nodes, mapped from disk.

    Constants of other types, which hold sizes and axes, are passed over.

    Raises:
      UserError: there is no such file, or it is not a whole graph with such constants in it.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; pass the path of a frozen graph (.pb).")
    constants = {}
    try:
        with Path(path).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for number, value in _fields(data):
            if number == 1:
                name, array = _constant(_bytes(value))
                if array is not None:
                    constants[name] = array
    except ValueError as error:
        raise UserError(
            f"the file {path} is not a whole frozen graph ({error}); fetch it again."
        ) from error
    if not constants:
        raise UserError(f"the file {path} has no float32 constants in it; pass a frozen graph.")
    return constants


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields: an integer, or the bytes of all else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"it has a field of the unknown kind {kind}")
        if length > len(data) - at:
            raise ValueError("it is cut off")
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, least first, and where it ends."""
    value = 0
    for index in range(_LONGEST_VARINT):
        if at + index >= len(data):
            raise ValueError("it is cut off")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("it has an integer without an end")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it has a number where a message belongs")
    return value


def _constant(node: memoryview) -> tuple[str, np.ndarray | None]:
    """A node's name, and its values if it is a float32 constant."""
    name, op, tensor = b"", b"", None
    for number, value in _fields(node):
        if number == 1:
            name = bytes(_bytes(value))
        elif number == 2:
            op = bytes(_bytes(value))
        elif number == 5:
            entry = dict(_fields(_bytes(value)))
            if bytes(_bytes(entry.get(1, memoryview(b"")))) == b"value":
                attribute = dict(_fields(_bytes(entry.get(2, memoryview(b"")))))
                tensor = attribute.get(8)
    if op != b"Const" or tensor is None:
        return name.decode(errors="replace"), None
    return name.decode(), _array(name.decode(), _bytes(tensor))


def _array(name: str, tensor: memoryview) -> np.ndarray | None:
    """The values of a TensorProto, if they are float32.

    They are in `tensor_content`, or in `float_val`, where the last stands for all that don't follow.
    """
    dtype, shape, content, values = 0, (), b"", []
    for number, value in _fields(tensor):
        if number == 1:
            dtype = value
        elif number == 2:
            shape = tuple(_size(dim) for kind, dim in _fields(_bytes(value)) if kind == 2)
        elif number == 4:
            content = _bytes(value)
        elif number == 5:  # packed, or one by one
            values.append(bytes(_bytes(value)))
    if dtype != _FLOAT:
        return None
    size = math.prod(shape)
    if len(content):
        given = np.frombuffer(content, "<f4")
        is_whole = len(given) == size
    else:
        given = np.frombuffer(b"".join(values), "<f4") if values else np.zeros(min(1, size), "<f4")
        is_whole = len(given) <= size
    if not is_whole:
        raise ValueError(f"{name} has another size than its shape {shape}")
    if len(given) < size:
        given = np.pad(given, (0, size - len(given)), "edge")
    return given.reshape(shape)


def _size(dim: int | memoryview) -> int:
    """Of a dimension; 0 is not written."""
    size = dict(_fields(_bytes(dim))).get(1, 0)
    if not isinstance(size, int) or size >= 1 << 31:  # negative ones, of unknown size, too
        raise ValueError("it has a constant of unknown size")
    return size
