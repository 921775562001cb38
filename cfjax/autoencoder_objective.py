"""The training objective of a KL autoencoder (arXiv 2112.10752), without its discriminator.

For an image of N pixel values x, its posterior q over latents and one z drawn from q,

    loss = mean over x of |decode(z) - x|, or its square, + kl_weight * KL(q || N(0, 1)) / N
           + perceptual_weight * LPIPS(decode(z), x)

KL is the sum over all latents of the image, in nats, so that `kl_weight` has the proportion to the
reconstruction that it has in the published code, where both are sums. Averaged over the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cfjax.errors import UserError, check_choice
from cfjax.models.autoencoder_kl import AutoencoderKL, Moments
from cfjax.models.lpips import Lpips

RECONSTRUCTION_LOSSES = ("l1", "l2")
_LOWEST_SQUARED_ERROR = 1e-10


@dataclasses.dataclass(frozen=True)
class AutoencoderObjective:
    """What is trained; `loss` reads every field.

    Attributes:
      reconstruction: the distance of pixel values, "l1" (absolute) or "l2" (squared).
      kl_weight: of the KL divergence.
      perceptual_weight: of LPIPS; without one it is not computed.
    """

    reconstruction: str = "l1"
    kl_weight: float = 1e-6
    perceptual_weight: float = 0.0

    def __post_init__(self):
        check_choice("loss.reconstruction", self.reconstruction, RECONSTRUCTION_LOSSES)
        for name in ("kl_weight", "perceptual_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name} is {getattr(self, name)}, but must be at least 0.")


def loss(
    objective: AutoencoderObjective,
    module: AutoencoderKL,
    params: Any,
    images: jax.Array,
    keys: jax.Array,
    lpips_params: Any = None,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, float]]]:
    """The loss of a batch, a scalar, and metrics as `(sum, count)` over its images.

    "reconstruction", "kl" and, with a weight, "perceptual" are the terms above before their weights,
    "psnr" is that of the reconstructions from drawn latents, in dB.

    Args:
      objective: what is trained.
      module: the autoencoder.
      params: of it.
      images: `[batch, H, W, C]` in [-1, 1].
      keys: one an image, for its latents.
      lpips_params: of `Lpips`, for a perceptual weight.
    """
    variables = {"params": params}
    moments = module.apply(variables, images, method="encode")
    decoded = module.apply(variables, sample_each(moments, keys), method="decode")
    error = decoded - images
    distance = jnp.abs(error) if objective.reconstruction == "l1" else jnp.square(error)
    reconstruction = jnp.mean(distance, axis=(1, 2, 3))
    kl = kl_divergence(moments) / images[0].size
    terms = {"reconstruction": reconstruction, "kl": kl}
    of_image = reconstruction + objective.kl_weight * kl
    if objective.perceptual_weight:
        terms["perceptual"] = Lpips().apply({"params": lpips_params}, decoded, images)
        of_image += objective.perceptual_weight * terms["perceptual"]
    terms["psnr"] = psnr(decoded, images)
    totals = {name: (jnp.sum(values), float(len(images))) for name, values in terms.items()}
    return jnp.mean(of_image), totals


def sample_each(moments: Moments, keys: jax.Array) -> jax.Array:
    """Latents drawn from the posterior, each image's by its own key."""
    return jax.vmap(lambda of_image, key: of_image.sample(key))(moments, keys)


def kl_divergence(moments: Moments) -> jax.Array:
    """KL(posterior || N(0, 1)) in nats, summed over the latents of each image, `[batch]`."""
    variance = jnp.exp(moments.logvar)
    terms = jnp.square(moments.mean) + variance - 1.0 - moments.logvar
    return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


def psnr(decoded: jax.Array, images: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each image in dB, `[batch]`: 10 log10(2² / mean squared error).

    Of floats in [-1, 1], to which `decoded` is clipped; they are not rounded to grey levels. At
    most 106 dB, which an image equal to its original has.
    """
    squared_error = jnp.mean(jnp.square(jnp.clip(decoded, -1, 1) - images), axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(squared_error, _LOWEST_SQUARED_ERROR))
