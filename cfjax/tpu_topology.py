"""TPUs that are described, not there: their chips, and devices that the TPU compiler compiles for.

The compiler comes with libtpu, which runs on any machine; `pip install 'cfjax[preflight]'`.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from cfjax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
      shape_length: 2 where slices are rectangles, 3 where they are boxes.
      peak_flops: FLOP/s of bfloat16 matrix products, as specified.
      hbm_bandwidth: bytes/s, as specified.
      hbm_limit: bytes that a program may use, as the compiler (libtpu 0.0.42) states when one needs
        more; below the specified HBM by what the system keeps.
    """

    shape_length: int
    peak_flops: float
    hbm_bandwidth: float
    hbm_limit: int


# Specifications: https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e.
CHIPS = {
    "v4": Chip(3, 275e12, 1200e9, int(30.75 * 2**30)),
    "v5e": Chip(2, 197e12, 819e9, int(15.75 * 2**30)),
    "v5p": Chip(3, 459e12, 2765e9, int(95.74 * 2**30)),
    "v6e": Chip(2, 918e12, 1640e9, int(31.25 * 2**30)),
}
# Where chips have two cores, a program sees one device of both.
_MEGACORE = ("v4", "v5p")
_EXAMPLES = "v5e:16x16, v6e:8x8, v4:4x4x8, v5p:4x4x4"
_TOPOLOGY = re.compile(r"([a-z0-9]+):([0-9]+(?:x[0-9]+){1,2})")

# Read when libtpu is loaded: no search for a machine's own TPUs, none of its log files, no lock
# against a second process, and nothing on stderr.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Chip and shape of a topology such as "v5e:16x16".

    Raises:
      UserError: it is not of that form, or its chip is unknown.
    """
    match = _TOPOLOGY.fullmatch(name)
    if match is None:
        raise UserError(f"the topology {name!r} is not of the form CHIP:SHAPE, like {_EXAMPLES}.")
    check_choice("TPU chip", match[1], CHIPS)
    shape = tuple(int(size) for size in match[2].split("x"))
    if len(shape) != CHIPS[match[1]].shape_length:
        raise UserError(
            f"the topology {name!r} has {len(shape)} sizes, but {match[1]} slices have"
            f" {CHIPS[match[1]].shape_length}, as in {_EXAMPLES}."
        )
    return match[1], shape


def describe_devices(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """The devices, one a chip, of slices of a topology; they compile programs and cannot run them.

    To be called before this process does anything else with libtpu.

    Raises:
      UserError: the topology is unknown, or libtpu is missing.
    """
    chip, shape = parse_topology(name)
    if num_slices < 1:
        raise UserError(f"there are {num_slices} slices, but must be at least 1.")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is missing: install libtpu by `pip install 'cfjax[preflight]'`, or in"
            " a clone `pip install -e '.[preflight]'`."
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options = {"chip_config_name": "megacore"} if chip in _MEGACORE else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    if set(shape) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the TPU compiler does not know the topology {name!r} ({error}); take one like"
            f" {_EXAMPLES}."
        ) from error
    return topology.devices
