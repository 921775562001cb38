"""Reading encoded images back: checksums, and what the autoencoder makes of some moments."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from cfjax.autoencoder_files import Autoencoder
from cfjax.autoencoder_objective import psnr
from cfjax.data.image_files import write_png
from cfjax.data.images import to_model_range, to_uint8
from cfjax.data.latents import KIND, LatentsSource
from cfjax.data.records import read_manifest, verify_checksums
from cfjax.data.sources import Source
from cfjax.errors import UserError
from cfjax.models.autoencoder_kl import split_moments
from cfjax.visualization import image_grid

_PAIRS_IN_A_ROW = 4


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
      psnr: of the reconstruction of each image and of its mirror image, float64 `[N, 2]`, in dB, see
        `cfjax.autoencoder_objective.psnr`.
      picture: a PNG, each image with its reconstruction beside it.
    """

    psnr: np.ndarray
    picture: Path


def verify(folder: Path, source: Source, autoencoder: Autoencoder, count: int) -> Verified:
    """Compares all checksums, and `count` images with what the modes of their moments decode to.

    Args:
      folder: of the set, `<path>/<split>`; the picture is `<path>/<split>_reconstructions.png`.
      source: the images that were encoded.
      autoencoder: that encoded them.
      count: of images, spread evenly over the set; fewer if it has fewer.

    Raises:
      UserError: a checksum is wrong, a record or its image is damaged, or a label is not the image's.
    """
    verify_checksums(folder, read_manifest(folder, KIND))
    module = autoencoder.module
    size, channels = source.image_shape[0] // module.downsampling, module.latent_channels
    latents = LatentsSource(folder.parent, folder.name, size, channels)
    chosen = np.unique(np.linspace(0, len(latents) - 1, count).astype(int))
    encoded = latents.examples_at(chosen)
    originals = source.examples_at(encoded["source_id"])
    if wrong := encoded["source_id"][encoded["label"] != originals["label"]].tolist():
        raise UserError(
            f"image {wrong[0]} in {folder} has another label than the image; delete the folder and"
            " encode again."
        )
    params = jax.device_put(autoencoder.params)
    images = originals["image"]
    both = np.stack([images, images[:, :, ::-1]], axis=1)
    decode = jax.jit(lambda params, z: module.apply({"params": params}, z, method="decode"))
    modes = split_moments(encoded["moments"].astype(np.float32)).mode()
    decoded = np.stack([decode(params, of_one) for of_one in modes])
    flat = (-1, *source.image_shape)
    picture = folder.with_name(f"{folder.name}_reconstructions.png")
    pairs = np.stack([images, to_uint8(decoded[:, 0])], axis=1).reshape(flat)
    write_png(picture, image_grid(pairs, num_columns=2 * min(len(chosen), _PAIRS_IN_A_ROW)))
    decibels = psnr(decoded.reshape(flat), to_model_range(both.reshape(flat)))
    return Verified(np.asarray(decibels, np.float64).reshape(-1, 2), picture)
