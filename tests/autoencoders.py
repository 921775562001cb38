"""Autoencoders with random weights, for tests."""

import flax.traverse_util
import numpy as np

from cfjax import autoencoder_files
from cfjax.models.autoencoder_kl import AutoencoderKL

SCALE = 0.7


def random_params(module, seed=0):
    """Nothing is zero; without a program to compile."""
    rng = np.random.default_rng(seed)
    shapes = autoencoder_files.flat_shapes(module)
    flat = {path: rng.normal(0, 0.2, shape).astype(np.float32) for path, shape in shapes.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def make(folder, image_channels=1, latent_channels=2, scale=SCALE, seed=0):
    """Writes one of 2 pixels a latent along one side; returns what `autoencoder_files.load` gives."""
    module = AutoencoderKL(
        channels=8,
        channel_multipliers=(1, 2),
        num_groups=4,
        num_res_blocks=1,
        latent_channels=latent_channels,
        image_channels=image_channels,
        scale=scale,
    )
    autoencoder_files.save(folder, module, random_params(module, seed))
    return autoencoder_files.load(folder)
