"""Checks a run on TPUs that need not be there, with the real TPU compiler, on any machine:

    python -m cfjax.preflight --config configs/imagenet256.py:xl --topology v5e:16x16

It compiles the very train step (or, with `--what=sample`, the sampler) and reports what the compiler
says. Nothing runs, so nothing is measured. Exit code 0 if it fits the chips' memory, 1 if it does
not, and then it looks for the nearest change that does; 2 for bad input; 70 for an error of cfjax
or the compiler. The compiler comes with `pip install 'cfjax[preflight]'`.
"""

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from cfjax import build, preflight_mends, program, sharding
from cfjax.config_loading import define_config_flag
from cfjax.errors import UserError, check_choice
from cfjax.preflight_report import sample_report, train_report
from cfjax.preflight_text import report_text
from cfjax.tpu_topology import CHIPS, describe_devices, parse_topology

_INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    try:
        report = _report(flags.FLAGS)
    except UserError:
        raise
    except Exception:  # Python's exit code for it is 1 too
        sys.excepthook(*sys.exc_info())
        sys.exit(_INTERNAL_ERROR)
    _write(report, flags.FLAGS.json)
    sys.exit(0 if report["fits"] else 1)


def _report(values: flags.FlagValues) -> dict[str, Any]:
    check_choice("--what", values.what, ("train", "sample"))
    chip_name, _ = parse_topology(values.topology)
    chip = CHIPS[chip_name]
    devices = describe_devices(values.topology, values.slices)
    config = values["config"].value
    if values.what == "train":
        mesh = build.mesh(config, devices)
        report = train_report(
            config,
            mesh,
            chip,
            all_buckets=values.all_buckets,
            assumed_mfu=values.assumed_mfu,
            examples_per_epoch=values.examples_per_epoch,
        )
    else:
        mesh = sharding.make_mesh(devices=devices)
        images_at_once = config.sampling.images_per_device * mesh.size
        report = sample_report(
            config,
            mesh,
            chip,
            batch_size=values.batch_size or images_at_once,
            assumed_mfu=values.assumed_mfu,
        )
    report = {
        "topology": values.topology,
        "num_slices": values.slices,
        "num_chips": mesh.size,
        "mesh": dict(mesh.shape),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        **report,
        "mend": None,
    }
    if not report["fits"] and not values.no_mend:
        if values.what == "train":
            changes = preflight_mends.train_mend(config, devices, chip, values.slices)
            report["mend"] = changes and [f"--config.{key}={it}" for key, it in changes.items()]
        else:
            size = preflight_mends.sample_mend(config, devices, chip, report["batch_size"])
            of_device = f"--config.sampling.images_per_device={size // mesh.size}" if size else None
            report["mend"] = size and [f"--batch_size={size}" if values.batch_size else of_device]
    return report


def _write(report: dict[str, Any], json_path: str | None) -> None:
    if json_path != "-":
        sys.stdout.write(report_text(report))
    if json_path is None:
        return
    text = json.dumps(report, indent=2) + "\n"
    if json_path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(json_path).write_text(text)
    except OSError as error:
        raise UserError(f"cannot write --json={json_path}: {error.strerror}.") from error


if __name__ == "__main__":
    # Not the TPUs of this machine, should it have any: they may be in use.
    jax.config.update("jax_platforms", "cpu")
    # Programs for TPUs that are not there are written into a compilation cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    define_config_flag()
    flags.DEFINE_string("topology", None, "TPUs, such as v5e:16x16 or v4:4x4x8.", required=True)
    flags.DEFINE_integer("slices", 1, "How many of these, joined by the data center network.", 1)
    flags.DEFINE_string("what", "train", "What to compile: train or sample.")
    flags.DEFINE_string("json", None, "A file for the report as JSON, or - for stdout.")
    flags.DEFINE_bool(
        "all_buckets", False, "Compile each train.clean_length_buckets, not only the longest."
    )
    flags.DEFINE_bool("no_mend", False, "Don't look for a change that fits.")
    flags.DEFINE_float("assumed_mfu", 0.5, "Share of peak FLOP/s to assume.", 0.01, 1.0)
    flags.DEFINE_integer("examples_per_epoch", 1_281_167, "Images of an epoch; ImageNet's.", 1)
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Of --what=sample: images at a time; by default sampling.images_per_device on each.",
        lower_bound=1,
    )
    program.run(main)
