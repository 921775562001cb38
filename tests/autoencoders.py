"""A small autoencoder with random weights, for tests: 2 pixels a latent along one side."""

import jax
import numpy as np

from cfjax import autoencoder_files
from cfjax.models.autoencoder_kl import AutoencoderKL

SCALE = 0.7


def make(folder, image_channels=1, latent_channels=2, scale=SCALE, seed=0):
    """Writes it; returns what `autoencoder_files.load` gives."""
    module = AutoencoderKL(
        channels=8,
        channel_multipliers=(1, 2),
        num_groups=4,
        num_res_blocks=1,
        latent_channels=latent_channels,
        image_channels=image_channels,
        scale=scale,
    )
    images = np.zeros((1, 4, 4, image_channels), np.float32)
    params = jax.jit(module.init)(jax.random.key(seed), images)["params"]
    autoencoder_files.save(folder, module, jax.device_get(params))
    return autoencoder_files.load(folder)
