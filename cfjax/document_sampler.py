"""A trained model of documents ready to draw, to describe and to continue: the Python API.

model = cfjax.load("runs/mnist_scenes")
images = model.generate(prompt="a red three left of a blue seven")
texts = model.generate(prompt=[[image] for image in images], what="text")
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cfjax import beam_search, build_documents, document_sampling, sampling, sharding
from cfjax.data.images import to_uint8
from cfjax.document_sampling import NO_TOKEN, Writing
from cfjax.documents import (
    ClassSegment,
    Document,
    ImageSegment,
    Segment,
    TextSegment,
    Vocabulary,
    encode_text,
)
from cfjax.errors import UserError, check_choice
from cfjax.models.patches import unpatchify
from cfjax.rng import per_example_keys, stream_key
from cfjax.sampler import Sampler
from cfjax.text_sampling import TextSampling

KINDS = ("image", "text")
TEXT_OPTIONS = tuple(field.name for field in dataclasses.fields(TextSampling))
_TOKENS_AT_ONCE = 16  # of text, between looks at whether all have ended

Part = str | np.ndarray | int | Segment
Prompt = Part | Sequence[Part]


@dataclasses.dataclass(frozen=True)
class DocumentSampler(Sampler):
    """A model of documents with its parameters; from `model_loading.load`."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids of the tokenizer and our own."""
        return build_documents.vocabulary(self.config)

    def generate(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompt: Prompt | Sequence[Prompt] | None = None,
        what: str = "image",
        n: int = 1,
        seed: int = 0,
        first_index: int = 0,
        context_tokens: int = 0,
        split_sizes: Sequence[int] = (),
        **overrides: Any,
    ) -> np.ndarray | list[str]:
        """Continues documents by images or by text.

        Args:
          labels: instead of a prompt, the class of each image; see `Sampler.generate`.
          prompt: a document, or a list of documents as lists: of texts, images (uint8 `[H, W, C]`)
            and classes (ints, each before an image that is to be generated). "" or [] for none.
          what: "image" or "text".
          n: how many images follow one another. Those that the cache has no room for are forgotten,
            so that any number takes the same memory.
          seed: of all that is drawn.
          first_index: index of the first document; document i depends on (seed, i) and its prompt.
          context_tokens: tokens that the cache has room for; 0 for as many as a row of training.
          split_sizes: tokens of each AR step of an image, instead of `num_ar_steps`.
          **overrides: fields of `config.sampling` for images, of `TextSampling` for text, such as
            `temperature=0.7, top_p=0.9` or `num_beams=4`.

        Returns:
          Images uint8 `[N, H, W, C]`, or `[N, n, H, W, C]` for n > 1; or N texts.

        Raises:
          UserError: a prompt that does not fit the model, an unknown field, or a value out of range.
        """
        if prompt is None:
            if labels is None:
                raise UserError("there is nothing to generate from; pass a prompt or labels.")
            return super().generate(
                labels, seed=seed, first_index=first_index, split_sizes=split_sizes, **overrides
            )
        if labels is not None:
            raise UserError("both labels and a prompt are given; put classes into the prompt.")
        check_choice("what", what, KINDS)
        prompts = as_documents(prompt)
        if n < 1 or (what == "text" and n > 1):
            raise UserError(f"n is {n}, but must be at least 1, and 1 for text.")
        if what == "text":
            text = self.text_sampling(overrides)
            follow = [("text",)] * len(prompts)
            generated = self.continue_documents(
                prompts, follow, None, text, seed, first_index, context_tokens
            )
            return [parts[0] for parts in generated]
        settings = self.settings(overrides, split_sizes)
        follow = [("image",) * n] * len(prompts)
        generated = self.continue_documents(
            prompts, follow, settings, None, seed, first_index, context_tokens
        )
        images = np.stack([np.stack(parts) for parts in generated])
        return images[:, 0] if n == 1 else images

    def caption(self, images: np.ndarray, **options: Any) -> list[str]:
        """A text for each image uint8 `[N, H, W, C]`; see `generate` for the options."""
        return self.generate(prompt=[[image] for image in images], what="text", **options)

    def edit(
        self,
        images: np.ndarray,
        labels: Sequence[int] | Sequence[str],
        keep: str | np.ndarray,
        *,
        keep_box: Sequence[int] = (),
        keep_ratio: float = 0.5,
        kept_as: str = "clean",
        seed: int = 0,
        first_index: int = 0,
        split_sizes: Sequence[int] = (),
        **overrides: Any,
    ) -> np.ndarray:
        """Keeps a part of each image and generates the rest anew, after a caption or a class.

        Args:
          images: uint8 `[N, H, W, C]`, generated or one's own.
          labels: a caption for each image, or a class; "" for none.
          keep, keep_box, keep_ratio, kept_as, seed, first_index, split_sizes: see `Sampler.edit`.
          **overrides: fields of `config.sampling`.

        Returns:
          uint8 `[N, H, W, C]`.

        Raises:
          UserError: see `Sampler.edit`; or a caption that is too long.
        """
        if not all(isinstance(label, str) for label in labels):
            return super().edit(
                *(images, labels, keep),
                keep_box=keep_box,
                keep_ratio=keep_ratio,
                kept_as=kept_as,
                seed=seed,
                first_index=first_index,
                split_sizes=split_sizes,
                **overrides,
            )
        if len(labels) != len(images):
            raise UserError(
                f"there are {len(labels)} captions for {len(images)} images; pass one for each."
            )
        known = self.known_tokens(images, keep, keep_box, keep_ratio, seed, first_index)
        settings = self.settings(overrides, split_sizes, int(known.is_known[0].sum()))
        settings = dataclasses.replace(settings, kept_as=kept_as)
        if not settings.num_generated:
            return np.asarray(images)
        prompts = as_documents([[label] for label in labels])
        follow = [("image",)] * len(prompts)
        edited = self.continue_documents(
            prompts, follow, settings, None, seed, first_index, known=known
        )
        return np.stack([parts[0] for parts in edited])

    def text_sampling(self, options: dict[str, Any]) -> TextSampling:
        """How text is generated, with fields of `TextSampling` overridden.

        Raises:
          UserError: an unknown field, or a value out of range.
        """
        for name in options:
            check_choice("text option", name, TEXT_OPTIONS)
        settings = TextSampling(**({"max_length": self.config.text.max_length} | options))
        if settings.max_length > self.config.text.max_length:
            raise UserError(
                f"max_length is {settings.max_length}, but the model is trained with"
                f" text.max_length={self.config.text.max_length}; pass at most that."
            )
        return settings

    def continue_documents(
        self,
        prompts: Sequence[Document],
        follow: Sequence[Sequence[str]],
        settings: sampling.SamplingSettings | None,
        text: TextSampling | None,
        seed: int = 0,
        first_index: int = 0,
        context_tokens: int = 0,
        known: sampling.Known | None = None,
    ) -> list[list[np.ndarray | str]]:
        """Continues documents by segments of given kinds: "text" and "image".

        Args:
          prompts: documents so far; empty ones begin anew.
          follow: of each, the kinds of the segments that are generated.
          settings: of images; None where there is none.
          text: of texts; None where there is none.
          seed, first_index, context_tokens: see `generate`.
          known: tokens that stay as they are, with a row a document; each is followed by one image.

        Returns:
          The segments of each document.
        """
        prompts = [self._checked(prompt) for prompt in prompts]
        structures = [
            (tuple(type(part) for part in prompt), tuple(kinds))
            for prompt, kinds in zip(prompts, follow, strict=True)
        ]
        results: list[list[np.ndarray | str]] = [[] for _ in prompts]
        for structure in dict.fromkeys(structures):
            rows = [row for row, other in enumerate(structures) if other == structure]
            for members, is_own in self._groups(np.array(rows), first_index):
                generated = self._continue(
                    [prompts[row] for row in members],
                    structure[1],
                    first_index + members,
                    _Options(settings, text, seed, context_tokens),
                    known and sampling.Known(*(it[members] for it in known)),
                )
                for place in np.flatnonzero(is_own):
                    results[members[place]] = generated[place]
        return results

    def _groups(
        self, rows: np.ndarray, first_index: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows that are generated at a time, and which places are theirs; the others are filled up.

        A document's place depends on its index alone, as sums of other rows are rounded otherwise.
        """
        at_once = self.config.sampling.images_per_device * sharding.num_batch_shards(self.mesh)
        indices = first_index + rows
        for group in np.unique(indices // at_once):
            members = rows[indices // at_once == group]
            places, is_own = np.full(at_once, members[0]), np.zeros(at_once, bool)
            places[(first_index + members) % at_once] = members
            is_own[(first_index + members) % at_once] = True
            yield places, is_own

    def _checked(self, prompt: Document) -> Document:
        for place, part in enumerate(prompt):
            if isinstance(part, ImageSegment):
                pixels = part.pixels
                if pixels.dtype != np.uint8 or pixels.shape != self.image_shape:
                    raise UserError(
                        f"an image of the prompt is {pixels.dtype} {list(pixels.shape)}, but must be"
                        f" uint8 {list(self.image_shape)}; resize it."
                    )
            elif isinstance(part, ClassSegment):
                self.check_labels([part.label])
                if place + 1 < len(prompt) and not isinstance(prompt[place + 1], ImageSegment):
                    raise UserError(
                        f"class {part.label} in the prompt has no image after it; put it at the end."
                    )
        return prompt

    def _continue(
        self,
        prompts: Sequence[Document],
        kinds: Sequence[str],
        indices: np.ndarray,
        options: "_Options",
        known: sampling.Known | None,
    ) -> list[list[np.ndarray | str]]:
        with sharding.activate(self.mesh):
            stream = _Stream(self, prompts, indices, options)
            for place in range(len(prompts[0])):
                stream.push([prompt[place] for prompt in prompts])
            parts = [stream.generate(kind, known) for kind in kinds]
        return [[part[row] for part in parts] for row in range(len(prompts))]


@dataclasses.dataclass(frozen=True)
class _Options:
    settings: sampling.SamplingSettings | None
    text: TextSampling | None
    seed: int
    context_tokens: int


class _Stream:
    """A batch of documents of one structure as they grow; all arrays have a row a document."""

    def __init__(self, sampler, prompts, indices, options):
        self._sampler, self._options = sampler, options
        self._batch = len(prompts)
        self._vocabulary = sampler.vocabulary
        self._max_text_length = sampler.config.text.max_length
        is_guided = options.settings is not None and options.settings.is_guided
        guide = sampler.guide if is_guided else None
        self._copies = 2 if is_guided and guide is None else 1
        self._networks = (
            *(sampler.model, sampler.params),
            *((None, None) if guide is None else (guide.model, guide.params)),
        )
        key = stream_key(options.seed, "sample")
        self._keys = per_example_keys(key, self._put(indices.astype(np.uint32)))
        self._num_generated = 0
        self._before: type | str | None = None  # kind of the last segment
        self._state = document_sampling.begin(
            *self._networks, self._batch, self._copies, self._capacity(prompts[0])
        )

    def _capacity(self, prompt: Document) -> int:
        """Slots of the cache: what the prompt takes, and besides as many as the user wants."""
        config, num_tokens = self._sampler.config.text, self._sampler.model.num_tokens
        wanted = self._options.context_tokens or (
            config.tokens_per_row + config.images_per_row * num_tokens
        )
        # Texts of prompts are padded; the pads are no context.
        num_texts = sum(isinstance(part, TextSegment) for part in prompt)
        return max(wanted, num_tokens + 4) + num_texts * (self._max_text_length + 1)

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

    def generate(self, kind: str, known: sampling.Known | None) -> Sequence[np.ndarray | str]:
        """The next segment of each document."""
        fold = jax.vmap(lambda key: jax.random.fold_in(key, self._num_generated))
        keys = fold(self._keys) if self._num_generated else self._keys
        self._num_generated += 1
        return self._generate_image(keys, known) if kind == "image" else self._write(keys)

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

    def _write(self, keys):
        if self._before in (None, "image"):
            own = self._vocabulary
            first = own.end_of_text if self._before is None else own.end_of_image
            ids = np.full((self._batch, 1), first, np.int32)
            self._push_ids(ids, np.ones(ids.shape, bool))
        self._before = "text"
        text = self._options.text
        if text.num_beams > 1:
            beams = beam_search.search_text(
                *self._networks[:2], self._state, text, self._vocabulary
            )
            tokens = multihost_utils.process_allgather(beams.tokens[:, 0], tiled=True)
            return self._decoded(tokens)
        writing = Writing(self._put(np.zeros(self._batch, bool)), jnp.int32(0))
        written = []
        for _ in range(-(-text.max_length // _TOKENS_AT_ONCE)):
            self._state, writing, tokens = document_sampling.generate_text(
                *(*self._networks, self._state, text, self._vocabulary, _TOKENS_AT_ONCE),
                *(writing, keys),
            )
            written.append(multihost_utils.process_allgather(tokens, tiled=True))
            if (written[-1][:, -1] == NO_TOKEN).all():
                break
        return self._decoded(np.concatenate(written, axis=1))

    def _decoded(self, tokens: np.ndarray) -> list[str]:
        decode: Callable = build_documents.tokenizer(self._sampler.config).decode
        return [decode([token for token in row.tolist() if token != NO_TOKEN]) for row in tokens]


def as_documents(prompt: Prompt | Sequence[Prompt]) -> list[Document]:
    """One document or a list of them, of parts as `DocumentSampler.generate` takes them.

    Raises:
      UserError: a part that is none.
    """
    if isinstance(prompt, str | np.ndarray | int | TextSegment | ImageSegment | ClassSegment):
        return [_as_document([prompt])]
    is_many = any(isinstance(part, list | tuple) for part in prompt)
    return [_as_document(it) for it in prompt] if is_many else [_as_document(prompt)]


def _as_document(parts: Prompt) -> Document:
    if isinstance(parts, str | np.ndarray | int):
        parts = [parts]
    return tuple(segment for part in parts for segment in _as_segments(part))


def _as_segments(part: Part) -> list[Segment]:
    if isinstance(part, TextSegment | ImageSegment | ClassSegment):
        return [part]
    if isinstance(part, str):
        return [TextSegment(part)] if part else []
    if isinstance(part, np.ndarray):
        return [ImageSegment(part)]
    if isinstance(part, int | np.integer):
        return [ClassSegment(int(part))]
    raise UserError(
        f"a part of the prompt is {type(part).__name__}; pass texts, uint8 images, or classes."
    )
