"""A small convolutional classifier, whose features score images that have no Inception weights.

Small enough to be on every device whole, so that its parameters carry no logical axes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

NUM_FEATURES = 64
CHANNELS = (32, 64)
# Scores must not depend on the accelerator's default.
_PRECISION = jax.lax.Precision.HIGHEST


class Classifier(nn.Module):
    """Images float32 `[batch, H, W, C]` in [-1, 1] to `(features [batch, 64], logits [batch, K])`.

    Attributes:
      num_classes: K.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images
        for i, channels in enumerate(CHANNELS):
            x = nn.relu(_conv(channels, f"conv{i}")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(_conv(CHANNELS[-1], f"conv{len(CHANNELS)}")(x))
        # At most 7x7 places, whatever the size of the images.
        stride = max(1, -(-x.shape[1] // 7))
        x = nn.avg_pool(x, (stride, stride), strides=(stride, stride))
        x = x.reshape(x.shape[0], -1)
        features = nn.relu(nn.Dense(NUM_FEATURES, precision=_PRECISION, name="features")(x))
        logits = nn.Dense(self.num_classes, precision=_PRECISION, name="logits")(features)
        return features.astype(jnp.float32), logits.astype(jnp.float32)


def _conv(channels: int, name: str) -> nn.Conv:
    return nn.Conv(channels, (3, 3), precision=_PRECISION, name=name)
