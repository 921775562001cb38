"""The generalized causal mask of rows of documents: the same two comparisons, within a document.

A clean token is a text token, a condition token or a clean image token. Its rank is its place in
document order, refined by the AR step within an image. A clean token sees the clean tokens of its
document up to its own rank, a noised token those before its rank and the noised tokens of its own AR
step and copy. Condition tokens of one class share a rank, as do the tokens of one AR step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cfjax.documents import NO_PLACE


class DocumentMaskTerms(NamedTuple):
    """Integers per token from which the mask follows; int32 `[batch, T]` each.

    Attributes:
      first_rank: the lowest rank that the token sees.
      last_rank: the highest.
      key_rank: its own rank as a key; below all others where only its group sees it.
      query_group, key_group: it sees the keys whose group is its own.
    """

    first_rank: jax.Array
    last_rank: jax.Array
    key_rank: jax.Array
    query_group: jax.Array
    key_group: jax.Array


# Groups of tokens that no group holds, and of empty slots, which see each other alone.
_SEES_NO_GROUP, _OF_NO_GROUP, _EMPTY = -1, -2, -3
_UNSEEN = -1  # rank
_NONE_SEEN = 2**30  # first rank of tokens that see their group alone


def clean_terms(
    places: jax.Array, begins: jax.Array, num_tokens: int, ar_step_ids: jax.Array | int = 0
) -> DocumentMaskTerms:
    """Terms of clean tokens.

    Args:
      places: `[batch, T]`, NO_PLACE of empty slots.
      begins: the places at which their documents begin, broadcastable to `places`.
      num_tokens: L, above every AR-step id.
      ar_step_ids: of image tokens, broadcastable to `places`.
    """
    is_empty = places == NO_PLACE
    rank = jnp.where(is_empty, _UNSEEN, places * num_tokens + ar_step_ids)
    first = jnp.where(is_empty, _NONE_SEEN, begins * num_tokens)
    return DocumentMaskTerms(
        first_rank=jnp.broadcast_to(first, rank.shape),
        last_rank=rank,
        key_rank=rank,
        query_group=jnp.where(is_empty, _EMPTY, _SEES_NO_GROUP),
        key_group=jnp.where(is_empty, _EMPTY, _OF_NO_GROUP),
    )


def noised_terms(
    places: jax.Array,
    begins: jax.Array,
    num_tokens: int,
    ar_step_ids: jax.Array,
    copies: jax.Array,
    num_copies: int,
) -> DocumentMaskTerms:
    """Terms of noised tokens.

    Args:
      places, begins, num_tokens, ar_step_ids: see `clean_terms`.
      copies: to which copy each belongs, broadcastable to `places`.
      num_copies: k.
    """
    is_empty = places == NO_PLACE
    rank = places * num_tokens + ar_step_ids
    group = jnp.where(is_empty, _EMPTY, rank * num_copies + copies)
    return DocumentMaskTerms(
        first_rank=jnp.broadcast_to(
            jnp.where(is_empty, _NONE_SEEN, begins * num_tokens), rank.shape
        ),
        last_rank=rank - 1,
        key_rank=jnp.full_like(rank, _UNSEEN),
        query_group=group,
        key_group=group,
    )


def document_mask(queries: DocumentMaskTerms, keys: DocumentMaskTerms) -> jax.Array:
    """Who may attend to whom: terms `[..., Q]` and `[..., K]` to bool `[..., Q, K]`."""
    key_rank = keys.key_rank[..., None, :]
    not_before = key_rank >= queries.first_rank[..., :, None]
    in_reach = not_before & (key_rank <= queries.last_rank[..., :, None])
    return in_reach | (queries.query_group[..., :, None] == keys.key_group[..., None, :])
