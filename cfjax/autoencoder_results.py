"""What a trained autoencoder leaves: a picture, measures, and the folder that is loaded.

Everything is computed by all processes together, and written by the first.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cfjax import autoencoder_files
from cfjax.autoencoder_files import CONFIG_FILE, WEIGHTS_FILE
from cfjax.autoencoder_objective import psnr, sample_each
from cfjax.data.image_files import write_png
from cfjax.data.images import to_model_range, to_uint8
from cfjax.data.sources import Source
from cfjax.models.autoencoder_kl import AutoencoderKL
from cfjax.paths import absolute, is_cloud
from cfjax.rng import per_example_keys, stream_key
from cfjax.sharding import constrain
from cfjax.visualization import image_grid

MAX_MEASURED = 10_000
REPORT_FILE = "training.json"
_COLUMNS, _PAIRS_OF_ROWS = 10, 2


class Measures(NamedTuple):
    """Of at most MAX_MEASURED images of each split, evenly spread over it.

    Attributes:
      psnr: mean over held-out images of their reconstructions' from the likeliest latents, in dB,
        see `autoencoder_objective.psnr`.
      latent_std: standard deviation of all latents drawn for training images, not scaled.
      num_held_out, num_training: images.
    """

    psnr: float
    latent_std: float
    num_held_out: int
    num_training: int


def measure(
    module: AutoencoderKL,
    params: Any,
    training: Source,
    held_out: Source,
    seed: int,
    batch_size: int,
) -> Measures:
    """Reconstructs held-out images and draws latents of training images.

    Args:
      module: the autoencoder.
      params: of it, on all devices of the active mesh.
      training, held_out: images.
      seed: of the drawn latents.
      batch_size: images at a time over all devices.
    """
    key = stream_key(seed, "measured_latents")
    decibels = _of_images(lambda images, _: _psnr(module, params, images), held_out, batch_size)
    latents = _of_images(
        lambda images, indices: _latents(module, params, images, key, indices), training, batch_size
    )
    return Measures(
        psnr=float(decibels.mean(dtype=np.float64)),
        latent_std=float(latents.std(dtype=np.float64)),
        num_held_out=len(decibels),
        num_training=len(latents),
    )


def shown_images(source: Source) -> np.ndarray:
    """The images of `reconstructions`, uint8 `[N, H, W, C]`, evenly spread over the source."""
    count = min(len(source), _PAIRS_OF_ROWS * _COLUMNS)
    count -= count % min(count, _COLUMNS)  # whole rows
    return source.examples_at(_spread(len(source), count))["image"]


def reconstructions(module: AutoencoderKL, params: Any, images: np.ndarray) -> np.ndarray:
    """A picture of uint8 images, each row above a row of their reconstructions, uint8 `[H, W, C]`."""
    decoded = _reconstruct(module, params, to_model_range(images))
    pairs = np.stack([images, to_uint8(jax.device_get(decoded))])
    num_columns = min(_COLUMNS, len(images))
    rows = pairs.reshape(2, -1, num_columns, *images.shape[1:]).swapaxes(0, 1)
    return image_grid(rows.reshape(-1, *images.shape[1:]), num_columns)


def write_picture(path: str | PathLike, picture: np.ndarray) -> None:
    """Writes uint8 `[H, W, 1 or 3]` as PNG, whole or not at all, on disk or in cloud storage."""
    if not is_cloud(path):
        write_png(path, picture)
        return
    with tempfile.TemporaryDirectory() as made:
        write_png(Path(made) / "picture.png", picture)
        absolute(path).write_bytes((Path(made) / "picture.png").read_bytes())


def write_folder(
    folder: str | PathLike, module: AutoencoderKL, params: Any, report: dict[str, Any]
) -> str:
    """Writes a folder for `autoencoder_files.load`; returns its checksum.

    It replaces one that is there, whole or not at all. In cloud storage, where folders can't be
    renamed, the config comes last, without which nothing is loaded.

    Args:
      folder: on disk or in cloud storage.
      module: the autoencoder.
      params: of it.
      report: how it was made, for `training.json`.
    """
    params = jax.device_get(params)
    if is_cloud(folder):
        with tempfile.TemporaryDirectory() as made:
            checksum = _save(Path(made), module, params, report)
            for name in (WEIGHTS_FILE, REPORT_FILE, CONFIG_FILE):
                (absolute(folder) / name).write_bytes((Path(made) / name).read_bytes())
        return checksum
    place = Path(folder)
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checksum = _save(partial, module, params, report)
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    return checksum


def _save(folder: Path, module: AutoencoderKL, params: Any, report: dict[str, Any]) -> str:
    checksum = autoencoder_files.save(folder, module, params)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    return checksum


def _of_images(
    function: Callable[[np.ndarray, np.ndarray], jax.Array], source: Source, batch_size: int
) -> np.ndarray:
    """What `function` says of images and their indices, `[batch, ...]`, joined over batches."""
    indices = _spread(len(source), min(len(source), MAX_MEASURED))
    results = []
    for begin in range(0, len(indices), batch_size):
        chunk = indices[begin : begin + batch_size]
        filled = np.resize(chunk, batch_size)  # the last batch has the shape of the others
        images = to_model_range(source.examples_at(filled)["image"])
        results.append(jax.device_get(function(images, filled))[: len(chunk)])
    return np.concatenate(results)


def _spread(length: int, count: int) -> np.ndarray:
    """`count` indices, evenly spread over `length`."""
    return np.arange(count) * length // count


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(module: AutoencoderKL, params: Any, images: jax.Array) -> jax.Array:
    images = constrain(images, ("batch",))
    return constrain(module.apply({"params": params}, images), (None,))


@functools.partial(jax.jit, static_argnums=0)
def _psnr(module: AutoencoderKL, params: Any, images: jax.Array) -> jax.Array:
    images = constrain(images, ("batch",))
    return constrain(psnr(module.apply({"params": params}, images), images), (None,))


@functools.partial(jax.jit, static_argnums=0)
def _latents(
    module: AutoencoderKL, params: Any, images: jax.Array, key: jax.Array, indices: jax.Array
) -> jax.Array:
    images = constrain(images, ("batch",))
    moments = module.apply({"params": params}, images, method="encode")
    return constrain(sample_each(moments, per_example_keys(key, indices)), (None,))
