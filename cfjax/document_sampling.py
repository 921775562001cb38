"""Generation in documents: text token by token, images by AR steps, over one KV cache that rolls.

Each function is a jitted program that takes the state of a batch of documents and gives the next one;
the state's buffers are donated. A document has one row in the cache, or with classifier-free guidance
two: the second has no prompt, and of a guided text the text alone.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfjax.documents import Vocabulary
from cfjax.guided_network import Caches, Network
from cfjax.models.multimodal import MultimodalCausalFusion
from cfjax.sampling import Known, SamplingSettings, draw_noise, generate_over_caches
from cfjax.text_sampling import TextSampling, choose_token, next_token_logits

NO_TOKEN = -1  # after the end of a text


class DocumentState(NamedTuple):
    """Documents so far.

    Attributes:
      caches: of `DocumentCache`.
      logits: float32 `[batch, copies, V]`, of the text token that follows the last one of each of a
        document's rows.
    """

    caches: Caches
    logits: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "guide_model", "batch", "rows", "capacity"))
def begin(
    model: MultimodalCausalFusion,
    params: Any,
    guide_model: MultimodalCausalFusion | None,
    guide_params: Any,
    batch: int,
    rows: int,
    capacity: int,
) -> DocumentState:
    """The state before the first token of documents.

    Args:
      model, params, guide_model, guide_params: the transformers.
      batch: how many documents.
      rows: in the cache of each.
      capacity: tokens that are remembered.
    """

    def empty(model, params, rows):
        cache = model.apply({"params": params}, rows, capacity, method=model.empty_document_cache)
        axes = (None, "batch", "activation_heads", None, None)
        layers = [nn.with_logical_constraint(it, axes) for it in cache.kv_cache[:2]]
        return cache._replace(kv_cache=cache.kv_cache._replace(keys=layers[0], values=layers[1]))

    guide = None if guide_model is None else empty(guide_model, guide_params, batch)
    caches = Caches(empty(model, params, rows * batch), guide)
    return DocumentState(caches, jnp.zeros((batch, rows, model.vocabulary_size)))


def _with_both(function, network, guide, caches, *arrays):
    """A model's method for both caches; `arrays` have the rows of the main one."""

    def apply(network, cache, *arrays):
        return function(network.model, network.params, cache, *arrays)

    main, output = apply(network, caches.main, *arrays)
    of_guide = None
    if caches.guide is not None:
        of_guide, _ = apply(guide, caches.guide, *arrays)
    return Caches(main, of_guide), output


@functools.partial(jax.jit, static_argnames=("model", "guide_model"), donate_argnames=("state",))
def push_text(
    model: MultimodalCausalFusion,
    params: Any,
    guide_model: MultimodalCausalFusion | None,
    guide_params: Any,
    state: DocumentState,
    ids: jax.Array,
    is_real: jax.Array,
    begins_anew: jax.Array,
) -> DocumentState:
    """The documents after text tokens.

    Args:
      model, params, guide_model, guide_params: the transformers.
      state: before.
      ids: int32 `[rows of the batch, M]`.
      is_real: bool, like `ids`: False where a row has no token.
      begins_anew: bool `[rows of the batch]`, which rows forget all before.
    """
    network, guide = _networks(model, params, guide_model, guide_params)

    def push(model, params, cache, ids, is_real, begins_anew):
        return model.apply(
            {"params": params}, cache.forgotten(begins_anew), ids, is_real, method=model.push_text
        )

    caches, logits = _with_both(push, network, guide, state.caches, ids, is_real, begins_anew)
    return DocumentState(caches, _last_logits(state.logits, logits, is_real))


def _networks(model, params, guide_model, guide_params):
    guide = None if guide_model is None else Network(guide_model, guide_params)
    return Network(model, params), guide


def _last_logits(before: jax.Array, logits: jax.Array, is_real: jax.Array) -> jax.Array:
    """After the last real token of each row, `[batch, copies, V]`."""
    last = is_real.shape[1] - 1 - jnp.argmax(is_real[:, ::-1], axis=1)
    after = jnp.take_along_axis(logits, last[:, None, None], axis=1)
    after = jnp.where(is_real.any(axis=1)[:, None, None], after, before.reshape(after.shape))
    return after.reshape(before.shape)


@functools.partial(jax.jit, static_argnames=("model", "guide_model"), donate_argnames=("state",))
def push_image(
    model: MultimodalCausalFusion,
    params: Any,
    guide_model: MultimodalCausalFusion | None,
    guide_params: Any,
    state: DocumentState,
    tokens: jax.Array,
) -> DocumentState:
    """The documents after an image of a prompt, as one AR step.

    Args:
      model, params, guide_model, guide_params, state: see `push_text`.
      tokens: `[batch, L, token_width]` in grid order.
    """
    network, guide = _networks(model, params, guide_model, guide_params)

    def push(model, params, cache):
        copies = cache.num_rows // len(tokens)
        rows = jnp.repeat(tokens, copies, axis=0)
        indices = jnp.broadcast_to(jnp.arange(model.num_tokens), rows.shape[:2])

        def pushed(model, cache):
            return model.extend(cache, model.clean_image_tokens(rows, indices)).after_segment(1)

        return model.apply({"params": params}, cache, method=pushed), None

    caches, _ = _with_both(push, network, guide, state.caches)
    return state._replace(caches=caches)


@functools.partial(jax.jit, static_argnames=("model", "guide_model"), donate_argnames=("state",))
def push_class(
    model: MultimodalCausalFusion,
    params: Any,
    guide_model: MultimodalCausalFusion | None,
    guide_params: Any,
    state: DocumentState,
    labels: jax.Array,
    begins_anew: jax.Array,
) -> DocumentState:
    """The documents after the condition tokens of a class.

    Args:
      model, params, guide_model, guide_params, state: see `push_text`.
      labels: int32 `[rows of the batch]`, the null class in rows that guide.
      begins_anew: see `push_text`.
    """
    network, guide = _networks(model, params, guide_model, guide_params)

    def push(model, params, cache, labels, begins_anew):
        cache = cache.forgotten(begins_anew)
        return model.apply({"params": params}, cache, labels, method=model.push_class), None

    caches, _ = _with_both(push, network, guide, state.caches, labels, begins_anew)
    return state._replace(caches=caches)


@functools.partial(
    jax.jit, static_argnames=("model", "guide_model", "settings"), donate_argnames=("state",)
)
def generate_image(
    model: MultimodalCausalFusion,
    params: Any,
    guide_model: MultimodalCausalFusion | None,
    guide_params: Any,
    state: DocumentState,
    settings: SamplingSettings,
    keys: jax.Array,
    known: Known | None,
) -> tuple[DocumentState, jax.Array]:
    """Generates the image that `begin_of_image` or a class has announced.

    Args:
      model, params, guide_model, guide_params, state: see `push_text`.
      settings: AR steps, denoising steps, order, solver, guidance.
      keys: typed keys `[batch]`.
      known: tokens that stay as they are; see `cfjax.sampling.generate`.

    Returns:
      The documents after it, and its tokens `[batch, L, token_width]` in grid order.
    """
    network, guide = _networks(model, params, guide_model, guide_params)
    order, start_noise, noise_at = draw_noise(model, settings, keys)
    tokens, _, caches = generate_over_caches(
        *(network, settings, state.caches, model.num_tokens, order, start_noise, noise_at),
        known=known,
        guide=guide,
    )
    caches = Caches(caches.main.after_segment(1), caches.guide and caches.guide.after_segment(1))
    return state._replace(caches=caches), tokens


class Writing(NamedTuple):
    """Texts that are being written.

    Attributes:
      is_done: bool `[batch]`, whose text has ended.
      length: int32 scalar, tokens of those that have not.
    """

    is_done: jax.Array
    length: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("model", "guide_model", "settings", "vocabulary", "num_tokens"),
    donate_argnames=("state",),
)
def generate_text(
    model: MultimodalCausalFusion,
    params: Any,
    guide_model: MultimodalCausalFusion | None,
    guide_params: Any,
    state: DocumentState,
    settings: TextSampling,
    vocabulary: Vocabulary,
    num_tokens: int,
    writing: Writing,
    keys: jax.Array,
) -> tuple[DocumentState, Writing, jax.Array]:
    """Writes the next tokens of texts.

    A text ends before `end_of_text` and `begin_of_image`, which are not pushed.

    Args:
      model, params, guide_model, guide_params, state: see `push_text`.
      settings: how tokens are chosen.
      vocabulary: our own tokens.
      num_tokens: how many are written at most.
      writing: of the texts so far.
      keys: typed keys `[batch]`.

    Returns:
      The documents, the texts, and the tokens int32 `[batch, num_tokens]`, NO_TOKEN after the end.
    """
    copies = state.caches.main.num_rows // len(keys)
    is_written = jnp.arange(state.caches.main.num_rows) % copies == 0
    if settings.is_guided:
        is_written = jnp.ones_like(is_written)

    def write(carry, _):
        state, (is_done, length) = carry
        of_token = jax.vmap(lambda key: jax.random.fold_in(key, length))(keys)
        logits = next_token_logits(settings, vocabulary, state.logits)
        token = choose_token(settings, logits, of_token)
        is_end = (token == vocabulary.end_of_text) | (token == vocabulary.begin_of_image)
        is_done = is_done | is_end | (length >= settings.max_length)
        rows = jnp.repeat(token, copies)[:, None]
        is_real = (jnp.repeat(~is_done, copies) & is_written)[:, None]
        never = jnp.zeros(len(rows), bool)
        state = push_text(model, params, guide_model, guide_params, state, rows, is_real, never)
        return (state, Writing(is_done, length + 1)), jnp.where(is_done, NO_TOKEN, token)

    (state, writing), tokens = jax.lax.scan(write, (state, writing), length=num_tokens)
    return state, writing, tokens.swapaxes(0, 1)
