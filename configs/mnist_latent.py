"""The quick start in latents: digits encoded by an autoencoder of our own, 49 tokens of 7x7 latents.

    python -m cfjax.train_autoencoder --config configs/mnist_autoencoder.py --workdir runs/mnist_vae
    python -m cfjax.encode --config configs/mnist_latent.py --dataset=mnist --out=runs/mnist_latents
    python -m cfjax.train --config configs/mnist_latent.py --workdir runs/mnist_latent

With `--config.data.name=mnist --config.data.path=` images are encoded in training instead, and
nothing has to be encoded before. Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    """The small model on latents."""
    config = mnist.get_config()

    config.data.name = "latents"
    config.data.path = "runs/mnist_latents"
    config.data.size = 7
    config.data.channels = 4
    config.autoencoder.path = "runs/mnist_vae/autoencoder"
    config.model.patch_size = 1

    config.sampling.clip_x_start = False  # latents have no bounds

    return config
