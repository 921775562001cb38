"""How many clean tokens a training sequence holds: a few static lengths, each one program.

Nobody but themselves sees the clean tokens of the last AR step, so that a train step whose split
ends with a large AR step needs few of them. Splits are random but drawn by address: every host
computes which length the next train steps need.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.errors import UserError
from cfjax.factorization import (
    Factorization,
    max_clean_tokens,
    num_ar_steps_probabilities,
    sample_split,
)
from cfjax.rng import stream_key

_LENGTHS_PER_BATCH = 1024
_CANDIDATES = 16  # bucket lengths are multiples of L / 16


def clean_length_probabilities(factorization: Factorization, num_tokens: int) -> np.ndarray:
    """p(c): that the AR steps before the last one have c tokens, float64 `[L]`, c = 0...L-1.

    With S AR steps, S - 1 cut points are drawn from 1...L-1 without replacement, and c is the
    largest: p(c | S) = C(c - 1, S - 2) / C(L - 1, S - 1).
    """
    probabilities = np.zeros(num_tokens)
    if factorization.mode not in ("random", "decayed"):
        probabilities[max_clean_tokens(factorization, num_tokens)] = 1.0
        return probabilities
    decay = factorization.ar_step_decay if factorization.mode == "decayed" else 1.0
    by_count = num_ar_steps_probabilities(num_tokens, decay)
    probabilities[0] = by_count[0]
    log_factorial = np.array([math.lgamma(i + 1) for i in range(num_tokens)])

    def log_choose(n, k):
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    for num_ar_steps in range(2, num_tokens + 1):
        c = np.arange(num_ar_steps - 1, num_tokens)
        log_p = log_choose(c - 1, num_ar_steps - 2) - log_choose(num_tokens - 1, num_ar_steps - 1)
        probabilities[c] += by_count[num_ar_steps - 1] * np.exp(log_p)
    return probabilities


def bucket_lengths(
    probabilities: np.ndarray, num_buckets: int, cost: Callable[[int], float]
) -> tuple[int, ...]:
    """The lengths, ascending, that make the expected cost of a train step least.

    Args:
      probabilities: from `clean_length_probabilities`, `[L]`.
      num_buckets: at most so many lengths.
      cost: clean tokens -> cost of a train step, not falling.

    Returns:
      Multiples of L / 16 (of 1 below 16 tokens) and the largest length that is ever needed.
    """
    num_tokens = len(probabilities)
    largest = int(np.flatnonzero(probabilities)[-1])
    granule = max(1, num_tokens // _CANDIDATES)
    lengths = [*range(0, largest, granule), largest]
    below = np.concatenate([[0.0], np.cumsum(probabilities)])
    # least[i]: expected cost of the train steps that need at most lengths[i], which is a bucket.
    least = [cost(c) * below[c + 1] for c in lengths]
    buckets = [(c,) for c in lengths]
    for _ in range(num_buckets - 1):
        longer = []
        for i, c in enumerate(lengths):
            options = [(least[i], buckets[i])]
            for j in range(i):
                between = below[c + 1] - below[lengths[j] + 1]
                options.append((least[j] + cost(c) * between, (*buckets[j], c)))
            longer.append(min(options, key=lambda option: option[0]))
        least, buckets = [value for value, _ in longer], [chosen for _, chosen in longer]
    return buckets[-1]


def expected_cost(
    probabilities: np.ndarray, lengths: tuple[int, ...], cost: Callable[[int], float]
) -> float:
    """Expected cost of a train step that takes the shortest of `lengths` that suffices."""
    shares = length_probabilities(probabilities, lengths)
    return sum(p * cost(length) for p, length in zip(shares, lengths, strict=True))


def length_probabilities(probabilities: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Share of train steps that take each of `lengths`, the shortest that suffices, `[lengths]`."""
    needed = np.flatnonzero(probabilities)
    chosen = np.searchsorted(lengths, needed)
    return np.bincount(chosen, probabilities[needed], len(lengths))


def check_num_buckets(factorization: Factorization, num_buckets: int) -> None:
    """Refuses a number of lengths that can't be had.

    Raises:
      UserError: it is below 1, or above 1 although every example has a split of its own.
    """
    if num_buckets < 1:
        raise UserError(f"train.clean_length_buckets is {num_buckets}, but must be at least 1.")
    if num_buckets > 1 and factorization.split_per_example:
        raise UserError(
            f"train.clean_length_buckets is {num_buckets}, but with factorization.split_per_example"
            " some example nearly always needs the full length; set it to 1."
        )


def clean_lengths(
    factorization: Factorization,
    num_tokens: int,
    lengths: tuple[int, ...],
    seed: int,
    first: int,
) -> Iterator[int]:
    """Yields which of `lengths` each train step needs, from train step `first` on, endlessly.

    Args:
      factorization: of training, one split a batch.
      num_tokens: L.
      lengths: ascending.
      seed: of the run.
      first: train steps taken before.
    """
    while len(lengths) > 1:
        numbers = jnp.arange(first, first + _LENGTHS_PER_BATCH)
        needed = _needed(factorization, num_tokens, seed, numbers)
        yield from np.asarray(lengths)[np.searchsorted(lengths, needed)].tolist()
        first += _LENGTHS_PER_BATCH
    while True:
        yield lengths[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _needed(
    factorization: Factorization, num_tokens: int, seed: int, numbers: jax.Array
) -> jax.Array:
    """Tokens before the last AR step, int32 `[numbers]`, of these train steps."""

    def count(number):
        key = stream_key(seed, "split", number)
        ids = sample_split(factorization, key, num_tokens)
        return jnp.sum(ids < ids[-1])

    return jax.vmap(count)(numbers)
