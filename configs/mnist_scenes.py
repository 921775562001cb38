"""Captioned scenes of MNIST digits: one model that draws them and describes them.

    python -m cfjax.train --config configs/mnist_scenes.py --workdir runs/mnist_scenes

Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    """The quick start's model with text, on embedded scenes."""
    config = mnist.get_config()

    config.data.name = "scenes"
    config.data.size = 32
    config.data.channels = 3
    config.data.num_classes = 0

    config.text.tokenizer = "bytes"
    config.text.tokens_per_row = 96
    config.text.images_per_row = 2

    config.model.width = 128
    config.model.depth = 6
    config.model.patch_size = 8

    config.loss.text_loss_weight = 0.1

    config.optimizer.ema_decay = 0.998

    config.train.global_batch_size = 32  # rows of 2 documents
    config.train.num_train_steps = 5_500

    return config
