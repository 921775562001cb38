"""LPIPS on disk: a folder with `weights.safetensors`, which `cfjax.convert --from=lpips` writes."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError
from cfjax.models.lpips import Lpips
from cfjax.paths import absolute
from cfjax.tensor_files import TensorFile, write_tensors

WEIGHTS_FILE = "weights.safetensors"


def load(folder: str | PathLike) -> Any:
    """The parameters of `Lpips`, nested dicts of float32 NumPy arrays.

    Args:
      folder: on disk or in cloud storage.

    Raises:
      UserError: it is missing or damaged, or has other weights.
    """
    file = absolute(folder) / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(
            f"there are no weights of LPIPS in {folder!r}; pass a folder that cfjax.convert"
            " --from=lpips wrote."
        )
    arrays = TensorFile(file)
    if arrays.shapes() != flat_shapes():
        raise UserError(f"the weights in {folder} are not those of LPIPS; convert them again.")
    return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")


def save_streaming(folder: str | PathLike, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes float32 arrays by path, in the order of `flat_shapes`."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    write_tensors(place / WEIGHTS_FILE, flat_shapes(), arrays)


def flat_shapes() -> Mapping[str, tuple[int, ...]]:
    """Shapes of the parameters by path, sorted; computes nothing."""
    model = Lpips()
    images = jnp.zeros((1, model.least_size, model.least_size, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images, images)["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {path: flat[path].shape for path in sorted(flat)}
