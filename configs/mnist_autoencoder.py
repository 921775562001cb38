"""A small autoencoder of the embedded MNIST digits: 28x28 grey pixels to 7x7 latents of 4 channels.

    python -m cfjax.train_autoencoder --config configs/mnist_autoencoder.py --workdir runs/mnist_vae

Hardware: 2 CPU cores. Expected: within 11 minutes, a PSNR of 30.0 dB on held-out digits.
"""

from ml_collections import ConfigDict

from configs import default_autoencoder


def get_config() -> ConfigDict:
    """The autoencoder of a quick start in latent space."""
    config = default_autoencoder.get_config()

    config.data.name = "mnist"
    config.data.size = 28
    config.data.channels = 1
    config.data.num_classes = 10
    config.data.horizontal_flip = False

    config.autoencoder.channels = 8
    config.autoencoder.channel_multipliers = (1, 2, 4)
    config.autoencoder.num_res_blocks = 1
    config.autoencoder.num_groups = 4

    config.loss.reconstruction = "l2"
    config.loss.kl_weight = 1e-3

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.995

    config.train.global_batch_size = 64
    config.train.num_train_steps = 2_000
    config.train.log_every = 50
    config.train.checkpoint_every = 500

    return config
