"""Transforms of MNIST digits in context: two pairs of a digit and its transform, then a query.

    python -m cfjax.train --config configs/mnist_transforms.py --workdir runs/mnist_transforms

Hardware: a CPU; half an hour on one core. Expected: 97% of the answers are right; see docs/documents.md.
"""

from ml_collections import ConfigDict

from configs import mnist_progressions


def get_config() -> ConfigDict:
    """Documents of 6 images in colour."""
    config = mnist_progressions.get_config()

    config.data.name = "transforms"
    config.data.channels = 3

    config.text.tokens_per_row = 12
    config.text.images_per_row = 6

    config.train.global_batch_size = 12

    config.sampling.guidance_scale = 1.0  # more would overshoot the one right answer

    return config
