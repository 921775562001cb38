"""Buckets of clean length: their exact distribution, the best choice, and what they leave alone."""

import itertools

import jax
import numpy as np
import pytest
import tiny

from cfjax import build, clean_lengths, objective
from cfjax.config_loading import load_config
from cfjax.errors import UserError
from cfjax.factorization import Factorization, num_ar_steps_probabilities, sample_split
from cfjax.rng import stream_key

DECAYED = Factorization()


def test_probabilities_are_those_of_all_cut_points():
    num_tokens, decay = 7, 0.8
    expected = np.zeros(num_tokens)
    for i, p in enumerate(num_ar_steps_probabilities(num_tokens, decay)):
        cuts = list(itertools.combinations(range(1, num_tokens), i))
        for cut in cuts:
            expected[max(cut, default=0)] += p / len(cuts)
    factorization = Factorization(ar_step_decay=decay)
    got = clean_lengths.clean_length_probabilities(factorization, num_tokens)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("factorization", "num_clean"),
    [
        (Factorization("diffusion"), 0),
        (Factorization("ar"), 15),
        (Factorization("fixed", num_ar_steps=3), 11),
    ],
)
def test_modes_with_one_length(factorization, num_clean):
    probabilities = clean_lengths.clean_length_probabilities(factorization, 16)
    assert probabilities[num_clean] == 1.0 and probabilities.sum() == 1.0
    assert clean_lengths.bucket_lengths(probabilities, 6, lambda c: c + 1) == (num_clean,)


def test_buckets_are_the_best_of_all_choices():
    probabilities = clean_lengths.clean_length_probabilities(DECAYED, 32)

    def cost(num_clean):
        return (40 + num_clean) ** 2

    def expected(lengths):
        return clean_lengths.expected_cost(probabilities, lengths, cost)

    choices = itertools.combinations(range(0, 31, 2), 3)
    best = min(expected((*choice, 31)) for choice in choices)
    buckets = clean_lengths.bucket_lengths(probabilities, 4, cost)
    assert len(buckets) == 4 and expected(buckets) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "num_tokens", "limit"),
    [({}, 256, 1.03), ({"data.size": 32}, 1024, 1.04)],
)
def test_expected_flops_near_those_of_dynamic_shapes(overrides, num_tokens, limit):
    """Exact expectation over splits, of the model FLOPs of XL's forward pass."""
    config = load_config(str(tiny.CONFIGS / "imagenet256.py:xl"), overrides)
    buckets = build.clean_length_buckets(config)
    assert len(buckets) <= 6
    probabilities = clean_lengths.clean_length_probabilities(
        build.factorization(config), num_tokens
    )
    expected, dynamic = (
        clean_lengths.expected_cost(
            probabilities, lengths, lambda c: build.training_forward_flops(config, int(c))
        )
        for lengths in (buckets, np.arange(num_tokens))
    )
    assert expected / dynamic <= limit


def test_every_train_step_gets_the_shortest_length_that_suffices():
    lengths, num_tokens, seed = (0, 5, 10, 15), 16, 3
    chosen = clean_lengths.clean_lengths(DECAYED, num_tokens, lengths, seed, first=1000)
    for number in range(1000, 1050):  # over the edge of what is computed at once
        ids = np.asarray(sample_split(DECAYED, stream_key(seed, "split", number), num_tokens))
        needed = np.sum(ids < ids[-1])
        assert next(chosen) == min(length for length in lengths if length >= needed)


@pytest.mark.long
def test_loss_and_gradients_are_those_of_the_full_length():
    config = tiny.config(factorization__mode="decayed")
    model, objective_ = build.model(config), build.objective(config)
    params = tiny.random_params(model)
    tokens = jax.random.normal(jax.random.key(1), (4, model.num_tokens, model.token_width))
    drawn = objective.corrupt(objective_, model, np.arange(4), 0, 5)
    ids = np.asarray(drawn.plan.ar_step_ids)[0]
    needed = int(np.sum(ids < ids[-1]))
    assert 0 < needed < model.num_tokens - 1

    def value_and_grad(num_clean):
        def loss(params):
            return objective.loss(objective_, model, params, tokens, drawn, num_clean).loss

        return jax.value_and_grad(loss)(params)

    full = value_and_grad(None)
    for num_clean in (needed, needed + 1):
        # Sums over keys in another order: rounding of float32.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            value_and_grad(num_clean),
            full,
        )
    short = value_and_grad(needed - 1)
    assert abs(short[0] - full[0]) > 1e-4  # a length that leaves out a seen token does differ


def test_refusals():
    with pytest.raises(UserError, match="clean_length_buckets is 0"):
        clean_lengths.check_num_buckets(DECAYED, 0)
    per_example = Factorization(split_per_example=True)
    clean_lengths.check_num_buckets(per_example, 1)
    with pytest.raises(UserError, match="some example nearly always"):
        clean_lengths.check_num_buckets(per_example, 2)
