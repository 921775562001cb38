"""An autoencoder over a mesh: whole on every device, the batch split.

On a device the images of a batch are taken some at a time, so that their activations, a hundred
times larger than an image, fit beside a transformer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from cfjax.autoencoder_files import Autoencoder
from cfjax.models.autoencoder_kl import AutoencoderKL, split_moments
from cfjax.models.tiled_decoding import decode_tiled
from cfjax.sharding import BATCH_AXES, batch_sharding, replicated

IMAGES_AT_A_TIME = 8  # on a device
# Latents of one side that are decoded as a whole: 1,024 pixels of KL-16, 512 of KL-8.
TILE, TILE_OVERLAP = 64, 16


@dataclasses.dataclass(frozen=True)
class MeshAutoencoder:
    """Encodes and decodes global batches; from `put`.

    Attributes:
      module: the autoencoder.
      params: its parameters, on every device of the mesh.
      mesh: over whose axes of the batch images are split.
    """

    module: AutoencoderKL
    params: Any
    mesh: Mesh

    def encode(self, images: jax.Array) -> jax.Array:
        """Moments of images, float32, as `AutoencoderKL.encode_parameters`.

        Args:
          images: `[batch, H, W, C]` in [-1, 1], split over the mesh.

        Returns:
          `[batch, h, w, 2 c]`: mean and log-variance, split like `images`.
        """
        return _encode(self.module, self.mesh, self.params, images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images in [-1, 1], about, of scaled latents.

        Args:
          latents: `[batch, h, w, c]` as a diffusion model sees them, split over the mesh.

        Returns:
          float32 `[batch, H, W, C]`, split like `latents`.
        """
        return _decode(self.module, self.mesh, self.params, latents)

    def decode_all(self, latents: np.ndarray) -> np.ndarray:
        """`decode` of any number of latents, which all processes have, to all processes."""
        return self._of_all(self.decode, latents)

    def encode_all(self, images: np.ndarray) -> np.ndarray:
        """Latents as a diffusion model sees them: the posterior's mode times the scale.

        Args:
          images: any number `[n, H, W, C]` in [-1, 1], which all processes have.

        Returns:
          float32 `[n, h, w, c]`, to all processes.
        """
        moments = self._of_all(self.encode, images)
        return self.module.scale * np.asarray(split_moments(moments).mode())

    def _of_all(self, apply: Callable[[jax.Array], jax.Array], batch: np.ndarray) -> np.ndarray:
        # Always the same number at a time on a device, as sums of another are rounded otherwise.
        at_once = self.mesh.size * IMAGES_AT_A_TIME
        num_rows = -(-len(batch) // at_once) * at_once
        rows = batch[np.minimum(np.arange(num_rows), len(batch) - 1)]
        sharding = batch_sharding(self.mesh)
        on_mesh = jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
        results = multihost_utils.process_allgather(apply(on_mesh), tiled=True)
        return np.asarray(results)[: len(batch)]


def put(autoencoder: Autoencoder, mesh: Mesh) -> MeshAutoencoder:
    """An autoencoder onto all devices of a mesh."""
    sharding = replicated(mesh)
    params = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
        autoencoder.params,
    )
    return MeshAutoencoder(autoencoder.module, params, mesh)


def _by_device(apply, mesh, params, batch):
    """`apply(params, images)` on every device, some images at a time."""

    def on_one(params, batch):
        return jax.lax.map(lambda x: apply(params, x[None])[0], batch, batch_size=IMAGES_AT_A_TIME)

    rows = PartitionSpec(BATCH_AXES)
    mapped = jax.shard_map(
        on_one, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
    )
    return mapped(params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(module, mesh, params, images):
    def apply(params, images):
        return module.apply({"params": params}, images, method="encode_parameters")

    return _by_device(apply, mesh, params, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(module, mesh, params, latents):
    def apply(params, latents):
        def decode(part):
            return module.apply({"params": params}, part, method="decode")

        return decode_tiled(decode, latents / module.scale, module.downsampling, TILE, TILE_OVERLAP)

    return _by_device(apply, mesh, params, latents)
