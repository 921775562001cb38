"""Random documents and what stands where in their rows, for tests."""

import jax.numpy as jnp
import numpy as np

from cfjax.documents import (
    ClassSegment,
    ImageSegment,
    Slots,
    TextSegment,
    Vocabulary,
    items_of,
    lay_out,
)
from cfjax.models.multimodal import DocumentRows, MultimodalCausalFusion

VOCABULARY = Vocabulary(11)
GRID = (2, 3)
NUM_TOKENS = GRID[0] * GRID[1]
TOKEN_WIDTH = 4
NUM_CLASSES = 5
IMAGE_SHAPE = (1, 1, 1)


def model(**changes):
    values = {
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "grid": GRID,
        "token_width": TOKEN_WIDTH,
        "num_classes": NUM_CLASSES,
        "num_condition_tokens": 2,
        "vocabulary_size": VOCABULARY.size,
    }
    return MultimodalCausalFusion(**(values | changes))


def encode(text):
    return [ord(letter) - ord("a") for letter in text]


def document(rng, has_classes=True, num_segments=None):
    segments = []
    for _ in range(rng.integers(1, 5) if num_segments is None else num_segments):
        kind = rng.integers(3 if has_classes else 2)
        if kind == 0:
            letters = rng.integers(0, VOCABULARY.num_text_ids, rng.integers(1, 5))
            segments.append(TextSegment("".join(chr(ord("a") + it) for it in letters)))
            continue
        if kind == 2:
            segments.append(ClassSegment(int(rng.integers(NUM_CLASSES))))
        segments.append(ImageSegment(np.zeros(IMAGE_SHAPE, np.uint8)))
    return tuple(segments)


def items(a_document):
    return items_of(a_document, VOCABULARY, encode, 8)


def row(documents, slots):
    return lay_out([items(it) for it in documents], slots, IMAGE_SHAPE)


def batch(rng, num_rows=2, num_documents=2, slots=Slots(30, 6, True)):  # noqa: B008
    rows = [
        row([document(rng, slots.has_classes) for _ in range(num_documents)], slots)
        for _ in range(num_rows)
    ]
    return {name: jnp.asarray(np.stack([it[name] for it in rows])) for name in rows[0]}


def of_batch(a_batch):
    return DocumentRows(**{name: a_batch[name] for name in DocumentRows._fields})


def images(rng, num_rows, num_images, copies=1, num_clean=NUM_TOKENS):
    """Clean tokens, noised tokens, timesteps, token orders and AR-step ids."""
    shape = (num_rows, num_images)
    clean = rng.normal(size=(*shape, num_clean, TOKEN_WIDTH)).astype(np.float32)
    noised = rng.normal(size=(*shape, copies, NUM_TOKENS, TOKEN_WIDTH)).astype(np.float32)
    t = rng.integers(0, 1000, (*shape, copies, 1))
    order = rng.permuted(np.broadcast_to(np.arange(NUM_TOKENS), (*shape, NUM_TOKENS)), axis=-1)
    cuts = rng.random((*shape, NUM_TOKENS)) < 0.4
    cuts[..., 0] = False
    return tuple(map(jnp.asarray, (clean, noised, t, order, np.cumsum(cuts, axis=-1))))
