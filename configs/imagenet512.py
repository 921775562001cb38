"""ImageNet at 512x512: XL/2 on KL-16 latents of 32x32x16 (paper table 10).

    python -m cfjax.train --config configs/imagenet512.py --workdir gs://bucket/runs/xl512 \
        --config.data.path=gs://bucket/imagenet512-kl16 --config.autoencoder.path=kl16

The paper reports FID-50k 1.98 with guidance. Hardware: TPU pod. Not run.
"""

from ml_collections import ConfigDict

from configs import imagenet256


def get_config() -> ConfigDict:
    """XL/2."""
    config = imagenet256.get_config("xl")
    config.data.size = 32
    config.model.patch_size = 2
    return config
