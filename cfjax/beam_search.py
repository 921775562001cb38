"""Beam search for texts: the best of a few continuations that are kept side by side."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfjax.document_sampling import NO_TOKEN, DocumentState, push_text
from cfjax.documents import Vocabulary
from cfjax.guided_network import Caches
from cfjax.models.multimodal import MultimodalCausalFusion
from cfjax.text_sampling import TextSampling, next_token_logits

_NEVER = -1e30  # a log-probability


class Beams(NamedTuple):
    """Texts that are kept of each document.

    Attributes:
      tokens: int32 `[batch, beams, max_length]`, NO_TOKEN after the end.
      log_probability: float32 `[batch, beams]`, of the text with its end.
      length: int32 `[batch, beams]`, tokens with the end.
      is_done: bool `[batch, beams]`.
    """

    tokens: jax.Array
    log_probability: jax.Array
    length: jax.Array
    is_done: jax.Array

    def score(self, length_penalty: float) -> jax.Array:
        """By what texts are compared, `[batch, beams]`."""
        return self.log_probability / jnp.maximum(self.length, 1) ** length_penalty


@functools.partial(jax.jit, static_argnames=("model", "settings", "vocabulary"))
def search_text(
    model: MultimodalCausalFusion,
    params: Any,
    state: DocumentState,
    settings: TextSampling,
    vocabulary: Vocabulary,
) -> Beams:
    """The best texts that follow documents, best first.

    Args:
      model, params: the transformer.
      state: of documents; it stays as it is, and of rows that guide images nothing is read.
      settings: number of beams, longest text, length penalty.
      vocabulary: our own tokens.
    """
    batch, width = len(state.logits), settings.num_beams
    copies = 2 if settings.is_guided else 1
    state = _rows(state, jnp.repeat(jnp.arange(batch), width), copies)
    beams = Beams(
        tokens=jnp.full((batch, width, settings.max_length), NO_TOKEN, jnp.int32),
        # All are the same at first: one of them goes on.
        log_probability=jnp.where(jnp.arange(width) == 0, 0.0, _NEVER)[None].repeat(batch, 0),
        length=jnp.zeros((batch, width), jnp.int32),
        is_done=jnp.zeros((batch, width), bool),
    )

    def extend(carry, place):
        state, beams = carry
        beams, rows, tokens = _best(beams, state.logits, settings, vocabulary, place)
        state = _rows(state, rows.reshape(-1), copies)
        is_real = jnp.repeat(~beams.is_done.reshape(-1, 1), copies, axis=0)
        state = push_text(
            *(model, params, None, None, state),
            *(jnp.repeat(tokens.reshape(-1, 1), copies, axis=0), is_real),
            jnp.zeros(len(is_real), bool),
        )
        return (state, beams), None

    places = jnp.arange(settings.max_length)
    (state, beams), _ = jax.lax.scan(extend, (state, beams), places)
    order = jnp.argsort(-beams.score(settings.length_penalty), axis=1)
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1),
        beams,
    )


def _best(beams, logits, settings, vocabulary, place):
    """The best continuations by one token, the rows of the batch that they continue, the tokens."""
    batch, width = beams.is_done.shape
    log_probabilities = jax.nn.log_softmax(next_token_logits(settings, vocabulary, logits))
    log_probabilities = log_probabilities.reshape(batch, width, -1)
    size = log_probabilities.shape[2]
    stays = jnp.where(jnp.arange(size) == 0, 0.0, _NEVER)[None, None]
    added = jnp.where(beams.is_done[..., None], stays, log_probabilities)
    total = beams.log_probability[..., None] + added
    length = beams.length + ~beams.is_done
    score = total / jnp.maximum(length, 1)[..., None] ** settings.length_penalty
    chosen = jax.lax.top_k(score.reshape(batch, -1), width)[1]
    parent, token = chosen // size, chosen % size

    def of_parent(x):
        return jnp.take_along_axis(x, parent.reshape(parent.shape + (1,) * (x.ndim - 2)), axis=1)

    was_done = of_parent(beams.is_done)
    is_end = (token == vocabulary.end_of_text) | (token == vocabulary.begin_of_image)
    is_done = was_done | is_end
    written = jnp.where(is_done, NO_TOKEN, token)
    beams = Beams(
        tokens=of_parent(beams.tokens).at[:, :, place].set(written),
        log_probability=jnp.take_along_axis(total.reshape(batch, -1), chosen, axis=1),
        length=of_parent(length),
        is_done=is_done,
    )
    return beams, jnp.arange(batch)[:, None] * width + parent, token


def _rows(state: DocumentState, documents: jax.Array, copies: int) -> DocumentState:
    """The state of other documents, in their order: of each the first `copies` rows."""
    cache, had = state.caches.main, state.logits.shape[1]
    layers = cache.kv_cache
    rows = (had * documents[:, None] + jnp.arange(copies)[None]).reshape(-1)
    main = cache._replace(
        kv_cache=layers._replace(keys=layers.keys[:, rows], values=layers.values[:, rows]),
        is_filled=cache.is_filled[rows],
        position=cache.position[rows],
    )
    return DocumentState(Caches(main, None), state.logits[documents, :copies])
