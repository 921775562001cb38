"""Packing documents into rows of static shape, each row about as full as the next."""

import numpy as np

from cfjax.documents import Slots
from cfjax.errors import UserError


def pack(
    text_lengths: np.ndarray, images_per_document: int, slots: Slots, seed: int
) -> list[list[int]]:
    """Divides documents among rows.

    Each row begins with the longest document that is left, and then takes those which are closest to
    an equal share of its remaining room.

    Args:
      text_lengths: text tokens of each document, int `[documents]`.
      images_per_document: images of each.
      slots: of a row.
      seed: which of equally long documents come together.

    Returns:
      Indices of the documents of each row; each document is in one.

    Raises:
      UserError: one document alone is more than a row has room for.
    """
    longest = int(text_lengths.max())
    if longest > slots.num_text or images_per_document > slots.num_images:
        raise UserError(
            f"a document has {longest} text tokens and {images_per_document} images, but a row has room"
            f" for {slots.num_text} and {slots.num_images}; raise text.tokens_per_row or"
            " text.images_per_row."
        )
    by_length: list[list[int]] = [[] for _ in range(longest + 1)]
    for document in np.random.default_rng(seed).permutation(len(text_lengths)):
        by_length[text_lengths[document]].append(int(document))
    at_most = slots.num_images // images_per_document
    rows = []
    while longest >= 0:
        if not by_length[longest]:
            longest -= 1
            continue
        row, room = [by_length[longest].pop()], slots.num_text - longest
        while len(row) < at_most:
            share = room / (at_most - len(row))
            length = _closest(by_length, share, min(room, longest))
            if length is None:
                break
            row.append(by_length[length].pop())
            room -= length
        rows.append(row)
    return rows


def _closest(by_length: list[list[int]], share: float, at_most: int) -> int | None:
    """The length closest to `share` of which there is a document left."""
    lengths = [length for length in range(at_most + 1) if by_length[length]]
    return min(lengths, key=lambda length: abs(length - share), default=None)
