"""The table of docs/preflight.md: `python -m benchmarks.preflight_table`, from the root.

Each row is one run of `cfjax.preflight` in a process of its own, which takes some minutes; its report
is kept in a folder, so that a table that was interrupted goes on where it stopped. `--fresh` starts
anew. The rows of `docs/preflight.md` between its markers are replaced.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs/preflight.md"
BEGIN, END = "<!-- table: benchmarks/preflight_table.py -->", "<!-- end of table -->"
GIB = 2**30

XL = "--config=configs/imagenet256.py:xl"
XL512 = "--config=configs/imagenet512.py"
# Latents, as with any autoencoder of its scale: no file is read.
CAPTIONS = [
    "--config=configs/in1kcap256.py:{}",
    "--topology=v5e:16x16",
    "--config.autoencoder.path=kl16",
]
# Name of a row -> arguments of cfjax.preflight.
ROWS = {
    "L 256²": ["--config=configs/imagenet256.py:l", "--topology=v5e:16x16"],
    "XL 256²": [XL, "--topology=v5e:16x16"],
    "H 256², 40 layers": ["--config=configs/imagenet256.py:h", "--topology=v5e:16x16"],
    "XL/2 512²": [XL512, "--topology=v5e:16x16"],
    "XL/1 512², 1024 tokens": [
        *(XL512, "--topology=v5e:16x16", "--config.model.patch_size=1"),
        "--config.model.remat_policy=full",
    ],
    "XL 256² on v4": [XL, "--topology=v4:4x4x8"],
    "XL 256² on v5p": [XL, "--topology=v5p:4x4x4"],
    "XL 256² on v6e": [XL, "--topology=v6e:8x8"],
    "XL 256², two slices": [XL, "--topology=v5e:16x16", "--slices=2"],
    "XL 256², batch 128": [
        *(XL, "--topology=v5e:4x4", "--config.mesh.fsdp=4", "--config.train.global_batch_size=128")
    ],
    "captions and images, L 256²": [it.format("l") for it in CAPTIONS],
    "the same, `transfusion`": [it.format("transfusion") for it in CAPTIONS],
    "XL 256², remat none": [XL, "--topology=v5e:16x16", "--config.model.remat_policy=none"],
}

SAMPLER = [
    *(XL, "--topology=v5e:2x2", "--what=sample", "--batch_size=256"),
    "--config.sampling.guidance_scale=1.5",
]
SAMPLER_ROWS = {
    f"S = {count}": [*SAMPLER, f"--config.sampling.num_ar_steps={count}"] for count in (1, 2, 4, 8)
}


def main(_: Sequence[str]) -> None:
    """Runs what is missing and writes the table."""
    folder = Path(flags.FLAGS.results)
    folder.mkdir(parents=True, exist_ok=True)
    every = ROWS | SAMPLER_ROWS
    for number, (name, arguments) in enumerate(every.items()):
        path = folder / f"{number}.json"
        if flags.FLAGS.fresh or _arguments_of(path) != arguments:
            print(f"{name}: {' '.join(arguments)}", flush=True)
            path.write_text(json.dumps({"arguments": arguments, **run_preflight(arguments)}))
    results = [json.loads((folder / f"{number}.json").read_text()) for number in range(len(every))]
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(results)}{END}{after}")


def _arguments_of(path: Path) -> list[str] | None:
    return json.loads(path.read_text())["arguments"] if path.exists() else None


def run_preflight(arguments: Sequence[str]) -> dict[str, Any]:
    """The report of one run, with its wall seconds and peak memory.

    Raises:
      RuntimeError: it ended with neither "fits" nor "does not fit".
    """
    command = [sys.executable, "-m", "cfjax.preflight", "--json=-", *arguments]
    began = time.monotonic()
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "report": json.loads(text),
        "seconds": time.monotonic() - began,
        "peak_gib": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB,
    }


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of train steps, then samplers, with a line on what compiled them and what that took."""
    reports = [result["report"] for result in results]
    lines = [
        "| run | chips, mesh (data, fsdp, tensor) | batch | HBM a chip, GiB: peak of limit = state +"
        " activations + code | counted / model FLOPs | train step at peak FLOP/s, at least |"
        " gathers in loops, asynchronous | largest collective |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, report) for name, report in zip(ROWS, reports, strict=False)),
        "",
        "The sampler of XL with guidance, 256 images at a time on v5e:2x2:",
        "",
        "| AR steps | HBM a chip, GiB: peak of limit = state + activations + code | of the activations,"
        " KV cache | counted / model FLOPs | collectives in loops | batch at peak FLOP/s, at least |",
        "|---|---|---|---|---|---|",
        *(
            _sampler_row(name, report)
            for name, report in zip(SAMPLER_ROWS, reports[len(ROWS) :], strict=True)
        ),
    ]
    versions = {tuple(report["versions"].items()) for report in reports}
    compilers = " and ".join(
        ", ".join(f"{name} {version}" for name, version in pairs) for pairs in sorted(versions)
    )
    seconds = max(result["seconds"] for result in results)
    peak = max(result["peak_gib"] for result in results)
    lines += [
        "",
        f"Compiled by {compilers}; the longest took {seconds / 60:.1f} minutes on two shared cores,"
        f" the largest {peak:.1f} GiB of the machine's memory.",
    ]
    return "\n".join(lines) + "\n"


def _hbm(memory: Mapping[str, Any]) -> str:
    parts = " + ".join(f"{memory[it] / GIB:.2f}" for it in ("state", "activations", "code"))
    return f"{memory['peak'] / GIB:.2f} of {memory['limit'] / GIB:.2f} = {parts}"


def _sampler_row(name: str, report: Mapping[str, Any]) -> str:
    (program,) = report["programs"]
    memory, flops = program["memory"], program["flops"]
    cells = [
        name,
        _hbm(memory),
        f"{memory['kv_cache'] / GIB:.2f}",
        f"{flops['ratio']:.3f}",
        str(sum(row["count"] for row in program["collectives"] if row["in_loop"])),
        f"{flops['lower_limit_seconds']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def _row(name: str, report: Mapping[str, Any]) -> str:
    (program,) = report["programs"]
    memory, flops = program["memory"], program["flops"]
    if program["fits"]:
        hbm = _hbm(memory)
        gathers = [
            row for row in program["collectives"] if row["kind"] == "all-gather" and row["in_loop"]
        ]
        count, asynchronous, num_bytes, async_bytes = (
            sum(row[key] for row in gathers)
            for key in ("count", "async_count", "bytes", "async_bytes")
        )
        overlap = f"{asynchronous} of {count}: {async_bytes / num_bytes:.0%} of bytes"
        top = program["largest_collective"]
        where = "in loop" if top["in_loop"] else "outside"
        largest = f"{top['kind']} {top['dtype']}, {top['bytes'] / 1e6:.1f} MB, {where}"
    else:
        mend = f"`{' '.join(report['mend'])}` fits" if report["mend"] else "no mend found"
        hbm = (
            f"**does not fit**: {memory['needed'] / GIB:.2f} of {memory['limit'] / GIB:.2f}; {mend}"
        )
        overlap = largest = "-"
    slices = f"{report['num_slices']} × " if report["num_slices"] > 1 else ""
    mesh = ", ".join(map(str, report["mesh"].values()))
    cells = [
        name,
        f"{slices}{report['topology']} ({mesh})",
        f"{report['batch_size']:,}",
        hbm,
        f"{flops['ratio']:.3f}",
        f"{1e3 * flops['lower_limit_seconds']:.0f} ms",
        overlap,
        largest,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    flags.DEFINE_string("results", ".cache/preflight", "Folder of the reports of finished rows.")
    flags.DEFINE_bool("fresh", False, "Compile all rows anew.")
    app.run(main)
