"""A batch of documents as they grow: prompts are pushed, texts and images are generated."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cfjax import beam_search, build_documents, document_sampling, sampling
from cfjax.data.images import to_uint8
from cfjax.document_sampling import NO_TOKEN, Writing
from cfjax.documents import ClassSegment, Document, Segment, TextSegment, encode_text
from cfjax.models.patches import unpatchify
from cfjax.rng import per_example_keys, stream_key
from cfjax.text_sampling import TextSampling

_TOKENS_AT_ONCE = 16  # of text, between looks at whether all have ended


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How documents go on; see `DocumentSampler.continue_documents`."""

    settings: sampling.SamplingSettings | None
    text: TextSampling | None
    seed: int
    context_tokens: int


class DocumentStream:
    """A batch of documents of one structure as they grow; all arrays have a row a document."""

    def __init__(self, sampler, prompts, kinds, indices, options):
        self._sampler, self._options = sampler, options
        self._batch = len(prompts)
        self._vocabulary = sampler.vocabulary
        self._max_text_length = sampler.config.text.max_length
        is_guided = options.settings is not None and options.settings.is_guided
        guide = sampler.guide if is_guided else None
        # A text is guided by itself alone, whatever guides images.
        self._text_is_guided = options.text is not None and options.text.is_guided
        self._copies = 2 if (is_guided and guide is None) or self._text_is_guided else 1
        self._networks = (
            *(sampler.model, sampler.params),
            *((None, None) if guide is None else (guide.model, guide.params)),
        )
        key = stream_key(options.seed, "sample")
        self._keys = per_example_keys(key, self._put(indices.astype(np.uint32)))
        self._num_generated = 0
        self._before: type | str | None = None  # kind of the last segment
        self._state = document_sampling.begin(
            *self._networks, self._batch, self._copies, self._capacity(prompts[0], kinds)
        )

    def _capacity(self, prompt: Document, kinds: Sequence[str]) -> int:
        """Slots of the cache: what the prompt takes, and besides as many as the user wants."""
        config, num_tokens = self._sampler.config.text, self._sampler.model.num_tokens
        wanted = self._options.context_tokens or (
            config.tokens_per_row + config.images_per_row * num_tokens
        )
        # An image must overwrite neither its own tokens nor the class that announces it, also where an
        # AR step that no longer fits before the end of the ring begins it anew.
        least = 2 * num_tokens + self._sampler.model.condition_length + 4
        # Texts are padded where something may follow; the pads are no context.
        num_texts = sum(isinstance(part, TextSegment) for part in prompt)
        num_texts += kinds[:-1].count("text")
        return max(wanted, least) + num_texts * (self._max_text_length + _TOKENS_AT_ONCE)

    def _put(self, rows: np.ndarray) -> jax.Array:
        return self._sampler._on_mesh(np.ascontiguousarray(rows))

    def push(self, parts: Sequence[Segment]) -> None:
        """Segments of prompts, of one kind."""
        if isinstance(parts[0], TextSegment):
            self._push_text(parts)
        elif isinstance(parts[0], ClassSegment):
            self._push_classes(parts)
        else:
            self._announce_image()
            pixels = np.stack([part.pixels for part in parts])
            tokens = self._put(self._sampler.to_tokens(pixels))
            self._state = document_sampling.push_image(*self._networks, self._state, tokens)
            self._before = "image"

    def _push_text(self, parts):
        own = {None: [self._vocabulary.end_of_text], "image": [self._vocabulary.end_of_image]}
        first = own.get(self._before, [])
        encode = build_documents.tokenizer(self._sampler.config).encode
        ids = [first + encode_text(part.text, encode, self._max_text_length) for part in parts]
        padded = np.zeros((self._batch, len(first) + self._max_text_length), np.int32)
        for row, tokens in zip(padded, ids, strict=True):
            row[: len(tokens)] = tokens
        lengths = np.array([len(tokens) for tokens in ids])
        self._push_ids(padded, np.arange(padded.shape[1]) < lengths[:, None])
        self._before = "text"

    def _push_ids(self, ids, is_real, of_guiding=None):
        """Ids `[batch, M]`; in rows that guide others, after all has been forgotten, or none."""
        guiding_ids = ids if of_guiding is None else np.broadcast_to(of_guiding, ids.shape)
        guiding_is_real = np.full(ids.shape, of_guiding is not None)
        if self._copies == 2:
            ids = np.stack([ids, guiding_ids], axis=1).reshape(-1, ids.shape[1])
            is_real = np.stack([is_real, guiding_is_real], axis=1).reshape(-1, ids.shape[1])
        begins_anew = np.arange(len(ids)) % self._copies == 1
        if of_guiding is None:
            begins_anew = np.zeros(len(ids), bool)
        self._state = document_sampling.push_text(
            *self._networks,
            self._state,
            *map(self._put, (ids.astype(np.int32), is_real, begins_anew)),
        )

    def _announce_image(self):
        vocabulary = self._vocabulary
        if self._before == "class":
            return
        first = {None: vocabulary.end_of_text, "image": vocabulary.end_of_image}.get(self._before)
        ids = np.array([[first or 0, vocabulary.begin_of_image]] * self._batch, np.int32)
        is_real = np.array([[first is not None, True]] * self._batch)
        self._push_ids(ids, is_real, [vocabulary.end_of_text, vocabulary.begin_of_image])

    def _push_classes(self, parts):
        if self._before == "image":
            ids = np.full((self._batch, 1), self._vocabulary.end_of_image, np.int32)
            self._push_ids(ids, np.ones(ids.shape, bool))
        labels = np.repeat(np.array([part.label for part in parts], np.int32), self._copies)
        guides = np.arange(len(labels)) % self._copies == 1
        labels[guides] = self._sampler.model.null_class
        self._state = document_sampling.push_class(
            *self._networks, self._state, self._put(labels), self._put(guides)
        )
        self._before = "class"

    def generate(
        self, kind: str, known: sampling.Known | None, is_last: bool
    ) -> Sequence[np.ndarray | str]:
        """The next segment of each document; after the last one no state is kept."""
        fold = jax.vmap(lambda key: jax.random.fold_in(key, self._num_generated))
        keys = fold(self._keys) if self._num_generated else self._keys
        self._num_generated += 1
        return self._generate_image(keys, known) if kind == "image" else self._write(keys, is_last)

    def _generate_image(self, keys, known):
        sampler = self._sampler
        self._announce_image()
        if known is not None:
            known = sampling.Known(*map(self._put, known))
        self._state, tokens = document_sampling.generate_image(
            *self._networks, self._state, self._options.settings, keys, known
        )
        self._before = "image"
        images = unpatchify(tokens, sampler.config.model.patch_size, sampler.model.grid)
        if sampler.autoencoder is not None:
            images = sampler.autoencoder.decode(images)
        return to_uint8(multihost_utils.process_allgather(images, tiled=True))

    def _write(self, keys, is_last):
        own = self._vocabulary
        first = {None: own.end_of_text, "image": own.end_of_image}.get(self._before)
        if first is not None or self._text_is_guided:
            ids = np.full((self._batch, 1), first or 0, np.int32)
            is_real = np.full(ids.shape, first is not None)
            self._push_ids(ids, is_real, [own.end_of_text] if self._text_is_guided else None)
        self._before = "text"
        text = self._options.text
        if text.num_beams > 1:
            beams = beam_search.search_text(
                *self._networks[:2], self._state, text, self._vocabulary
            )
            tokens = multihost_utils.process_allgather(beams.tokens[:, 0], tiled=True)
            if not is_last:
                self._push_ids(np.maximum(tokens, 0), tokens != NO_TOKEN)
            return self._decoded(tokens)
        writing = Writing(self._put(np.zeros(self._batch, bool)), jnp.int32(0))
        written = []
        for _ in range(-(-text.max_length // _TOKENS_AT_ONCE)):
            self._state, writing, tokens = document_sampling.generate_text(
                *(*self._networks, self._state, text, self._vocabulary, _TOKENS_AT_ONCE),
                *(writing, keys),
            )
            written.append(multihost_utils.process_allgather(tokens, tiled=True))
            # Where something follows, it must not depend on how long the other texts are.
            if is_last and (written[-1][:, -1] == NO_TOKEN).all():
                break
        return self._decoded(np.concatenate(written, axis=1))

    def _decoded(self, tokens: np.ndarray) -> list[str]:
        decode: Callable = build_documents.tokenizer(self._sampler.config).decode
        return [decode([token for token in row.tolist() if token != NO_TOKEN]) for row in tokens]
