"""Moments of images and of their mirror images, on the devices of this process."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cfjax import sharding
from cfjax.autoencoder_files import Autoencoder


class LatentEncoder:
    """An autoencoder on every device of this process, each with as many images.

    Each device runs the same program on its own rows, so that what an image gives doesn't depend on
    their number.

    Attributes:
      rows: images that `encode` takes.
    """

    def __init__(self, autoencoder: Autoencoder, images_per_device: int, dtype: Any):
        """Puts the parameters onto the devices.

        Args:
          autoencoder: encodes and decodes.
          images_per_device: that a device takes at a time.
          dtype: of the moments.
        """
        self._module, self._dtype = autoencoder.module, jnp.dtype(dtype)
        self._mesh = sharding.make_mesh(devices=jax.local_devices())
        self._params = jax.device_put(autoencoder.params, sharding.replicated(self._mesh))
        self.rows = images_per_device * self._mesh.size

    def encode(self, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Starts to encode.

        Args:
          images: float32 `[rows, H, W, C]` in [-1, 1].

        Returns:
          The moments of each image and of its mirror image `[rows, 2, h, w, 2 c]`, as
          `AutoencoderKL.encode_parameters` gives them; and whether all of its are finite `[rows]`.
        """
        rows = jax.device_put(images, sharding.batch_sharding(self._mesh))
        return _encode(self._module, self._dtype, self._mesh, self._params, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(module, dtype, mesh, params, images):
    def on_one(params, images):
        both = jnp.concatenate([images, images[:, :, ::-1]])
        parameters = module.apply({"params": params}, both, method="encode_parameters")
        moments = jnp.stack(jnp.split(parameters, 2), axis=1)
        return moments.astype(dtype), jnp.isfinite(moments).all(axis=(1, 2, 3, 4))

    rows = PartitionSpec(sharding.BATCH_AXES)
    mapped = jax.shard_map(
        on_one, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=(rows, rows), check_vma=False
    )
    return mapped(params, images)
