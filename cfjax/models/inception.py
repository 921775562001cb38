"""The 2015 Inception network by whose features FID, sFID, IS, precision and recall are computed.

It is the graph `classify_image_graph_def.pb` of the ADM evaluation suite (arXiv 2105.05233), which is
Inception-v3 (arXiv 1512.00567) but for its quirks, all of which scores depend on: the bilinear resize
of TensorFlow 1, average pools that leave padding out, a max pool in the last block, 1008 logits.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfjax.errors import UserError
from cfjax.models.inception_blocks import (
    BlockA,
    BlockB,
    BlockC,
    BlockD,
    BlockE,
    convolve,
    max_pool,
    resize,
)

NUM_POOL = 2048
NUM_SPATIAL = 2023
NUM_LOGITS = 1008
_SPATIAL_CHANNELS = 7  # of 17x17 pixels


class InceptionOutputs(NamedTuple):
    """What scores are computed from, float32.

    Attributes:
      pool: `[batch, 2048]`, `pool_3:0` of the graph: FID, precision and recall.
      spatial: `[batch, 2023]`, the first 7 channels of `mixed_6/conv:0` in the order height, width,
        channel: sFID.
      logits: `[batch, 1008]`, `softmax/logits/MatMul` of the graph, to which no bias was added: IS.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


class InceptionV3(nn.Module):
    """The network in float32 at the highest precision; its parameters are named as torch-fidelity's.

    Every convolution has `kernel`, and of its batch normalization `gamma`, `beta`, `mean`, `variance`.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> InceptionOutputs:
        """The features of images, which are resized to 299x299.

        Args:
          images: `[batch, H, W, 3]`, uint8 or float32, in 0..255.

        Raises:
          UserError: they don't have three channels, or are neither uint8 nor float32.
        """
        _check(images)
        x = (resize(images) - 128) / 128
        x = convolve(x, "Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")
        x = convolve(x, "Conv2d_2a_3x3", 32, (3, 3), 1, "VALID")
        x = convolve(x, "Conv2d_2b_3x3", 64)
        x = max_pool(x, 2, "VALID")
        x = convolve(x, "Conv2d_3b_1x1", 80, (1, 1))
        x = convolve(x, "Conv2d_4a_3x3", 192, (3, 3), 1, "VALID")
        x = max_pool(x, 2, "VALID")
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = BlockB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        spatial = x[..., :_SPATIAL_CHANNELS].reshape(len(x), NUM_SPATIAL)
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(is_last=False, name="Mixed_7b")(x)
        x = BlockE(is_last=True, name="Mixed_7c")(x)
        pool = jnp.mean(x, axis=(1, 2))
        classify = nn.Dense(
            NUM_LOGITS, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="logits"
        )
        return InceptionOutputs(pool, spatial, classify(pool))


def _check(images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"Inception takes images [batch, height, width, 3], not {images.shape}; repeat grey"
            " images to 3 channels."
        )
    if images.dtype not in (jnp.uint8, jnp.float32):
        raise UserError(
            f"Inception takes images of uint8 or float32 in 0..255, not {images.dtype}; cast them."
        )
