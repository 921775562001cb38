"""LPIPS, how different two pictures look (arXiv 1801.03924, version 0.1 with VGG-16)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Channels of the convolutions of each stage; half the resolution of the stage before.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# The network's normalization of the ImageNet, for pixels in [-1, 1] instead of [0, 1].
_MEAN = (-0.030, -0.088, -0.188)
_STD = (0.458, 0.448, 0.450)
_LEAST_NORM = 1e-10


class Lpips(nn.Module):
    """Weighted squared differences of unit feature vectors, over the stages of VGG-16.

    Attributes:
      stages: channels of the convolutions of each stage.

    The parameters are named as published: `features_N` for convolution N of torchvision's list, in
    which activations and pooling count too, `lin_N` for the weights of the channels of stage N.
    """

    stages: tuple[tuple[int, ...], ...] = VGG16

    @property
    def least_size(self) -> int:
        """Pixels that a side must have."""
        return 2 ** (len(self.stages) - 1)

    @nn.compact
    def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
        """The distances `[batch]` of images `[batch, H, W, 1 or 3]` in [-1, 1]."""
        x = jnp.concatenate([images, others])
        x = jnp.broadcast_to(x, (*x.shape[:3], 3))
        mean, std = (jnp.array(values).reshape(1, 1, 1, 3) for values in (_MEAN, _STD))
        x = (x - mean) / std
        distance, layer = jnp.zeros(len(images)), 0
        for number, stage in enumerate(self.stages):
            if number:
                x, layer = nn.max_pool(x, (2, 2), strides=(2, 2)), layer + 1
            for channels in stage:
                x = nn.relu(nn.Conv(channels, (3, 3), padding=1, name=f"features_{layer}")(x))
                layer += 2
            features, of_others = jnp.split(_unit(x), 2)
            weigh = nn.Dense(1, use_bias=False, name=f"lin_{number}")
            distance += weigh(jnp.square(features - of_others)).mean((1, 2, 3))
        return distance


def _unit(features: jax.Array) -> jax.Array:
    """Vectors of length one; those of length zero stay, and have a finite gradient."""
    squared = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(squared, _LEAST_NORM**2))
    return features / (norm + _LEAST_NORM)
