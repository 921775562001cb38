"""Documents as users write them: texts, uint8 images and classes."""

from collections.abc import Sequence

import numpy as np

from cfjax.documents import ClassSegment, Document, ImageSegment, Segment, TextSegment
from cfjax.errors import UserError

Part = str | np.ndarray | int | Segment
Prompt = Part | Sequence[Part]


def as_documents(prompt: Prompt | Sequence[Prompt]) -> list[Document]:
    """One document or a list of them, of parts as `DocumentSampler.generate` takes them.

    Raises:
      UserError: a part that is none.
    """
    if isinstance(
        prompt, str | np.ndarray | int | np.integer | TextSegment | ImageSegment | ClassSegment
    ):
        return [_as_document([prompt])]
    is_many = any(isinstance(part, list | tuple) for part in prompt)
    return [_as_document(it) for it in prompt] if is_many else [_as_document(prompt)]


def _as_document(parts: Prompt) -> Document:
    if isinstance(parts, str | np.ndarray | int | np.integer):
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
