"""The AR axis: plans, orders, splits, the generalized causal mask, loss weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cfjax import factorization as fz
from cfjax.errors import UserError
from cfjax.factorization import CLEAN, CONDITION, NOISED, Factorization

NUM_DRAWS = 200_000
# The draws are seeded, so a test passes always or never; one in a thousand seeds would fail.
P_VALUE = 1e-3


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def may_attend(query, key):
    """The published rule, case by case; a token is (kind, AR step)."""
    (query_kind, query_step), (key_kind, key_step) = query, key
    if key_kind == CONDITION:
        return True
    if query_kind == CONDITION:
        return False
    if key_kind == CLEAN:
        return key_step <= query_step if query_kind == CLEAN else key_step < query_step
    return query_kind == key_kind and query_step == key_step


@pytest.mark.parametrize(
    ("num_tokens", "num_condition", "num_clean", "copies"),
    [(1, 1, 0, 1), (6, 2, 6, 1), (9, 3, 5, 2), (8, 0, 7, 3)],
)
def test_mask_equals_its_brute_force_definition(num_tokens, num_condition, num_clean, copies):
    @jax.jit
    def mask_of(kinds, ids):
        terms = fz.mask_terms(kinds, ids, num_tokens)
        return fz.generalized_causal_mask(terms, terms)

    rng = np.random.default_rng(num_tokens)
    for _ in range(25):
        ids = np.unique(rng.integers(0, num_tokens, num_tokens), return_inverse=True)[1]
        ids = np.sort(ids)
        tokens = [(CONDITION, 0)] * num_condition
        tokens += [(CLEAN, step) for step in ids[:num_clean]]
        for copy in range(copies):
            tokens += [(NOISED + copy, step) for step in ids]
        tokens = [tokens[i] for i in rng.permutation(len(tokens))]
        expected = [[may_attend(query, key) for key in tokens] for query in tokens]
        kinds, ids = (np.array(values, np.int32) for values in zip(*tokens, strict=True))
        mask = mask_of(kinds, ids)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)


def test_mask_of_a_batch_of_queries_against_other_keys():
    ids = jnp.array([[0, 0, 1], [0, 1, 1]])
    queries = fz.mask_terms(jnp.full((2, 3), NOISED), ids, 3)
    cached = fz.mask_terms(jnp.array([[CONDITION, CLEAN, CLEAN]] * 2), ids, 3)
    mask = fz.generalized_causal_mask(queries, cached)
    # Of two examples with different splits; the first column is the condition token.
    first = [[True, False, False], [True, False, False], [True, True, False]]
    second = [[True, False, False]] * 3
    np.testing.assert_array_equal(mask, [first, second])


@pytest.mark.parametrize("name", fz.TOKEN_ORDERS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 4), (7, 2)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_orders_are_permutations(name, grid, size):
    orders = fz.token_order(name, grid, keys(6), block_size=size, dilation_stride=size)
    num_tokens = grid[0] * grid[1]
    assert orders.shape == (6, num_tokens) and orders.dtype == jnp.int32
    np.testing.assert_array_equal(
        np.sort(orders, axis=1), np.broadcast_to(np.arange(num_tokens), orders.shape)
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raster", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
        # Blocks of 2 x 2 on 3 rows of 5; those at the right and at the bottom are smaller.
        ("block_raster", [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]),
        # Even rows and columns; even rows, odd columns; odd rows, even columns; odd and odd.
        ("dilated", [0, 2, 4, 10, 12, 14, 1, 3, 11, 13, 5, 7, 9, 6, 8]),
    ],
)
def test_fixed_orders_by_hand(name, expected):
    orders = fz.token_order(name, (3, 5), keys(2), block_size=2, dilation_stride=2)
    np.testing.assert_array_equal(orders, [expected, expected])


def test_random_orders_depend_on_their_key_alone_and_are_uniform():
    orders = np.asarray(fz.token_order("random", (2, 2), keys(24_000)))
    again = fz.token_order("random", (2, 2), keys(24_000)[100:103])
    np.testing.assert_array_equal(again, orders[100:103])
    counts = np.unique(orders @ 4 ** np.arange(4), return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize(("num_tokens", "decay"), [(16, 0.5), (64, 0.9), (256, 0.9), (32, 1.0)])
def test_number_of_ar_steps_is_distributed_as_stated(num_tokens, decay):
    draw = jax.jit(jax.vmap(lambda key: fz.sample_num_ar_steps(key, num_tokens, decay)))
    drawn = np.asarray(draw(keys(NUM_DRAWS)))
    assert drawn.dtype == np.int32 and drawn.min() >= 1 and drawn.max() <= num_tokens
    expected = NUM_DRAWS * decay ** np.arange(num_tokens, dtype=np.float64)
    expected /= (decay ** np.arange(num_tokens, dtype=np.float64)).sum()
    counts = np.bincount(drawn, minlength=num_tokens + 1)[1:]
    # Chi-square wants at least a few expected counts; the tail counts as one.
    end = int((expected >= 10).sum())
    if end < num_tokens:
        counts, expected = (
            np.append(values[:end], values[end:].sum()) for values in (counts, expected)
        )
    assert stats.chisquare(counts, expected).pvalue > P_VALUE


@pytest.mark.parametrize("num_ar_steps", [1, 2, 3, 5, 6])
def test_every_set_of_cut_points_is_equally_likely(num_ar_steps):
    num_tokens = 6
    draw = jax.jit(jax.vmap(lambda key: fz.sample_ar_step_ids(key, num_tokens, num_ar_steps)))
    ids = np.asarray(draw(keys(NUM_DRAWS, seed=1)))
    rows, counts = np.unique(ids, axis=0, return_counts=True)
    expected = []
    for cuts in itertools.combinations(range(1, num_tokens), num_ar_steps - 1):
        expected.append([sum(cut <= position for cut in cuts) for position in range(num_tokens)])
    np.testing.assert_array_equal(rows, sorted(expected))
    if num_ar_steps < num_tokens and num_ar_steps > 1:
        assert stats.chisquare(counts).pvalue > P_VALUE


def test_cut_points_of_many_tokens_are_uniform():
    num_tokens = 64
    draw = jax.jit(jax.vmap(lambda key: fz.sample_ar_step_ids(key, num_tokens, 2)))
    ids = np.asarray(draw(keys(NUM_DRAWS, seed=2)))
    first_sizes = np.bincount((ids == 0).sum(1), minlength=num_tokens)[1:]
    assert stats.chisquare(first_sizes).pvalue > P_VALUE


def test_number_of_ar_steps_may_be_traced():
    draw = jax.jit(lambda key, count: fz.sample_ar_step_ids(key, 9, count))
    for count in range(1, 10):
        ids = draw(jax.random.key(count), count)
        np.testing.assert_array_equal(np.unique(ids), np.arange(count))
        assert ids.dtype == jnp.int32 and (np.diff(ids) >= 0).all()
    assert draw._cache_size() == 1


draw_plan = jax.jit(fz.sample_plan, static_argnums=(0, 3))


def sample(factorization, seed=0, batch=5, grid=(4, 4)):
    split_keys = keys(batch, seed)
    split_key = split_keys if factorization.split_per_example else split_keys[0]
    return draw_plan(factorization, split_key, keys(batch, seed + 1), grid)


@pytest.mark.parametrize("mode", fz.MODES)
@pytest.mark.parametrize("per_example", [False, True])
def test_plans_are_valid(mode, per_example):
    factorization = Factorization(mode=mode, num_ar_steps=3, split_per_example=per_example)
    for seed in range(5):
        plan = sample(factorization, seed)
        assert plan.token_order.shape == plan.ar_step_ids.shape == (5, 16)
        assert plan.token_order.dtype == plan.ar_step_ids.dtype == jnp.int32
        np.testing.assert_array_equal(
            np.sort(plan.token_order, axis=1), np.broadcast_to(np.arange(16), (5, 16))
        )
        for ids in np.asarray(plan.ar_step_ids):
            np.testing.assert_array_equal(np.unique(ids), np.arange(ids.max() + 1))
            assert (np.diff(ids) >= 0).all()


def test_modes():
    def ids(**fields):
        return np.asarray(sample(Factorization(**fields)).ar_step_ids)

    np.testing.assert_array_equal(ids(mode="diffusion"), np.zeros((5, 16)))
    np.testing.assert_array_equal(ids(mode="ar"), np.broadcast_to(np.arange(16), (5, 16)))
    three = np.repeat(np.arange(3), [6, 5, 5])
    fixed = ids(mode="fixed", num_ar_steps=3)
    np.testing.assert_array_equal(fixed, np.broadcast_to(three, (5, 16)))
    # A decay so strong that one AR step remains, against one in which 16 are as likely as one.
    assert ids(mode="decayed", ar_step_decay=1e-9).max() == 0
    counts = [int(sample(Factorization(mode="random"), s).ar_step_ids.max()) + 1 for s in range(40)]
    assert len(set(counts)) >= 8 and min(counts) <= 4 and max(counts) >= 13


def test_split_of_the_batch_and_of_each_example():
    shared = sample(Factorization(mode="random")).ar_step_ids
    assert (np.asarray(shared) == np.asarray(shared)[0]).all()
    own = np.asarray(sample(Factorization(mode="random", split_per_example=True)).ar_step_ids)
    assert len(np.unique(own, axis=0)) == 5
    # Drawn from the example's own key.
    alone = fz.sample_plan(
        Factorization(mode="random", split_per_example=True), keys(5)[2:3], keys(1), (4, 4)
    )
    np.testing.assert_array_equal(alone.ar_step_ids[0], own[2])


def test_one_compilation_serves_every_split():
    draw = jax.jit(lambda *args: fz.sample_plan(Factorization(), *args, (4, 4)))
    plans = [draw(jax.random.key(seed), keys(2)) for seed in range(20)]
    assert draw._cache_size() == 1
    assert len({int(plan.ar_step_ids.max()) for plan in plans}) > 3


@pytest.mark.parametrize("mode", fz.MODES)
def test_max_clean_tokens_covers_every_plan(mode):
    factorization = Factorization(mode=mode, num_ar_steps=3, ar_step_decay=1.0)
    most = fz.max_clean_tokens(factorization, 16)
    needed = [
        int((ids < ids.max()).sum())
        for seed in range(30)
        for ids in np.asarray(sample(factorization, seed, batch=1).ar_step_ids)
    ]
    assert max(needed) <= most
    assert most == {"diffusion": 0, "fixed": 11}.get(mode, 15)


def test_one_token():
    for mode in fz.MODES:
        plan = sample(Factorization(mode=mode), grid=(1, 1))
        np.testing.assert_array_equal(plan.ar_step_ids, np.zeros((5, 1)))
        np.testing.assert_array_equal(plan.token_order, np.zeros((5, 1)))


def test_split_sizes_for_generation():
    assert fz.equal_split_sizes(49, 1) == (49,)
    assert fz.equal_split_sizes(49, 7) == (7,) * 7
    assert fz.equal_split_sizes(49, 4) == (13, 12, 12, 12)
    assert fz.equal_split_sizes(3, 3) == (1, 1, 1)
    assert fz.check_split_sizes([np.int64(3), 7, 1, 5], 16) == (3, 7, 1, 5)
    ids = fz.ar_step_ids_from_sizes((2, 1, 3))
    np.testing.assert_array_equal(ids, [0, 0, 1, 2, 2, 2])
    assert ids.dtype == np.int32


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: fz.equal_split_sizes(49, 50), "50.*49 tokens"),
        (lambda: fz.equal_split_sizes(49, 0), "num_ar_steps is 0"),
        (lambda: fz.check_split_sizes((3, 7), 16), "sum to 10.*16"),
        (lambda: fz.check_split_sizes((16, 0), 16), "at least 1"),
        (lambda: fz.check_split_sizes((), 16), "at least 1"),
        (lambda: sample(Factorization(mode="fixed", num_ar_steps=17)), "17.*16 tokens"),
        (lambda: Factorization(mode="fixed", num_ar_steps=0), "num_ar_steps is 0"),
        (lambda: Factorization(mode="decaying"), "'decaying'.*'decayed'"),
        (lambda: Factorization(token_order="rastr"), "'rastr'.*'raster'"),
        (lambda: Factorization(ar_step_decay=0.0), r"ar_step_decay is 0\.0"),
        (lambda: Factorization(ar_step_decay=1.5), r"ar_step_decay is 1\.5"),
        (lambda: Factorization(block_size=0), "block_size is 0"),
        (lambda: Factorization(dilation_stride=0), "dilation_stride is 0"),
        (lambda: fz.token_order("spiral", (2, 2), keys(1)), "token order 'spiral'"),
        (lambda: fz.token_order("dilated", (2, 2), keys(1), dilation_stride=0), "stride is 0"),
        (lambda: fz.token_order("block_raster", (2, 2), keys(1), block_size=-1), "size is -1"),
        (lambda: fz.ar_loss_weights(jnp.zeros(3, int), 2.0, schedule="sine"), "schedule 'sine'"),
    ],
)
def test_refusals(attempt, words):
    with pytest.raises(UserError, match=words):
        attempt()


@pytest.mark.parametrize("schedule", fz.AR_LOSS_WEIGHT_SCHEDULES)
def test_loss_weights_follow_the_start_of_the_ar_step(schedule):
    rng = np.random.default_rng(1)
    splits = [rng.permutation([1, 4, 2, 3]) for _ in range(3)]
    ids = np.stack([fz.ar_step_ids_from_sizes(tuple(sizes)) for sizes in splits])
    weights = fz.ar_loss_weights(jnp.asarray(ids), 3.0, 1.0, schedule)
    for sizes, row in zip(splits, np.asarray(weights), strict=True):
        expected = []
        for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
            fraction = start / 10
            linear, cosine = 3 - 2 * fraction, 2 + np.cos(np.pi * fraction)
            expected += [linear if schedule == "linear" else cosine] * size
        np.testing.assert_allclose(row, expected, rtol=1e-6)  # float32 rounding
