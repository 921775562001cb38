"""The ring of documents' keys and values: room, whole segments forgotten, rows that begin anew."""

import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.errors import UserError
from cfjax.models.document_cache import empty_document_cache

CAPACITY = 7


@pytest.fixture
def cache():
    return empty_document_cache(1, 2, 1, 2, CAPACITY, jnp.float32)


def pushed(cache, is_real, value, ends=True):
    """A push of tokens whose keys are `value`."""
    is_real = jnp.asarray(is_real, bool)
    cache = cache.with_room(is_real.shape[1])
    new = jnp.full((*is_real.shape, 1, 2), value, jnp.float32)
    layers = cache.kv_cache.with_written(jnp.int32(0), new, new)
    cache = cache.with_pushed(layers, is_real)
    return cache.after_segment(is_real.sum(1)) if ends else cache


def seen(cache, row=0):
    """The values that a row sees, by slot; 0 where it sees none."""
    keys = np.asarray(cache.kv_cache.keys[0, row, 0, 0])
    return np.where(np.asarray(cache.is_filled[row]), keys, 0).tolist()


def test_rows_fill_the_same_slots(cache):
    cache = pushed(cache, [[1, 1], [0, 1]], 1)
    cache = pushed(cache, [[0, 0, 1], [1, 1, 1]], 2)
    assert seen(cache, 0) == [1, 1, 0, 0, 2, 0, 0]
    assert seen(cache, 1) == [0, 1, 2, 2, 2, 0, 0]
    assert cache.position.tolist() == [3, 4]


def test_what_is_overwritten_is_forgotten_wholly(cache):
    """A segment of three of which two slots are taken leaves nothing; what does not fit begins at 0."""
    for value, count in ((1, 3), (2, 2)):
        cache = pushed(cache, np.ones((2, count)), value)
    cache = pushed(cache, np.ones((2, 2)), 3)
    assert seen(cache) == [1, 1, 1, 2, 2, 3, 3]
    cache = pushed(cache, np.ones((2, 2)), 4)
    assert seen(cache) == [4, 4, 0, 2, 2, 3, 3]
    cache = pushed(cache, np.ones((2, 3)), 5)
    assert seen(cache) == [4, 4, 5, 5, 5, 3, 3]
    cache = pushed(cache, np.ones((2, 3)), 6)  # the last two slots are skipped, and no longer seen
    assert seen(cache) == [6, 6, 6, 0, 0, 0, 0]


def test_a_segment_in_parts_keeps_its_parts(cache):
    cache = pushed(cache, np.ones((2, 2)), 1)
    cache = pushed(cache, np.ones((2, 2)), 2, ends=False)
    cache = pushed(cache, np.ones((2, 2)), 3)
    assert seen(cache) == [1, 1, 2, 2, 3, 3, 0]
    assert cache.segment_of_slot.tolist()[:6] == [0, 0, 1, 1, 1, 1]


def test_a_row_that_begins_anew(cache):
    cache = pushed(cache, np.ones((2, 2)), 1).forgotten(jnp.array([False, True]))
    assert seen(cache, 0)[:2] == [1, 1]
    assert seen(cache, 1)[:2] == [0, 0]
    assert cache.position.tolist() == [2, 0]


def test_more_than_fits_is_refused(cache):
    with pytest.raises(UserError, match="8 tokens don't fit into a KV cache of 7"):
        cache.with_room(8)
