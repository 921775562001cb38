"""The published weights of the 2015 Inception network to ours: of the ADM suite, or as for PyTorch."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from cfjax import inception_files, program
from cfjax.autoencoder_files import sha256
from cfjax.convert import torch_files
from cfjax.convert.frozen_graph import read_constants
from cfjax.convert.report import Report, check_names_and_shapes
from cfjax.convert.torch_files import StateDict
from cfjax.errors import UserError, check_choice
from cfjax.tensor_files import TensorFile

FORMAT = "inception"
_GRAPH = ".pb"
_SUFFIXES = (_GRAPH, ".pth", ".pt", ".safetensors")
_MEND = f"pass {inception_files.ADM_GRAPH} or {inception_files.TORCH_FILE} in --source."
_LOGITS = "logits/kernel"
# Of a batch normalization: ours, in the graph, for PyTorch.
_NORM = {
    "gamma": ("gamma", "weight"),
    "beta": ("beta", "bias"),
    "mean": ("moving_mean", "running_mean"),
    "variance": ("moving_variance", "running_var"),
}
# Layers and blocks in the graph; blocks count on from "mixed".
_LAYERS = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
# Branches by what they begin with.
_TOWERS = {
    "branch1x1": "",
    "branch5x5": "tower/",
    "branch7x7": "tower/",
    "branch3x3": "tower/",
    "branch7x7dbl": "tower_1/",
    "branch7x7x3": "tower_1/",
    "branch3x3dbl": "tower_1/",
    "branch_pool": "tower_2/",
}
_TOWERS_OF_6A = {"branch3x3": "", "branch3x3dbl": "tower/"}
_UNIT = re.compile(r"(\w+?)(?:_(\d)([ab]?))?")


def to_ours(source: Path, allow_pickle: bool, out: Path, report: Report) -> None:
    """Writes a file that `inception_files.load` reads.

    Args:
      source: `.pb` of the ADM suite; `.pth`, `.pt` or `.safetensors` with PyTorch's names.
      allow_pickle: read anything, which may run code that is in the file.
      out: the file.
      report: is filled.

    Raises:
      UserError: weights are missing, extra or misshapen; they are listed.
    """
    check_choice("suffix of Inception's weights", source.suffix, _SUFFIXES)
    is_graph = source.suffix == _GRAPH
    arrays, dtypes = _open(source, allow_pickle)
    name_of = graph_name if is_graph else torch_name
    our_shapes = inception_files.flat_shapes()
    ours = {name_of(path): path for path in our_shapes}
    report.leave_out(_left_out(set(arrays) - set(ours), is_graph))
    shapes = {name: array.shape for name, array in arrays.items() if name not in report.left_out}
    expected = {name: _published_shape(our_shapes[path], is_graph) for name, path in ours.items()}
    check_names_and_shapes(shapes, expected, _MEND)
    report.map_names(expected, ours)
    report.say_casts(dtypes[name] for name in expected)
    converted = {path: _to_ours(arrays[name], is_graph) for name, path in ours.items()}
    program.check_workdir_writable(out.parent)
    digest = sha256(source)
    checksum = inception_files.save(out, converted, digest)
    known = inception_files.KNOWN.get(digest)
    if known:
        report.say(f"These are the published weights of {known}, checksum {checksum}.")
    else:
        report.say(inception_files.unknown_warning(checksum))


def graph_name(path: str) -> str:
    """`Mixed_5b/branch5x5_2/kernel` is `mixed/tower/conv_1/conv2d_params` in the graph."""
    if path == _LOGITS:
        return "softmax/weights"
    *unit, what = path.split("/")
    what = "conv2d_params" if what == "kernel" else f"batchnorm/{_NORM[what][0]}"
    if len(unit) == 1:
        return f"{_numbered('conv', _LAYERS.index(unit[0]))}/{what}"
    block, layer = unit
    number = _BLOCKS.index(block.removeprefix("Mixed_"))
    branch, place, fork = _UNIT.fullmatch(layer).groups()
    towers = _TOWERS | (_TOWERS_OF_6A if block == "Mixed_6a" else {})
    if fork:  # a pair within the tower
        place = f"mixed/{_numbered('conv', 'ab'.index(fork))}"
    else:
        place = _numbered("conv", int(place or 1) - 1)
    return f"{_numbered('mixed', number)}/{towers[branch]}{place}/{what}"


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def torch_name(path: str) -> str:
    """`Mixed_5b/branch5x5_2/kernel` is `Mixed_5b.branch5x5_2.conv.weight` for PyTorch."""
    if path == _LOGITS:
        return "fc.weight"
    *unit, what = path.split("/")
    what = "conv.weight" if what == "kernel" else f"bn.{_NORM[what][1]}"
    return ".".join([*unit, what])


def _open(source: Path, allow_pickle: bool) -> tuple[Mapping[str, np.ndarray], Mapping[str, str]]:
    """The arrays by name, on disk until they are used, and their dtypes."""
    if source.suffix == _GRAPH:
        constants = read_constants(source)
        return constants, dict.fromkeys(constants, "float32")
    if source.suffix == ".safetensors":
        file = TensorFile(source)
        return file, file.dtypes()
    document = torch_files.read(source, allow_pickle)
    if not torch_files.is_state_dict(document):
        raise UserError(f"the file {source} has no weights in it; {_MEND}")
    state = StateDict(document)
    return state, state.dtypes()


def _left_out(others: Iterable[str], is_graph: bool) -> dict[str, str]:
    """Those of other names than our weights' that are none of ours, and why."""
    reasons = {}
    for name in sorted(others):
        if name in ("fc.bias", "softmax/biases"):
            reasons[name] = "the suite's logits have no bias"
        elif is_graph:  # a whole program: what it has besides is of no use to the features
            reasons[name] = "it belongs to other parts of the graph"
        elif name.startswith("AuxLogits."):
            reasons[name] = "it only trained the network"
        elif name.endswith(".num_batches_tracked"):
            reasons[name] = "it counts what the statistics were made of"
    return reasons


def _published_shape(shape: tuple[int, ...], is_graph: bool) -> tuple[int, ...]:
    if is_graph or len(shape) == 1:
        return shape
    if len(shape) == 2:
        return shape[::-1]
    height, width, inputs, outputs = shape
    return (outputs, inputs, height, width)


def _to_ours(array: np.ndarray, is_graph: bool) -> np.ndarray:
    """PyTorch's kernels are [outputs, inputs, height, width]; the graph's are as ours."""
    if not is_graph and array.ndim > 1:
        array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return np.ascontiguousarray(array, np.float32)
