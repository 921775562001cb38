"""What the compiler says of a program: does it fit, what does it compute, what do devices exchange.

Nothing here is measured on a device. All bytes are of one chip.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from cfjax.collectives import Collective, find_collectives
from cfjax.flops import counted_flops
from cfjax.tpu_topology import Chip

# The ways in which versions of the compiler say that a program needs more memory than there is.
_USED = re.compile(
    r"(?:Used |memory required for HLO temporaries \()([0-9.]+)([KMGT]?)(?: of |\) exceeds )"
)
_ALLOCATION = re.compile(r"Allocation \(size=([0-9]+)\) would exceed memory")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def program_report(
    traced: jax.stages.Traced,
    compile_program: Callable[[], jax.stages.Compiled],
    chip: Chip,
    num_chips: int,
    model_flops: int,
) -> dict[str, Any]:
    """All that is known of a program, as plain values for JSON.

    Args:
      traced: the program.
      compile_program: compiles it.
      chip, num_chips: for which.
      model_flops: what its formulas ask for, over all chips.

    Returns:
      "fits", "memory", "flops" and, where it fits, "collectives" and "largest_collective".
    """
    counted = counted_flops(traced.jaxpr.jaxpr)
    report = {
        "flops": {
            "model": model_flops,
            "counted": counted,
            "ratio": counted / model_flops,
            "lower_limit_seconds": counted / (num_chips * chip.peak_flops),
        }
    }
    try:
        compiled = compile_program()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        memory = {"limit": chip.hbm_limit, "needed": needed}
        return {"fits": False, "memory": memory, **report}
    memory = memory_report(compiled, chip)
    collectives = find_collectives(compiled.as_text())
    return {
        "fits": memory["peak"] <= chip.hbm_limit,
        "memory": memory,
        **report,
        "collectives": collective_rows(collectives),
        "largest_collective": largest(collectives),
    }


def needed_bytes(message: str) -> int | None:
    """The memory that a program would need, from the compiler's complaint that it has too little.

    It is a lower limit where a single array is too large. None if the complaint is another.
    """
    if match := _USED.search(message):
        return round(float(match[1]) * _UNITS[match[2]])
    if match := _ALLOCATION.search(message):
        return int(match[1])
    return None


def memory_report(compiled: jax.stages.Compiled, chip: Chip) -> dict[str, Any]:
    """Peak memory of a compiled program, and what it is made of.

    "state" are its arguments, "activations" what it computes, at the peak. "lower_limit_seconds"
    takes it to read its arguments and write its results once.
    """
    analysis = compiled.memory_analysis()
    state, code = analysis.argument_size_in_bytes, analysis.generated_code_size_in_bytes
    peak = analysis.peak_memory_in_bytes
    return {
        "limit": chip.hbm_limit,
        "peak": peak + code,
        "state": state,
        "activations": peak - state,
        "code": code,
        "lower_limit_seconds": (state + analysis.output_size_in_bytes) / chip.hbm_bandwidth,
    }


def collective_rows(collectives: list[Collective]) -> list[dict[str, Any]]:
    """A row for each kind, dtype and place, with count and bytes; "async_bytes" are among them.

    "bytes" are of each collective once; "executed_bytes" of all times that a run executes it, None
    if the program does not tell how often a loop runs.
    """

    def key(collective):
        return not collective.in_loop, collective.kind, ",".join(collective.dtypes)

    rows = []
    for (outside, kind, dtypes), group in itertools.groupby(sorted(collectives, key=key), key):
        group = list(group)
        asynchronous = [it for it in group if it.is_async]
        times_known = all(it.times is not None for it in group)
        rows.append(
            {
                "kind": kind,
                "dtype": dtypes,
                "in_loop": not outside,
                "count": len(group),
                "bytes": sum(it.num_bytes for it in group),
                "async_count": len(asynchronous),
                "async_bytes": sum(it.num_bytes for it in asynchronous),
                "executed_bytes": sum(it.num_bytes * it.times for it in group)
                if times_known
                else None,
            }
        )
    return rows


def largest(collectives: list[Collective]) -> Mapping[str, Any] | None:
    """The collective of the most bytes, and the operation that it serves."""
    if not collectives:
        return None
    top = max(collectives, key=lambda collective: collective.num_bytes)
    return {
        "kind": top.kind,
        "dtype": ",".join(top.dtypes),
        "bytes": top.num_bytes,
        "in_loop": top.in_loop,
        "async": top.is_async,
        "operation": top.op_name,
    }
