"""Progressions of MNIST digits, continued in context: 3, 4, 5 is followed by 6.

    python -m cfjax.train --config configs/mnist_progressions.py --workdir runs/mnist_progressions

Hardware: a CPU; half an hour on one core. Expected: after three images the next has the right class in 87%,
and so has the thirtieth; see docs/documents.md.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    """Documents of 10 images; their only text tokens are those that announce and end images."""
    config = mnist.get_config()

    config.data.name = "progressions"
    config.data.num_classes = 0

    config.text.tokenizer = "bytes"
    config.text.tokens_per_row = 20
    config.text.images_per_row = 10

    config.model.width = 192
    config.model.depth = 5
    config.model.num_heads = 6
    config.model.patch_size = 28  # an image is one token: what it shows is recognized soonest
    config.model.num_condition_tokens = 1  # of no class, which no document has

    config.diffusion.timesteps_per_ar_step = 4

    config.loss.text_loss_weight = 0.1
    config.optimizer.ema_decay = 0.998

    config.train.global_batch_size = 8
    config.train.num_train_steps = 9_000

    config.sampling.guidance_scale = 4.0  # against an image that begins a document

    return config
