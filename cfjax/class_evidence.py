"""How well images fit a class, by the model that makes them: it chooses among candidates of an edit.

A model of p(image | class) tells classes apart by how well it denoises an image with each of them (the
diffusion classifier, arXiv 2303.16203). Here the whole image is denoised as one AR step, with its
class and with the null class: whatever is hard to denoise in it, whichever the class, cancels.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.diffusion.process import add_noise, predicted_x_start
from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.errors import UserError
from cfjax.guided_network import Network, guided_prediction, prefill
from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.patches import patchify
from cfjax.rng import per_example_keys

# At which shares of the timesteps of training: there the class shapes the image. With less noise the
# image itself tells what it is, and both predictions are the same.
NOISE_LEVELS = (0.6, 0.7, 0.8, 0.9)


def evidence_timesteps(schedule: NoiseSchedule) -> tuple[int, ...]:
    """The timesteps of training at which images are denoised."""
    return tuple(int(level * schedule.num_timesteps) for level in NOISE_LEVELS)


@functools.partial(jax.jit, static_argnames=("model", "schedule", "prediction_type"))
def class_evidence(
    model: CausalFusion,
    params: Any,
    schedule: NoiseSchedule,
    prediction_type: str,
    tokens: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    """By how much the class helps to denoise whole images.

    Args:
      model: the transformer (static); it must know the null class.
      params: its parameters.
      schedule: of training (static).
      prediction_type: what the model predicts (static).
      tokens: clean `[batch, L, token_width]` in grid order.
      labels: int `[batch]`, the class of each image.
      keys: typed keys `[batch]` of the noise; candidates that are compared should share them.

    Returns:
      float32 `[batch]`: the squared error of the predicted x_start under the null class less that
      under the class, as a share of the first, averaged over `evidence_timesteps`. At most 1; above 0
      where the class helps.
    """
    network = Network(model, params)
    batch, num_tokens, _ = tokens.shape
    null = jnp.full_like(labels, model.null_class)
    both = jnp.stack([labels, null], axis=1).reshape(-1)  # of an image on the same device
    caches = prefill(network, None, both, 0, is_guided=False)
    grid_indices = jnp.broadcast_to(jnp.arange(num_tokens), (2 * batch, num_tokens))

    def at_timestep(_, address):
        index, t = address
        noise = jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, index), tokens.shape[1:])
        )(keys)
        x_t = jnp.repeat(add_noise(schedule, tokens, noise, t), 2, axis=0)
        prediction = guided_prediction(network, None, caches, x_t, t, grid_indices, None)
        x_start = predicted_x_start(schedule, prediction_type, x_t, prediction, t)
        error = jnp.square(x_start - jnp.repeat(tokens, 2, axis=0)).mean(axis=(1, 2))
        of_class, of_null = error.reshape(batch, 2).T
        return None, (of_null - of_class) / of_null

    timesteps = jnp.asarray(evidence_timesteps(schedule))
    _, evidence = jax.lax.scan(at_timestep, None, (jnp.arange(len(timesteps)), timesteps))
    return evidence.mean(axis=0)


def _evidence_of_images(
    model, schedule, prediction_type, patch_size, params, key, images, labels, indices
):
    """`class_evidence` of images `[batch, H, W, C]`, pixels or latents, with a key by sample index."""
    keys = per_example_keys(key, indices)
    tokens = patchify(images, patch_size)
    return class_evidence(model, params, schedule, prediction_type, tokens, labels, keys)


evidence_of_images = jax.jit(_evidence_of_images, static_argnums=(0, 1, 2, 3))


def best_of(
    candidates: Iterable[jax.Array],
    evidence_of: Callable[[jax.Array], jax.Array],
    num_candidates: int,
) -> jax.Array:
    """Of each image the candidate with the most evidence; the first of those with the same.

    Args:
      candidates: each `[batch, ...]`; made one after the other, so that two are held at a time.
      evidence_of: a candidate -> `[batch]`; not called for a single one.
      num_candidates: how many there are.
    """
    if num_candidates == 1:
        return next(iter(candidates))
    best = None
    for images in candidates:
        candidate = images, evidence_of(images)
        best = candidate if best is None else _better_of(best, candidate)
    return best[0]


@jax.jit
def _better_of(best, other):
    is_better = other[1] > best[1]
    shape = (-1,) + (1,) * (other[0].ndim - 1)
    images = jnp.where(is_better.reshape(shape), other[0], best[0])
    return images, jnp.where(is_better, other[1], best[1])


def check_num_candidates(
    num_candidates: int, labels: np.ndarray, null_class: int, class_dropout: float
) -> None:
    """Refuses candidates among which a model can't choose.

    Args:
      num_candidates: of each image.
      labels: int `[N]`.
      null_class: of the model.
      class_dropout: with which it was trained.

    Raises:
      UserError: there is no candidate, an image has no class, or the model does not know the null
        class.
    """
    if num_candidates < 1:
        raise UserError(f"num_candidates is {num_candidates}, but must be at least 1.")
    if num_candidates == 1:
        return
    if (labels == null_class).any():
        raise UserError(
            f"num_candidates is {num_candidates}, but there is nothing to choose by for an image without"
            " a class; pass a class for each, or num_candidates=1."
        )
    if not class_dropout:
        raise UserError(
            f"num_candidates is {num_candidates}, but the model is trained with loss.class_dropout=0 and"
            " does not know the null class, against which a class is weighed; set num_candidates to 1."
        )
