"""Editing: masks over pixels and tokens, what is kept, what is generated anew."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cfjax import build, editing, sampling
from cfjax.errors import UserError
from cfjax.guided_network import Network, guided_prediction, prefill, push_clean_tokens
from cfjax.rng import per_example_keys

L, GRID, SIZE = 16, (4, 4), (28, 28)


def tokens_of(rows):
    return np.array([[cell == "#" for cell in row] for row in rows]).reshape(-1)


@pytest.mark.parametrize(
    ("keep", "box", "expected"),
    [
        ("center", (), ["....", ".##.", ".##.", "...."]),
        ("outside", (), ["####", "#..#", "#..#", "####"]),
        ("top", (), ["####", "####", "....", "...."]),
        ("bottom", (), ["....", "....", "####", "####"]),
        ("left", (), ["##..", "##..", "##..", "##.."]),
        ("right", (), ["..##", "..##", "..##", "..##"]),
        ("box", (7, 0, 14, 21), ["....", "###.", "....", "...."]),
        ("box", (1, 0, 14, 20), ["....", "##..", "....", "...."]),  # tokens that are whole in it
    ],
)
def test_masks(keep, box, expected):
    pixels = editing.kept_pixels(keep, SIZE, box)
    assert pixels.shape == SIZE
    kept = editing.kept_tokens(pixels, SIZE, GRID)
    np.testing.assert_array_equal(kept, tokens_of(expected))
    generated = editing.generated_pixels(kept, SIZE, GRID)
    np.testing.assert_array_equal(generated[::7, ::7].reshape(-1), ~kept)
    assert not (generated & pixels).any() or box == (1, 0, 14, 20)


def test_random_masks_are_nested_and_differ():
    keys = per_example_keys(jax.random.key(0), jnp.arange(5))
    masks = [editing.random_tokens(keys, ratio, GRID) for ratio in (0.0, 0.25, 0.5, 1.0)]
    for mask, count in zip(masks, (0, 4, 8, 16), strict=True):
        assert (mask.sum(axis=1) == count).all()
    for fewer, more in itertools.pairwise(masks):
        assert not (fewer & ~more).any()
    assert len({row.tobytes() for row in masks[2]}) > 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: editing.kept_pixels("middle", SIZE), "unknown mask 'middle'"),
        (lambda: editing.kept_pixels("box", SIZE), r"the box \[\] must be four numbers"),
        (lambda: editing.kept_pixels("box", SIZE, (0, 0, 29, 5)), "is not in the image of 28 x 28"),
        (lambda: editing.kept_pixels("box", SIZE, (5, 0, 5, 5)), "is not in the image"),
        (lambda: editing.kept_pixels("top", SIZE, (0, 0, 1, 1)), "is for the mask 'box'"),
        (
            lambda: editing.kept_tokens(np.ones((14, 28), bool), SIZE, GRID),
            r"mask is bool \[14, 28\], but must be bool of the image's \[28, 28\] pixels",
        ),
        (lambda: editing.kept_tokens(np.ones(SIZE), SIZE, GRID), "the mask is float64"),
        (lambda: editing.random_tokens(None, 1.5, GRID), "keep_ratio is 1.5"),
    ],
)
def test_bad_masks_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.fixture(scope="module")
def network():
    model = build.sampling_model(tiny.config())
    return model, jax.tree.map(jnp.asarray, tiny.random_params(model))


def generate(network, split_sizes=(), known=None, num_known=0, seed=0, kept_as="clean", **fields):
    settings = build.sampling_settings(
        tiny.config(**{f"sampling__{name}": it for name, it in fields.items()}),
        split_sizes,
        num_known,
    )
    settings = dataclasses.replace(settings, kept_as=kept_as)
    keys = per_example_keys(jax.random.key(seed), jnp.arange(2))
    return sampling.generate(*network, settings, jnp.array([3, 5]), keys, known=known)


def known_of(mask, seed=1):
    tokens = np.random.default_rng(seed).normal(size=(2, L, 49)).astype(np.float32)
    return sampling.Known(tokens, np.broadcast_to(mask, (2, L)))


@pytest.mark.parametrize(
    ("split_sizes", "kept_as"),
    [
        *(((8,), "clean"), ((1, 3, 4), "clean"), ((1,) * 8, "clean"), ((1, 3, 1, 3), "clean")),
        *(((8,), "noised"), ((1, 3, 4), "noised"), ((1,) * 8, "noised")),
    ],
)
def test_kept_tokens_come_back_to_the_bit(network, split_sizes, kept_as):
    known = known_of(tokens_of(["##..", "##..", "##..", "##.."]))
    tokens = np.asarray(generate(network, split_sizes, known, 8, kept_as=kept_as))
    np.testing.assert_array_equal(tokens[known.is_known], known.tokens[known.is_known])
    assert np.isfinite(tokens).all()
    assert (tokens[~known.is_known] != known.tokens[~known.is_known]).all()


def test_what_is_generated_depends_on_what_is_kept_alone(network):
    mask = tokens_of(["####", "####", "....", "...."])
    tokens = [np.asarray(generate(network, (4, 4), known_of(mask, seed), 8)) for seed in (1, 2)]
    assert (np.abs(tokens[0] - tokens[1])[:, ~mask].mean()) > 1e-3  # context counts
    known = known_of(mask)
    other = known._replace(tokens=np.where(mask[:, None], known.tokens, 7.0))
    np.testing.assert_array_equal(generate(network, (4, 4), other, 8), tokens[0])


def test_a_full_and_an_empty_mask(network):
    full = known_of(np.ones(L, bool))
    np.testing.assert_array_equal(generate(network, (), full, L), full.tokens)
    np.testing.assert_array_equal(generate(network, (), full, L, kept_as="noised"), full.tokens)
    empty = known_of(np.zeros(L, bool))
    for kept_as, fields in (
        ("clean", {"num_ar_steps": 4}),
        ("clean", {"num_ar_steps": 1}),
        ("clean", {"denoising_steps": "5:2"}),
        ("noised", {"num_ar_steps": 1}),
    ):
        np.testing.assert_array_equal(
            generate(network, (), empty, 0, kept_as=kept_as, **fields), generate(network, **fields)
        )


def test_noised_tokens_are_seen_as_those_of_a_whole_image(network):
    """Each prediction is that for all tokens at its timestep, of which the known ones are dropped.

    The AR steps differ in denoising steps. Tolerance: rounding in sums of another order.
    """
    whole = Network(*network)
    known, labels = known_of(tokens_of(["####", "##..", "....", "...."])), jnp.array([3, 5])
    config = tiny.config(
        sampling__denoising_steps="2/3", sampling__guidance_scale=3.0, sampling__clip_x_start=False
    )
    settings = build.sampling_settings(config, (4, 6), 6)
    settings = dataclasses.replace(settings, kept_as="noised")
    random = np.random.default_rng(0)
    order = random.permuted(np.tile(np.arange(L), (2, 1)), axis=1)
    start_noise = random.normal(size=(2, L, 49)).astype(np.float32)

    @jax.jit
    def generated(order, start_noise):
        def noise_at(size):
            return lambda ar_step, index: jnp.zeros((2, size, 49))

        return sampling.generate_from_noise(
            whole, settings, labels, order, start_noise, noise_at, known=known, record=True
        )

    @jax.jit
    def prediction(clean, clean_indices, x_t, t, indices):
        caches = prefill(whole, None, labels, L, True)
        if clean.shape[1]:
            caches = push_clean_tokens(whole, None, caches, clean, clean_indices)
        return guided_prediction(whole, None, caches, x_t, t, indices, 3.0)

    tokens, trajectory = jax.device_get(generated(jnp.asarray(order), jnp.asarray(start_noise)))
    order, rows = trajectory.token_order, np.arange(2)[:, None]
    kept = order[:, :6]
    assert known.is_known[rows, kept].all()
    for ar_step, (begin, size) in enumerate(((6, 4), (10, 6))):
        schedule, indices = settings.schedules[ar_step], order[:, begin : begin + size]
        x_t = start_noise[rows, indices]
        for step, x_start in enumerate(trajectory.x_start[ar_step]):
            i = schedule.num_timesteps - 1 - step
            signal_rate, noise_rate = np.sqrt(
                [schedule.alphas_cumprod[i], 1 - schedule.alphas_cumprod[i]]
            )
            noised = signal_rate * known.tokens[rows, kept] + noise_rate * start_noise[rows, kept]
            expected = prediction(
                tokens[rows, order[:, 6:begin]],
                order[:, 6:begin],
                np.concatenate([x_t, noised], axis=1).astype(np.float32),
                schedule.timestep_map[i],
                np.concatenate([indices, kept], axis=1),
            )
            np.testing.assert_allclose(x_start, expected[:, :size], atol=1e-4)
            x_t = trajectory.x_t[ar_step][step]


def test_noised_tokens_are_not_seen_as_clean_ones(network):
    known = known_of(tokens_of(["####", "####", "....", "...."]))
    clean, noised = (
        np.asarray(generate(network, (4, 4), known, 8, kept_as=kept_as))
        for kept_as in sampling.KEPT_AS
    )
    assert np.abs(clean - noised)[~known.is_known].mean() > 1e-3
    with pytest.raises(UserError, match="unknown kept_as 'blurred'"):
        generate(network, (4, 4), known, 8, kept_as="blurred")


def test_masks_may_differ_from_image_to_image(network):
    keys = per_example_keys(jax.random.key(3), jnp.arange(2))
    is_known = editing.random_tokens(keys, 0.5, GRID)
    known = known_of(np.ones(L, bool))._replace(is_known=is_known)
    tokens = np.asarray(generate(network, (4, 4), known, 8))
    np.testing.assert_array_equal(tokens[is_known], known.tokens[is_known])


def test_the_order_of_what_is_left_stays():
    order = jnp.array([[3, 1, 0, 2], [0, 1, 2, 3]])
    is_known = jnp.array([[True, False, False, True], [False, False, True, False]])
    expected = [[3, 0, 1, 2], [2, 0, 1, 3]]
    np.testing.assert_array_equal(sampling.known_first(order, is_known), expected)


def test_unknown_tokens_that_nobody_generates_are_refused(network):
    with pytest.raises(UserError, match="sum to 8, but must sum to the 16 tokens"):
        generate(network, (8,), None, 8)
