"""The loss of the autoencoder against scipy and formulas written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoders import random_params
from scipy import integrate, stats

from cfjax import autoencoder_objective
from cfjax.autoencoder_objective import AutoencoderObjective
from cfjax.errors import UserError
from cfjax.models.autoencoder_kl import AutoencoderKL, Moments
from cfjax.models.lpips import Lpips
from cfjax.rng import per_example_keys

MODULE = AutoencoderKL(
    channels=4,
    channel_multipliers=(1, 2),
    latent_channels=3,
    scale=1.0,
    num_res_blocks=1,
    num_groups=2,
)


def random_moments(shape):
    rng = np.random.default_rng(0)
    logvar = rng.normal(0, 1, shape).astype(np.float32)
    return Moments(rng.normal(0, 2, shape).astype(np.float32), logvar)


def kl_of_one(mean, std):
    """The integral of q log(q / p) over ten standard deviations."""

    def term(z):
        log_q, log_p = stats.norm.logpdf(z, mean, std), stats.norm.logpdf(z)
        return np.exp(log_q) * (log_q - log_p)

    return integrate.quad(term, mean - 10 * std, mean + 10 * std)[0]


def test_kl_is_the_integral_summed_over_the_latents_of_an_image():
    moments = random_moments((2, 2, 1, 3))
    std = np.exp(0.5 * moments.logvar.astype(np.float64))
    expected = [
        sum(map(kl_of_one, mean.ravel(), std.ravel()))
        for mean, std in zip(moments.mean, std, strict=True)
    ]
    # float32 sums of a dozen terms.
    np.testing.assert_allclose(autoencoder_objective.kl_divergence(moments), expected, rtol=1e-5)


def test_kl_to_itself_is_zero():
    zeros = jnp.zeros((1, 2, 2, 3))
    np.testing.assert_array_equal(autoencoder_objective.kl_divergence(Moments(zeros, zeros)), [0])


def test_psnr_is_of_clipped_floats_with_a_range_of_two():
    images = np.zeros((4, 4, 4, 1), np.float32)
    decoded = np.stack([np.full((4, 4, 1), value, np.float32) for value in (0.2, -1, 3, 0)])
    # Squared errors 0.04, 1, 1 (3 is clipped to 1), and 0, which counts as 1e-10.
    expected = 10 * np.log10(4 / np.array([0.04, 1, 1, 1e-10]))
    np.testing.assert_allclose(autoencoder_objective.psnr(decoded, images), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def case():
    params = random_params(MODULE)
    images = np.random.default_rng(1).uniform(-1, 1, (4, 6, 4, 3)).astype(np.float32)
    keys = per_example_keys(jax.random.key(2), jnp.arange(4))
    return params, images, keys


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_loss_is_what_its_page_says(reconstruction, case):
    params, images, keys = case
    objective = AutoencoderObjective(reconstruction=reconstruction, kl_weight=0.3)
    loss, totals = autoencoder_objective.loss(objective, MODULE, params, images, keys)

    variables = {"params": params}
    moments = MODULE.apply(variables, images, method="encode")
    noise = np.stack([jax.random.normal(key, moments.mean.shape[1:]) for key in keys])
    mean, logvar = (np.asarray(array, np.float64) for array in moments)
    latents = (mean + np.exp(0.5 * logvar) * noise).astype(np.float32)
    decoded = np.asarray(MODULE.apply(variables, latents, method="decode"), np.float64)
    error = decoded - images
    distance = np.abs(error) if reconstruction == "l1" else error**2
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2, 3)) / (6 * 4 * 3)
    squared = ((np.clip(decoded, -1, 1) - images) ** 2).mean((1, 2, 3))
    expected = {
        "reconstruction": distance.mean((1, 2, 3)).sum(),
        "kl": kl.sum(),
        "psnr": (10 * np.log10(4 / squared)).sum(),
    }
    assert set(totals) == set(expected)
    for name, value in expected.items():
        assert totals[name][1] == 4
        # A float32 network, once on float32 latents that were rounded elsewhere.
        np.testing.assert_allclose(totals[name][0], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, distance.mean() + 0.3 * kl.mean(), rtol=1e-4)


def test_a_perceptual_loss_is_added(case, monkeypatch):
    params, images, keys = case
    small = functools.partial(Lpips, stages=((2, 3), (4,)))
    monkeypatch.setattr(autoencoder_objective, "Lpips", small)
    lpips_params = small().init(jax.random.key(1), images, images)["params"]
    lpips_params = jax.tree.map(lambda leaf: jnp.abs(leaf), lpips_params)
    without, _ = autoencoder_objective.loss(AutoencoderObjective(), MODULE, params, images, keys)
    objective = AutoencoderObjective(perceptual_weight=0.7)
    loss, totals = autoencoder_objective.loss(objective, MODULE, params, images, keys, lpips_params)
    distance, count = totals["perceptual"]
    assert distance > 1e-3 and count == 4
    np.testing.assert_allclose(loss, without + 0.7 * distance / 4, rtol=1e-5)


def test_an_image_draws_the_same_latents_in_any_batch(case):
    _, _, keys = case
    moments = random_moments((4, 3, 2, 3))
    drawn = autoencoder_objective.sample_each(moments, keys)
    halves = [
        autoencoder_objective.sample_each(Moments(*(x[part] for x in moments)), keys[part])
        for part in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_array_equal(drawn, np.concatenate(halves))
    assert len(np.unique((drawn - moments.mean) / np.exp(0.5 * moments.logvar))) > 60


def test_refusals():
    with pytest.raises(UserError, match=r"unknown loss.reconstruction 'l3'; did you mean"):
        AutoencoderObjective(reconstruction="l3")
    with pytest.raises(UserError, match=r"loss.kl_weight is -1.0, but must be at least 0"):
        AutoencoderObjective(kl_weight=-1.0)
