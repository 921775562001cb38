"""Documents of text, images and classes, and how they are laid out in rows of static shape.

A document is any interleaving of segments. In the sequence each text token is an AR step of its own,
an image is one or several; `end_of_text` begins a document and ends its last text, `begin_of_image`
announces an image and `end_of_image` stands after one that something follows. A class announces its
image by itself, so that a class with an image is the sequence of a single-image model.

A row packs several documents, which don't see each other. It has slots for text tokens and slots for
images; where a token stands in memory means nothing, as the mask and the positions follow from its
*place*, its index in document order, and from the place where its document begins.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from cfjax.errors import UserError

NO_PLACE = -1  # of a slot that is empty
NO_TARGET = -1  # of a text token after which nothing is to be predicted


@dataclasses.dataclass(frozen=True)
class TextSegment:
    """Text; if `is_target`, the model learns to write it."""

    text: str
    is_target: bool = True


@dataclasses.dataclass(frozen=True)
class ImageSegment:
    """Pixels uint8 `[H, W, C]`; if `is_target`, the model learns to generate them."""

    pixels: np.ndarray
    is_target: bool = True


@dataclasses.dataclass(frozen=True)
class ClassSegment:
    """The class of the image that follows."""

    label: int


Segment = TextSegment | ImageSegment | ClassSegment
Document = tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer, 0 to `num_text_ids - 1`, and after them those of our own tokens."""

    num_text_ids: int

    @property
    def end_of_text(self) -> int:
        """Begins a document and ends its last text."""
        return self.num_text_ids

    @property
    def begin_of_image(self) -> int:
        """Announces an image."""
        return self.num_text_ids + 1

    @property
    def end_of_image(self) -> int:
        """Stands after an image that something follows."""
        return self.num_text_ids + 2

    @property
    def size(self) -> int:
        """How many ids there are."""
        return self.num_text_ids + 3


@dataclasses.dataclass(frozen=True)
class Slots:
    """What a row has room for: text tokens, images, and classes (as many as images, or none)."""

    num_text: int
    num_images: int
    has_classes: bool = False


@dataclasses.dataclass(frozen=True)
class Item:
    """One place of a document: a text token, an image, or the condition tokens of a class.

    Attributes:
      position: what rotates its queries and keys. Each text token and each image takes one, all tokens
        of an image the same; a class takes none.
      token: id of a text token, else None.
      target: id of the text token that follows it and is to be learned, or NO_TARGET.
      pixels, is_target: of an image.
      label: of a class.
    """

    position: int
    token: int | None = None
    target: int = NO_TARGET
    pixels: np.ndarray | None = None
    is_target: bool = False
    label: int | None = None


def items_of(
    document: Document,
    vocabulary: Vocabulary,
    encode: Callable[[str], list[int]],
    max_text_length: int,
) -> list[Item]:
    """A document as it stands in the sequence.

    Args:
      document: at least one segment.
      vocabulary: the ids of our own tokens.
      encode: text to ids.
      max_text_length: of one text, in tokens.

    Raises:
      UserError: a text is longer, or a class has no image after it.
    """
    # (id, whether it is to be predicted), or an image or class segment.
    sequence: list[tuple[int, bool] | ImageSegment | ClassSegment] = []
    if not isinstance(document[0], ClassSegment):
        sequence.append((vocabulary.end_of_text, False))
    for place, segment in enumerate(document):
        following = document[place + 1] if place + 1 < len(document) else None
        if isinstance(segment, TextSegment):
            ids = encode_text(segment.text, encode, max_text_length)
            sequence += [(token, segment.is_target) for token in ids]
            if following is None:
                sequence.append((vocabulary.end_of_text, segment.is_target))
        elif isinstance(segment, ImageSegment):
            if place == 0 or not isinstance(document[place - 1], ClassSegment):
                sequence.append((vocabulary.begin_of_image, segment.is_target))
            sequence.append(segment)
            if following is not None:
                sequence.append((vocabulary.end_of_image, False))
        else:
            if not isinstance(following, ImageSegment):
                raise UserError(
                    f"class {segment.label} has no image after it; put one behind it in the document."
                )
            sequence.append(segment)
    items, position = [], 0
    for here, following in zip(sequence, [*sequence[1:], None], strict=True):
        if isinstance(here, ClassSegment):
            items.append(Item(position, label=here.label))
            continue
        if isinstance(here, ImageSegment):
            items.append(Item(position, pixels=here.pixels, is_target=here.is_target))
        else:
            is_learned = isinstance(following, tuple) and following[1]
            items.append(Item(position, here[0], following[0] if is_learned else NO_TARGET))
        position += 1
    return items


def encode_text(text: str, encode: Callable[[str], list[int]], max_length: int) -> list[int]:
    """The ids of a text.

    Raises:
      UserError: they are more than `max_length`.
    """
    ids = encode(text)
    if len(ids) > max_length:
        raise UserError(
            f"the text {shortened(text)!r} has {len(ids)} tokens, but text.max_length is"
            f" {max_length}; shorten it or raise text.max_length."
        )
    return ids


def shortened(text: str) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_has_target(document: Document) -> None:
    """Refuses a document of which nothing is to be learned.

    Raises:
      UserError: no text and no image of it is a target.
    """
    is_target = [getattr(segment, "is_target", False) for segment in document]
    if not any(is_target):
        kinds = [type(segment).__name__ for segment in document]
        raise UserError(
            f"the document {kinds} has no target; mark a text or an image of it as one."
        )


def lay_out(
    documents: Sequence[Sequence[Item]], slots: Slots, image_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """A row of documents as arrays.

    Args:
      documents: from `items_of`; together no more than the row has room for.
      slots: of the row.
      image_shape: (H, W, C).

    Returns:
      With N text and I image slots, `text_ids`, `text_targets`, `text_places`, `text_begins` and
      `text_positions`, int32 `[N]`; `image` uint8 `[I, H, W, C]`, `image_places`, `image_begins` and
      `image_positions`, int32 `[I]`, `image_is_target` bool `[I]`; and of classes, of which slot i
      belongs to image i, `label` and `label_places`, int32 `[I]` or `[0]`. Empty slots have the place
      NO_PLACE.

    Raises:
      UserError: they are more, or an image has another shape.
    """
    num_text, num_images = slots.num_text, slots.num_images
    num_labels = num_images if slots.has_classes else 0
    row = {
        "text_ids": np.zeros(num_text, np.int32),
        "text_targets": np.full(num_text, NO_TARGET, np.int32),
        "image": np.zeros((num_images, *image_shape), np.uint8),
        "image_is_target": np.zeros(num_images, bool),
        "label": np.zeros(num_labels, np.int32),
        "label_places": np.full(num_labels, NO_PLACE, np.int32),
    }
    for kind, count in (("text", num_text), ("image", num_images)):
        row |= {f"{kind}_{name}": np.zeros(count, np.int32) for name in ("begins", "positions")}
        row[f"{kind}_places"] = np.full(count, NO_PLACE, np.int32)
    place = text = image = 0
    for items in documents:
        begin = place
        for item in items:
            if item.token is not None:
                _check_room("text tokens", text, num_text)
                row["text_ids"][text], row["text_targets"][text] = item.token, item.target
                _put(row, "text", text, place, begin, item.position)
                text += 1
            elif item.pixels is not None:
                _check_room("images", image, num_images)
                if item.pixels.shape != image_shape:
                    raise UserError(
                        f"an image of the document is {list(item.pixels.shape)}, but must be"
                        f" {list(image_shape)}; resize it."
                    )
                row["image"][image] = item.pixels
                row["image_is_target"][image] = item.is_target
                _put(row, "image", image, place, begin, item.position)
                image += 1
            else:
                _check_room("classes", image, num_labels)
                row["label"][image], row["label_places"][image] = item.label, place
            place += 1
    return row


def _put(row: dict[str, np.ndarray], kind: str, slot: int, place: int, begin: int, position: int):
    for name, value in (("places", place), ("begins", begin), ("positions", position)):
        row[f"{kind}_{name}"][slot] = value


def _check_room(what: str, used: int, room: int) -> None:
    if used >= room:
        raise UserError(
            f"the documents of a row have more than {room} {what}; raise text.tokens_per_row or"
            " text.images_per_row."
        )
