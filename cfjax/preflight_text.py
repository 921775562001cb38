"""A report of `cfjax.preflight` as text for people."""

from collections.abc import Mapping
from typing import Any

_GIB = 2**30


def report_text(report: Mapping[str, Any]) -> str:
    """Lines of at most some 100 columns, with a line break at the end."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    slices = f"{report['num_slices']} slices of " if report["num_slices"] > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    what = "train step" if report["what"] == "train" else "sampler"
    lines = [
        f"The {what} on {slices}{report['topology']}: {report['num_chips']} chips, mesh {mesh}.",
        f"Compiled by {versions}. It did not run: nothing here is a measured speed.",
        "",
        f"parameters   {report['num_parameters'] / 1e6:,.1f} M",
        f"batch        {report['batch_size']:,} {_examples(report)}",
    ]
    for program in report["programs"]:
        lines += ["", *_program_lines(program)]
    lines += ["", *_assumption_lines(report["assumption"])]
    if not report["fits"]:
        lines += ["", *_mend_lines(report["mend"])]
    return "\n".join(lines) + "\n"


def _examples(report: Mapping[str, Any]) -> str:
    if "row" not in report:
        return "images"
    text, images = report["row"]["text_tokens"], report["row"]["images"]
    return f"rows of {text} text tokens and {images} image{'s' if images > 1 else ''}"


def _program_lines(program: Mapping[str, Any]) -> list[str]:
    lines = []
    if "num_clean" in program:
        lines.append(
            f"With {program['num_clean']} clean tokens"
            f" ({100 * program['share_of_train_steps']:.0f}% of train steps):"
        )
    memory, flops = program["memory"], program["flops"]
    limit = f"{memory['limit'] / _GIB:.2f} GiB"
    if "needed" in memory:
        lines.append(
            f"memory       DOES NOT FIT: needs at least {memory['needed'] / _GIB:.2f} of {limit} a"
            " chip"
        )
    else:
        parts = ", ".join(
            f"{name} {memory[name] / _GIB:.2f}" for name in ("state", "activations", "code")
        )
        lines.append(
            f"memory       {'fits' if program['fits'] else 'DOES NOT FIT'}: peak"
            f" {memory['peak'] / _GIB:.2f} of {limit} a chip ({parts})"
        )
    if "kv_cache" in memory:
        lines.append(f"             a KV cache of {memory['kv_cache'] / _GIB:.2f} GiB a chip")
    lines += [
        f"FLOPs        model {_scaled(flops['model'])}, counted {_scaled(flops['counted'])}, ratio"
        f" {flops['ratio']:.3f}",
        f"lower limit  {1e3 * flops['lower_limit_seconds']:.4g} ms: the counted FLOPs at the peak of"
        " all chips",
    ]
    if "lower_limit_seconds" in memory:
        lines.append(
            f"             {1e3 * memory['lower_limit_seconds']:.4g} ms: arguments and results once"
            " through a chip's HBM"
        )
    if program.get("collectives"):
        lines += ["", *_collective_lines(program)]
    return lines


def _collective_lines(program: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{'collectives':<22}{'where':<10}{'count':>6}{'MB':>9}{'async':>8}{'MB executed':>14}"
    ]
    for row in program["collectives"]:
        executed = row["executed_bytes"]
        lines.append(
            f"{row['kind'] + ' ' + row['dtype']:<22}{'in loop' if row['in_loop'] else 'outside':<10}"
            f"{row['count']:>6}{row['bytes'] / 1e6:>9.2f}{row['async_count']:>8}"
            f"{'?' if executed is None else f'{executed / 1e6:.1f}':>14}"
        )
    top = program["largest_collective"]
    lines.append(
        f"The largest: {top['kind']} {top['dtype']} of {top['bytes'] / 1e6:.2f} MB,"
        f" {'asynchronous' if top['async'] else 'synchronous'},"
        f" {'in a loop' if top['in_loop'] else 'outside loops'}"
        f"{', for ' + top['operation'] if top['operation'] else ''}."
    )
    return lines


def _scaled(flops: float) -> str:
    return f"{flops / 1e15:.4g} P" if flops >= 1e15 else f"{flops / 1e12:.4g} T"


def _assumption_lines(assumption: Mapping[str, float]) -> list[str]:
    first = (
        f"If the model's FLOPs reached {assumption['mfu']:.0%} of the peak (assumed, not measured):"
    )
    rates = f"  {assumption['images_per_second']:,.0f} images/s"
    if "epochs_per_day" in assumption:
        rates += (
            f", {assumption['epochs_per_day']:,.1f} epochs a day, a train step in"
            f" {1e3 * assumption['seconds_per_train_step']:.4g} ms"
        )
    else:
        rates += f", a batch in {assumption['seconds_per_batch']:.4g} s"
    return [first, rates]


def _mend_lines(mend: list[str] | None) -> list[str]:
    if mend is None:
        return ["No change that was tried makes it fit."]
    return [f"The nearest change that fits: {' '.join(mend)}"]
