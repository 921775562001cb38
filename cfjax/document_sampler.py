"""A trained model of documents ready to draw, to describe and to continue: the Python API.

model = cfjax.load("runs/mnist_scenes")
images = model.generate(prompt="a red three left of a blue seven")
texts = model.generate(prompt=[[image] for image in images], what="text")
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cfjax import build_documents, sampling, sharding
from cfjax.data.images import to_uint8
from cfjax.document_parts import Prompt, as_documents
from cfjax.document_stream import DocumentStream, StreamOptions
from cfjax.documents import (
    ClassSegment,
    Document,
    ImageSegment,
    TextSegment,
    Vocabulary,
    encode_text,
)
from cfjax.errors import UserError, check_choice
from cfjax.models.patches import unpatchify
from cfjax.sampler import Sampler
from cfjax.text_sampling import TextSampling

KINDS = ("image", "text")
TEXT_OPTIONS = tuple(field.name for field in dataclasses.fields(TextSampling))


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
        """A text for each image uint8 `[N, H, W, C]`; see `generate` for the options.

        Raises:
          UserError: there is no image, or see `generate`.
        """
        if not len(images):
            raise UserError("there is no image; pass at least one to be described.")
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
        batches = self.stream_documents(
            prompts, settings, seed=seed, first_index=first_index, known=known
        )
        return np.concatenate(list(batches))[:, 0]

    def check_labels(self, labels: Sequence[int]) -> np.ndarray:
        """Labels as int32 `[N]`; see `Sampler.check_labels`.

        Raises:
          UserError: the model has no classes, there is no label, or one is not a class.
        """
        if not self.model.num_classes:
            raise UserError(
                "the model has no classes (data.num_classes is 0), but texts: pass a prompt or a"
                " caption instead."
            )
        return super().check_labels(labels)

    def stream_documents(
        self,
        documents: Sequence[Document],
        settings: sampling.SamplingSettings,
        n: int = 1,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 256,
        known: sampling.Known | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the images that follow documents, batch by batch.

        Args:
          documents: so far; empty ones begin anew.
          settings: how images are generated.
          n: images that follow each.
          seed, first_index: see `generate`.
          batch_size: images of a batch, at least; the last one may have fewer.
          known: tokens that stay as they are, with a row a document; with n = 1.

        Yields:
          uint8 `[m, n, H, W, C]`, of the next m documents.

        Raises:
          UserError: a document that does not fit the model.
        """
        for document in documents:
            self.check_document(document)
        if known is not None and not settings.num_generated:
            size, grid = self.config.model.patch_size, self.model.grid
            tokens = unpatchify(jnp.asarray(known.tokens), size, grid)
            yield to_uint8(self.to_images(np.asarray(tokens)))[:, None]
            return
        at_once = self.documents_at_once
        groups = (first_index + np.arange(len(documents))) // at_once
        waiting, num_waiting = [], 0
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            generated = self.continue_documents(
                [documents[row] for row in rows],
                [("image",) * n] * len(rows),
                settings,
                None,
                seed,
                first_index + int(rows[0]),
                known=known and sampling.Known(*(it[rows] for it in known)),
            )
            waiting.append(np.stack([np.stack(parts) for parts in generated]))
            num_waiting += n * len(rows)
            if num_waiting >= batch_size or group == groups[-1]:
                yield np.concatenate(waiting)
                waiting, num_waiting = [], 0

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
        if settings.is_guided and self.config.data.image_to_text_share == 1:
            raise UserError(
                f"guidance_scale of text is {settings.guidance_scale:g}, but the model was not trained"
                " on texts with nothing before them (data.image_to_text_share is 1); pass 1."
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

        Raises:
          UserError: a prompt that does not fit the model.
        """
        if self.guide is not None and text is not None and text.is_guided:
            raise UserError(
                "the guide of images can't go with a guidance_scale of text; load the model without"
                " it, or pass guidance_scale=1 for text."
            )
        for prompt in prompts:
            self.check_document(prompt)
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
                    StreamOptions(settings, text, seed, context_tokens),
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
        at_once, indices = self.documents_at_once, first_index + rows
        for group in np.unique(indices // at_once):
            members = rows[indices // at_once == group]
            places, is_own = np.full(at_once, members[0]), np.zeros(at_once, bool)
            places[(first_index + members) % at_once] = members
            is_own[(first_index + members) % at_once] = True
            yield places, is_own

    @property
    def documents_at_once(self) -> int:
        """How many are made together, on all devices."""
        return self.config.sampling.images_per_device * sharding.num_batch_shards(self.mesh)

    def check_document(self, prompt: Document) -> None:
        """Refuses a document that can't be continued.

        Raises:
          UserError: a text of it is too long, an image of another size, or a class unknown or in the
            wrong place.
        """
        encode = build_documents.tokenizer(self.config).encode
        for place, part in enumerate(prompt):
            if isinstance(part, TextSegment):
                encode_text(part.text, encode, self.config.text.max_length)
            elif isinstance(part, ImageSegment):
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

    def _continue(
        self,
        prompts: Sequence[Document],
        kinds: Sequence[str],
        indices: np.ndarray,
        options: StreamOptions,
        known: sampling.Known | None,
    ) -> list[list[np.ndarray | str]]:
        with sharding.activate(self.mesh):
            stream = DocumentStream(self, prompts, kinds, indices, options)
            for place in range(len(prompts[0])):
                stream.push([prompt[place] for prompt in prompts])
            last = len(kinds) - 1
            parts = [stream.generate(kind, known, i == last) for i, kind in enumerate(kinds)]
        return [[part[row] for part in parts] for row in range(len(prompts))]
