"""Packed rows of documents to train on, each made anew by its position in the stream of rows."""

import hashlib
import zlib
from collections.abc import Sequence

import numpy as np

from cfjax.data.document_sources import CaptionedImages, ImageSequences
from cfjax.data.packing import pack
from cfjax.data.tokenizers import Tokenizer
from cfjax.documents import (
    Document,
    ImageSegment,
    Slots,
    TextSegment,
    Vocabulary,
    check_has_target,
    encode_text,
    items_of,
    lay_out,
)
from cfjax.errors import UserError

# Our own tokens in a document of a caption and an image, in either order, are at most so many.
_OWN_TOKENS_OF_CAPTIONED = 4


class PackedDocuments:
    """Rows of documents, by random access; see `cfjax.documents.lay_out` for their arrays.

    Which documents share a row is drawn once, by the seed. Of captioned images, whether the caption
    comes before the image or after it, and whether it is left out before it, is drawn for each
    position of the stream.
    """

    def __init__(
        self,
        source: CaptionedImages | ImageSequences,
        tokenizer: Tokenizer,
        slots: Slots,
        *,
        max_text_length: int,
        image_to_text_share: float = 0.5,
        text_dropout: float = 0.1,
        seed: int = 0,
    ):
        """Encodes all captions and packs them.

        Args:
          source: of the documents.
          tokenizer: of the captions.
          slots: of a row.
          max_text_length: of a caption, in tokens.
          image_to_text_share: of captioned images that come before their caption.
          text_dropout: share of captions before images that are left out, for guidance.
          seed: of all that is drawn.

        Raises:
          UserError: a caption or a document is too long, or a share is not one.
        """
        for name, share in (
            ("data.image_to_text_share", image_to_text_share),
            ("loss.text_dropout", text_dropout),
        ):
            if not 0.0 <= share <= 1.0:
                raise UserError(f"{name} is {share}, but must be in [0, 1].")
        self._source, self._tokenizer, self.slots = source, tokenizer, slots
        self._max_text_length = max_text_length
        self._image_to_text_share, self._text_dropout = image_to_text_share, text_dropout
        self._vocabulary = Vocabulary(tokenizer.vocabulary_size)
        self._seed = seed % 2**64
        if self.is_captioned:
            lengths = np.array(
                [
                    len(encode_text(caption, tokenizer.encode, max_text_length))
                    for caption in source.captions
                ]
            )
            lengths += _OWN_TOKENS_OF_CAPTIONED
            images_per_document = 1
        else:
            images_per_document = source.sequence_length
            lengths = np.full(len(source), 2 * images_per_document)
        self._rows = pack(lengths, images_per_document, slots, seed)
        self._num_documents = len(lengths)
        self._num_text_tokens = int(lengths.sum())
        self._num_images = images_per_document * len(lengths)
        self.image_shape = source.image_shape
        self.left_out = source.left_out

    @property
    def is_captioned(self) -> bool:
        """Whether the documents are captioned images, rather than sequences of images."""
        return hasattr(self._source, "captions")

    @property
    def fingerprint(self) -> str:
        """A hash of what can be known of the rows without reading all images."""
        parts = (self._source.fingerprint, self._tokenizer.name, self.slots, self._seed)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def padding_share(self, tokens_per_image: int) -> float:
        """Share of all tokens of all rows that are padding; an image has so many, clean and noised."""
        slots = len(self) * (self.slots.num_text + self.slots.num_images * tokens_per_image)
        return 1 - (self._num_text_tokens + self._num_images * tokens_per_image) / slots

    def rows_at(self, indices: Sequence[int], positions: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows as arrays with an axis in front.

        Args:
          indices: of the rows.
          positions: in the stream, by which directions and dropout are drawn.

        Raises:
          UserError: an image can't be read, or a document has nothing to learn.
        """
        members = [self._rows[index] for index in indices]
        documents = np.concatenate([np.array(row) for row in members])
        if self.is_captioned:
            images = self._source.images_at(documents)
        else:
            images = self._source.sequences_at(documents)
        rows, begin = [], 0
        for row, position in zip(members, positions, strict=True):
            rng = np.random.Generator(
                np.random.Philox(
                    key=np.array([self._seed, zlib.crc32(b"documents")], np.uint64),
                    counter=np.array([0, position, 0, 0], np.uint64),
                )
            )
            made = [
                self._document(document, images[begin + i], rng) for i, document in enumerate(row)
            ]
            begin += len(row)
            for document in made:
                check_has_target(document)
            items = [
                items_of(it, self._vocabulary, self._tokenizer.encode, self._max_text_length)
                for it in made
            ]
            rows.append(lay_out(items, self.slots, self.image_shape))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def prompts(self, count: int) -> list[Document]:
        """The first documents without what is to be generated: captions, or all images but the last."""
        indices = np.arange(min(count, self._num_documents))
        if self.is_captioned:
            return [(TextSegment(self._source.captions[index]),) for index in indices]
        sequences = self._source.sequences_at(indices)
        return [tuple(ImageSegment(image) for image in images[:-1]) for images in sequences]

    def _document(self, index: int, images: np.ndarray, rng: np.random.Generator) -> Document:
        if not self.is_captioned:
            return tuple(ImageSegment(image) for image in images)
        caption, image = TextSegment(self._source.captions[index]), ImageSegment(images)
        is_image_first, is_dropped = rng.random(2) < (self._image_to_text_share, self._text_dropout)
        if is_image_first:
            return image, caption
        return (image,) if is_dropped else (caption, image)
