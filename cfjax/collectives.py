"""What the devices of a compiled program say to each other, read from its HLO text.

TPU compilers write one collective in several ways: as an instruction, as a `-start` and a `-done`
between which other work runs, or in pieces in the fusions of that other work. A reduction whose
result is sliced at once, `all-reduce-scatter`, is a reduce-scatter.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_CHANNEL = re.compile(r"channel_id=([0-9]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONSTANT = re.compile(r"constant\(([0-9]+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      dtypes: of the arrays, such as "bf16".
      num_bytes: of the whole arrays: what is gathered, or what is reduced before it is scattered.
      in_loop: whether it stands in a loop, such as that over the layers.
      times: how often a run of the program executes it; None where the text does not tell.
      is_async: whether other work runs meanwhile.
      op_name: the operation of the traced program that it serves.
    """

    kind: str
    dtypes: tuple[str, ...]
    num_bytes: int
    in_loop: bool
    times: int | None
    is_async: bool
    op_name: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a computation is called from."""

    in_loop: bool = False
    times: int | None = 1
    is_async: bool = False
    is_scattered: bool = False
    op_name: str = ""


def find_collectives(hlo_text: str) -> list[Collective]:
    """All collectives of a compiled program, in the order of the text's calls.

    Args:
      hlo_text: `jax.stages.Compiled.as_text()`.
    """
    computations, entry = _parse(hlo_text)
    found: dict[Any, list[Collective]] = collections.defaultdict(list)
    for key, collective in _walk(computations, entry, _Place()):
        found[key].append(collective)
    return [_joined(pieces) for pieces in found.values()]


def _parse(hlo_text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the first computation to run."""
    computations, entry, current = {}, "", None
    for line in hlo_text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif current is not None and (name := _NAME.match(line)):
            shape, rest = _split_shape(line[name.end() :])
            opcode, _, rest = rest.partition("(")
            current.append(_Instruction(name[1], shape, opcode, rest))
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """`shape opcode(...)` at the space between; a tuple's shape has parentheses."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 2 :]
    return text, ""


def _walk(
    computations: dict[str, list[_Instruction]], name: str, place: _Place
) -> Iterator[tuple[Any, Collective]]:
    """Every appearance of a collective in a computation and those that it calls, with its identity."""
    instructions = computations.get(name, [])
    if any('custom_call_target="AsyncCollective' in it.rest for it in instructions):
        place = dataclasses.replace(place, is_async=True)
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    for instruction in instructions:
        kind, is_start = re.subn(r"-start$", "", instruction.opcode)
        if kind in KINDS:
            yield _collective(kind, bool(is_start), instruction, shapes, place)
        called = _called(instruction)
        for attribute, callee in called:
            if attribute in ("to_apply", "condition"):
                continue  # sums of two numbers, comparisons
            inner = place
            if attribute == "body":
                trips = _num_trips(computations, called)
                times = None if None in (trips, place.times) else trips * place.times
                inner = dataclasses.replace(place, in_loop=True, times=times)
            elif instruction.opcode == "fusion":
                inner = dataclasses.replace(
                    place,
                    is_async=place.is_async or callee.startswith("async_collective_fusion"),
                    is_scattered=callee.startswith("all-reduce-scatter"),
                    op_name=_op_name(instruction),
                )
            elif instruction.opcode == "async-start":
                inner = dataclasses.replace(place, is_async=True)
            elif instruction.opcode.startswith("async-"):
                continue  # the end of what its start calls
            yield from _walk(computations, callee, inner)


def _called(instruction: _Instruction) -> list[tuple[str, str]]:
    """`(attribute, computation)` for each computation that an instruction calls."""
    return [
        (match[1], callee.lstrip("%"))
        for match in _CALLED.finditer(instruction.rest)
        for callee in (match[2] or match[3]).split(", ")
    ]


def _num_trips(
    computations: dict[str, list[_Instruction]], called: Sequence[tuple[str, str]]
) -> int | None:
    """How often a loop runs that counts from 0 up to the one constant of its condition."""
    condition = computations.get(dict(called).get("condition", ""), [])
    constants = [
        match[1]
        for instruction in condition
        if instruction.opcode == "constant"
        and (match := _CONSTANT.match(f"constant({instruction.rest}"))
    ]
    return int(constants[0]) if len(constants) == 1 else None


def _collective(
    kind: str, is_start: bool, instruction: _Instruction, shapes: dict[str, str], place: _Place
) -> tuple[Any, Collective]:
    arrays = _ARRAY.findall(instruction.shape)
    if kind == "reduce-scatter":
        operands = instruction.rest.partition(")")[0].replace("%", "").split(", ")
        arrays = [it for operand in operands for it in _ARRAY.findall(shapes.get(operand, ""))]
    elif is_start and kind in ("all-gather", "collective-permute"):
        arrays = [it for it in arrays if it[1]]  # not the counters that a permute carries
        arrays = arrays[len(arrays) // 2 :]  # operands, then results
    if kind == "all-reduce" and place.is_scattered:
        kind = "reduce-scatter"
    channel = _CHANNEL.search(instruction.rest)
    collective = Collective(
        kind,
        tuple(sorted({dtype for dtype, _ in arrays})),
        sum(_num_bytes(dtype, dimensions) for dtype, dimensions in arrays),
        place.in_loop,
        place.times,
        place.is_async or is_start,
        _op_name(instruction) or place.op_name,
    )
    # The pieces of one collective share its channel, but so do all permutes.
    in_pieces = place.is_async and channel is not None
    return (kind, channel[1] if in_pieces else instruction.name, place.in_loop), collective


def _op_name(instruction: _Instruction) -> str:
    match = _OP_NAME.search(instruction.rest)
    return match[1] if match else ""


def _num_bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"[0-9]+", dtype)[0])
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8


def _joined(pieces: Sequence[Collective]) -> Collective:
    """One collective from all its appearances."""
    named = [piece for piece in pieces if piece.op_name] or pieces
    return dataclasses.replace(named[0], is_async=any(piece.is_async for piece in pieces))
