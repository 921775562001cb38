"""The transformer as generation runs it: with a KV cache, and with guidance by a weaker prediction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.kv_cache import KVCache


class Network(NamedTuple):
    """A transformer and its parameters."""

    model: CausalFusion
    params: Any


class Caches(NamedTuple):
    """KV caches while an image is generated.

    Attributes:
      main: of the model; with classifier-free guidance two rows an example, with its class and with
        the null class. So both are on the same device.
      guide: of the weaker model of autoguidance, or None.
    """

    main: KVCache
    guide: KVCache | None


def prefill(
    network: Network,
    guide: Network | None,
    labels: jax.Array,
    num_image_tokens: int,
    is_guided: bool,
) -> Caches:
    """The KV caches of the condition tokens alone.

    Args:
      network, guide: the transformers.
      labels: int `[batch]`.
      num_image_tokens: for which there is to be room besides.
      is_guided: whether a weaker prediction is needed anywhere.
    """

    def fill(network, labels):
        def filled(model, labels):
            capacity = model.condition_length + num_image_tokens
            kv_cache = model.empty_cache(labels.shape[0], capacity)
            return model.extend(kv_cache, model.condition_tokens(labels))

        return network.model.apply({"params": network.params}, labels, method=filled)

    if not is_guided:
        return Caches(fill(network, labels), None)
    if guide is not None:
        return Caches(fill(network, labels), fill(guide, labels))
    null = jnp.full_like(labels, network.model.null_class)
    return Caches(fill(network, jnp.stack([labels, null], axis=1).reshape(-1)), None)


def push_clean_tokens(
    network: Network,
    guide: Network | None,
    caches: Caches,
    tokens: jax.Array,
    grid_indices: jax.Array,
) -> Caches:
    """The caches after the clean tokens of an AR step.

    Args:
      network, guide: the transformers.
      caches: from `prefill`.
      tokens: `[batch, M, token_width]`.
      grid_indices: `[batch, M]`.
    """

    def push(network, kv_cache):
        copies = kv_cache.num_rows // tokens.shape[0]

        def pushed(model, kv_cache, tokens, grid_indices):
            return model.extend(kv_cache, model.clean_image_tokens(tokens, grid_indices))

        return network.model.apply(
            {"params": network.params},
            kv_cache,
            _repeat(tokens, copies),
            _repeat(grid_indices, copies),
            method=pushed,
        )

    guide_cache = None if caches.guide is None else push(guide, caches.guide)
    return Caches(push(network, caches.main), guide_cache)


def guided_prediction(
    network: Network,
    guide: Network | None,
    caches: Caches,
    x_t: jax.Array,
    t: jax.Array,
    grid_indices: jax.Array,
    scale: jax.Array | float | None,
) -> jax.Array:
    """The network's prediction for the noised tokens of one AR step, with guidance.

    Args:
      network, guide: the transformers.
      caches: from `prefill`.
      x_t: `[batch, M, token_width]`.
      t: int scalar, the timestep of training.
      grid_indices: `[batch, M]`.
      scale: of the guidance; None for none, then the weaker prediction is not computed.

    Returns:
      float32 `[batch, M, token_width]`.
    """
    batch = x_t.shape[0]

    def predict(network, kv_cache, copies):
        return network.model.apply(
            {"params": network.params},
            kv_cache,
            _repeat(x_t, copies),
            jnp.broadcast_to(t, copies * batch),
            _repeat(grid_indices, copies),
            method=network.model.denoise,
        )

    if scale is None:
        return predict(network, caches.main, 1)
    if caches.guide is not None:
        stronger = predict(network, caches.main, 1)
        weaker = predict(guide, caches.guide, 1)
    else:
        both = predict(network, caches.main, 2)
        both = both.reshape(batch, 2, *both.shape[1:])
        stronger, weaker = both[:, 0], both[:, 1]
    return weaker + scale * (stronger - weaker)


def _repeat(x: jax.Array, copies: int) -> jax.Array:
    return jnp.repeat(x, copies, axis=0) if copies > 1 else x
