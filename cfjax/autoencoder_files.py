"""An autoencoder on disk: a folder with its weights, its config and their checksum.

| file | content |
|---|---|
| `weights.safetensors` | float32 arrays, named by their path in the parameters |
| `config.json` | the fields of `AutoencoderKL` but its dtype, and the weights' sha256 |
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError
from cfjax.models.autoencoder_kl import AutoencoderKL
from cfjax.paths import absolute
from cfjax.tensor_files import TensorFile, write_tensors

WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.json"
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An autoencoder with its parameters; from `load`.

    Attributes:
      module: encodes and decodes.
      params: float32 NumPy arrays, on disk until they are used; `jax.device_put` keeps them on a
        device, where every call would bring them else.
      checksum: sha256 of the weights, by which manifests of encoded images name the autoencoder.
    """

    module: AutoencoderKL
    params: Any
    checksum: str


def load(folder: str | PathLike, dtype: Any = jnp.float32) -> Autoencoder:
    """Reads a folder that `save` wrote.

    Args:
      folder: on disk or in cloud storage.
      dtype: of convolutions and matrix products.

    Raises:
      UserError: it is missing, damaged, or its weights don't fit its config.
    """
    place = absolute(folder)
    module, checksum = _read_config(folder, dtype)
    if sha256(place / WEIGHTS_FILE) != checksum:
        raise UserError(
            f"the weights of the autoencoder in {folder} are not those that its config names by"
            " their sha256; convert it again."
        )
    file, shapes = TensorFile(place / WEIGHTS_FILE), flat_shapes(module)
    if file.shapes() != shapes:
        raise UserError(
            f"the weights of the autoencoder in {folder} don't fit its config; convert it again."
        )
    params = flax.traverse_util.unflatten_dict(dict(file), sep="/")
    return Autoencoder(module, params, checksum)


def load_module(folder: str | PathLike) -> AutoencoderKL:
    """The module alone; its weights are not read.

    Raises:
      UserError: it is missing, or its config is damaged.
    """
    return _read_config(folder, jnp.float32)[0]


def _read_config(folder: str | PathLike, dtype: Any) -> tuple[AutoencoderKL, str]:
    """The module, and the sha256 of its weights."""
    place = absolute(folder)
    if not (place / CONFIG_FILE).is_file():
        raise UserError(
            f"there is no autoencoder in {folder}; pass a folder that cfjax.convert wrote."
        )
    try:
        config = json.loads((place / CONFIG_FILE).read_text())
        checksum = config.pop("sha256")
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config.items()
        }
        return AutoencoderKL(**fields, dtype=dtype), checksum
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the config of the autoencoder in {folder} cannot be read ({error}); convert it again."
        ) from error


def save(folder: str | PathLike, module: AutoencoderKL, params: Any) -> str:
    """Writes parameters, nested dicts of float32 arrays; returns the sha256 of the file."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return save_streaming(folder, module, ((path, flat[path]) for path in flat_shapes(module)))


def save_streaming(
    folder: str | PathLike, module: AutoencoderKL, arrays: Iterable[tuple[str, np.ndarray]]
) -> str:
    """Like `save`, of paths and arrays in the order of `flat_shapes`, taken one at a time."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    as_numpy = ((path, np.asarray(array)) for path, array in arrays)
    write_tensors(place / WEIGHTS_FILE, flat_shapes(module), as_numpy)
    checksum = sha256(place / WEIGHTS_FILE)
    config = config_of(module) | {"sha256": checksum}
    (place / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return checksum


def config_of(module: AutoencoderKL) -> dict[str, Any]:
    """The fields that make the same module again, but for its dtype."""
    names = [field.name for field in dataclasses.fields(module)]
    return {
        name: getattr(module, name) for name in names if name not in ("dtype", "parent", "name")
    }


@functools.cache
def flat_shapes(module: AutoencoderKL) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the parameters by path, sorted; computes nothing."""
    images = jnp.zeros((1, module.downsampling, module.downsampling, module.image_channels))
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {path: flat[path].shape for path in sorted(flat)}


def sha256(path: str | PathLike) -> str:
    """Of a file's content.

    Raises:
      UserError: there is no such file.
    """
    digest = hashlib.sha256()
    try:
        with absolute(path).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; pass another path.") from error
    return digest.hexdigest()
