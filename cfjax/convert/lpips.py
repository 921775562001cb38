"""The published weights of LPIPS to ours: torchvision's VGG-16 and the package's linear layers."""

import re
from os import PathLike
from pathlib import Path

import numpy as np

from cfjax import lpips_files, program
from cfjax.convert import torch_files
from cfjax.convert.report import Report, check_names_and_shapes
from cfjax.convert.torch_files import StateDict
from cfjax.errors import UserError
from cfjax.tensor_files import TensorFile

FORMAT = "lpips"
_SUFFIXES = (".pth", ".pt", ".safetensors")
_LAYER = re.compile(r"(features|lin)_(\d+)/(kernel|bias)")
_MEND = (
    "put torchvision's vgg16-397923af.pth and vgg.pth of the package lpips, version 0.1, into the"
    " folder, and nothing else."
)


def to_ours(source: Path, allow_pickle: bool, out: Path, report: Report) -> None:
    """Writes a folder that `lpips_files.load` reads.

    Args:
      source: a folder with both published files.
      allow_pickle: read anything, which may run code that is in the files.
      out: the folder.
      report: is filled.

    Raises:
      UserError: weights are missing, extra or misshapen; they are listed.
    """
    arrays, dtypes = _read(source, allow_pickle)
    report.leave_out({name: "they classify" for name in arrays if name.startswith("classifier.")})
    shapes = {name: array.shape for name, array in arrays.items() if name not in report.left_out}
    ours = {_published_name(path): path for path in lpips_files.flat_shapes()}
    expected = {
        name: _published_shape(lpips_files.flat_shapes()[path]) for name, path in ours.items()
    }
    check_names_and_shapes(shapes, expected, _MEND)
    report.map_names(expected, ours)
    report.say_casts(dtypes[name] for name in expected)
    program.check_workdir_writable(out)
    lpips_files.save_streaming(out, ((path, _to_ours(arrays[name])) for name, path in ours.items()))


def _read(
    source: str | PathLike, allow_pickle: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of all files of a folder by name, on disk until they are used, and their dtypes."""
    place = Path(source)
    files = sorted(file for file in place.glob("*") if file.suffix in _SUFFIXES)
    if not files:
        raise UserError(f"{source} is not a folder with weights; {_MEND}")
    arrays, dtypes = {}, {}
    for file in files:
        of_file = _open(file, allow_pickle)
        arrays |= {name: of_file[name] for name in of_file}
        dtypes |= of_file.dtypes()
    return arrays, dtypes


def _open(file: Path, allow_pickle: bool) -> TensorFile | StateDict:
    if file.suffix == ".safetensors":
        return TensorFile(file)
    document = torch_files.read(file, allow_pickle)
    if not torch_files.is_state_dict(document):
        raise UserError(f"the file {file} has no weights in it; {_MEND}")
    return StateDict(document)


def _published_name(path: str) -> str:
    """`features_0/kernel` is `features.0.weight`, `lin_0/kernel` is `lin0.model.1.weight`."""
    kind, number, what = _LAYER.fullmatch(path).groups()
    what = {"kernel": "weight", "bias": "bias"}[what]
    return f"features.{number}.{what}" if kind == "features" else f"lin{number}.model.1.{what}"


def _published_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    return (*shape[::-1], 1, 1) if len(shape) == 2 else shape


def _to_ours(array: np.ndarray) -> np.ndarray:
    """Kernels [outputs, inputs, height, width] as ours; the linear layers' without the last two."""
    if array.ndim == 1:
        return array.astype(np.float32)
    is_linear = array.shape[0] == 1
    ours = array[:, :, 0, 0].T if is_linear else array.transpose(2, 3, 1, 0)
    return np.ascontiguousarray(ours, np.float32)
