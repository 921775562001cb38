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


class NoisedContext(NamedTuple):
    """Known tokens that are noised to the timestep of the tokens beside which they are seen.

    So the denoising of an inpainted image goes (arXiv 2011.13456, appendix I.2; arXiv 2201.09865).

    Attributes:
      tokens: clean, `[batch, M, token_width]`.
      noise: like `tokens`.
      grid_indices: `[batch, M]`.
      rates: float32 `[T, 2]`, of clean tokens and of noise at each timestep of training.
    """

    tokens: jax.Array
    noise: jax.Array
    grid_indices: jax.Array
    rates: jax.Array

    def at(self, t: jax.Array) -> jax.Array:
        """x_t of the tokens, `[batch, M, token_width]`."""
        signal_rate, noise_rate = self.rates[t]
        return signal_rate * self.tokens + noise_rate * self.noise


class Caches(NamedTuple):
    """KV caches while an image is generated.

    Attributes:
      main: of the model; with classifier-free guidance two rows an example, with its class and with
        the null class. So both are on the same device.
      guide: of the weaker model of autoguidance, or None.
      noised: known tokens that are not in the caches, but noised beside those that are denoised.
    """

    main: KVCache
    guide: KVCache | None
    noised: NoisedContext | None = None


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
    return caches._replace(main=push(network, caches.main), guide=guide_cache)


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
    batch, num_tokens = x_t.shape[:2]
    if caches.noised is not None:
        x_t = jnp.concatenate([x_t, caches.noised.at(t)], axis=1)
        grid_indices = jnp.concatenate([grid_indices, caches.noised.grid_indices], axis=1)

    def predict(network, kv_cache, copies):
        predicted = network.model.apply(
            {"params": network.params},
            kv_cache,
            _repeat(x_t, copies),
            jnp.broadcast_to(t, copies * batch),
            _repeat(grid_indices, copies),
            method=network.model.denoise,
        )
        return predicted if caches.noised is None else predicted[:, :num_tokens]

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
