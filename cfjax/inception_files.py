"""Inception's weights on disk: one `.safetensors`, which `cfjax.convert --from=inception` writes."""

import dataclasses
import hashlib
from collections.abc import Mapping
from os import PathLike
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError
from cfjax.models.inception import InceptionV3
from cfjax.paths import absolute
from cfjax.tensor_files import TensorFile, write_tensors

# The public files by their sha256. pytorch-fid and torch-fidelity publish the same bytes, under the
# names pt_inception-... and weights-inception-....
ADM_GRAPH = "classify_image_graph_def.pb"
TORCH_FILE = "pt_inception-2015-12-05-6726825d.pth"
KNOWN = {
    "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6": ADM_GRAPH,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": TORCH_FILE,
}
_CHECKSUM, _SOURCE = "checksum", "source_sha256"  # in the file's metadata
_CHECKSUM_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class InceptionWeights:
    """Inception's parameters and where they come from.

    Attributes:
      params: of `InceptionV3`, nested dicts of float32 NumPy arrays.
      checksum: the first 12 hex digits of the sha256 of all arrays with their names: the same from
        whichever public file.
      source_name: of the public file that they come from; None if that is unknown.
      warning: a sentence that must stand beside every score, or None.
    """

    params: Any
    checksum: str
    source_name: str | None

    @property
    def warning(self) -> str | None:
        """None for the weights of a public file."""
        return None if self.source_name else unknown_warning(self.checksum)


def unknown_warning(checksum: str) -> str:
    """The sentence that stands beside every score of weights from no public file."""
    return (
        f"The feature extractor is of unknown weights (sha256 {checksum}...): its scores compare"
        " with nothing published."
    )


def load(path: str | PathLike) -> InceptionWeights:
    """The weights in a file.

    Args:
      path: on disk or in cloud storage.

    Raises:
      UserError: it is missing or damaged, or has other arrays.
    """
    if not absolute(path).is_file():
        raise UserError(
            f"there are no weights of Inception in {path}; fetch {ADM_GRAPH} of the ADM evaluation"
            f" suite, {TORCH_FILE} of pytorch-fid or weights-inception-2015-12-05-6726825d.pth of"
            " torch-fidelity and run python -m cfjax.convert --from=inception --source=FILE"
            " --out=inception.safetensors."
        )
    file = TensorFile(path)
    if file.shapes() != flat_shapes() or set(file.dtypes().values()) != {"float32"}:
        raise UserError(f"the weights in {path} are not those of Inception; convert them again.")
    arrays = dict(file)
    checksum = arrays_checksum(arrays)
    if file.metadata.get(_CHECKSUM, checksum) != checksum:
        raise UserError(
            f"the weights in {path} have changed since they were written: their sha256 is"
            f" {checksum}..., not {file.metadata[_CHECKSUM]}...; convert them again."
        )
    source_name = KNOWN.get(file.metadata.get(_SOURCE)) if _CHECKSUM in file.metadata else None
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    return InceptionWeights(params, checksum, source_name)


def save(path: str | PathLike, arrays: Mapping[str, np.ndarray], source_sha256: str) -> str:
    """Writes a file for `load`.

    Args:
      path: on disk.
      arrays: float32, by path in the parameters.
      source_sha256: of the file that they come from.

    Returns:
      Their checksum.
    """
    checksum, shapes = arrays_checksum(arrays), flat_shapes()
    metadata = {_CHECKSUM: checksum, _SOURCE: source_sha256}
    write_tensors(path, shapes, ((name, arrays[name]) for name in shapes), metadata)
    return checksum


def arrays_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """The first 12 hex digits of the sha256 of float32 arrays, each behind its name, in order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()[:_CHECKSUM_DIGITS]


def flat_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by path, sorted; computes nothing."""
    images = jnp.zeros((1, 1, 1, 3))
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {path: flat[path].shape for path in sorted(flat)}
