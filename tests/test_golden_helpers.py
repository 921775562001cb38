"""Masks, AR loss weights, splits, position and timestep tables, schedules: as published."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import constructor, load, params, published_params

from cfjax import factorization as fz
from cfjax.diffusion.process import at
from cfjax.diffusion.schedule import make_noise_schedule, respace
from cfjax.models.layers import sincos_positions, timestep_features

HELPERS = load("helpers")
RESPACINGS = sorted({key.split("/")[1] for key in load("schedules")})
# The published names of what our schedule calls otherwise or leaves to its users.
SCHEDULE_VALUES = {
    "betas": lambda s: s.betas,
    "alphas_cumprod": lambda s: s.alphas_cumprod,
    "sqrt_alphas_cumprod": lambda s: np.sqrt(s.alphas_cumprod),
    "sqrt_one_minus_alphas_cumprod": lambda s: np.sqrt(1 - s.alphas_cumprod),
    "sqrt_recip_alphas_cumprod": lambda s: np.sqrt(1 / s.alphas_cumprod),
    "sqrt_recipm1_alphas_cumprod": lambda s: np.sqrt(1 / s.alphas_cumprod - 1),
    "posterior_variance": lambda s: s.posterior_variance,
    "posterior_log_variance_clipped": lambda s: s.posterior_log_variance_clipped,
    "posterior_mean_coef1": lambda s: s.posterior_mean_coef1,
    "posterior_mean_coef2": lambda s: s.posterior_mean_coef2,
}


def indices(prefix):
    return sorted({key.split("/")[1] for key in HELPERS if key.startswith(prefix + "/")})


def our_mask(num_tokens, condition_length, split_sizes, num_clean):
    ids = fz.ar_step_ids_from_sizes(fz.check_split_sizes(split_sizes, num_tokens))
    kinds = np.repeat(
        [fz.CONDITION, fz.CLEAN, fz.NOISED], [condition_length, num_clean, num_tokens]
    )
    ids = np.concatenate([np.zeros(condition_length, np.int32), ids[:num_clean], ids])
    terms = fz.mask_terms(jnp.asarray(kinds), jnp.asarray(ids), num_tokens)
    return np.asarray(fz.generalized_causal_mask(terms, terms))


@pytest.mark.parametrize("index", indices("mask"))
def test_masks(index):
    golden = {name: HELPERS[f"mask/{index}/{name}"] for name in ("sample_len", "cond_len", "mask")}
    sizes = HELPERS[f"mask/{index}/split_sizes"]
    num_tokens, num_clean = int(golden["sample_len"]), int(golden["sample_len"] - sizes[-1])
    mask = our_mask(num_tokens, int(golden["cond_len"]), sizes, num_clean)
    np.testing.assert_array_equal(mask, ~golden["mask"][0, 0])


@pytest.mark.parametrize("model", ["A", "B"])
@pytest.mark.parametrize("split", ["diffusion", "ar", "irregular"])
def test_masks_and_loss_weights_of_training(model, split):
    golden = load(f"model{model}_train_{split}")
    sizes, num_tokens = golden["split_sizes"], int(golden["cumsum"][-1])
    num_clean = num_tokens - int(golden["last_split_size"])
    mask = our_mask(num_tokens, constructor(model)["num_cond_tokens"], sizes, num_clean)
    np.testing.assert_array_equal(mask, ~golden["attn_mask"][0, 0])
    weights = fz.ar_loss_weights(jnp.asarray(fz.ar_step_ids_from_sizes(sizes)), 2.0)
    np.testing.assert_allclose(weights, golden["ar_weights"], rtol=1e-6)  # float32 rounding


@pytest.mark.parametrize("index", indices("arw"))
def test_ar_loss_weights(index):
    sizes = HELPERS[f"arw/{index}/split_sizes"]
    max_weight, min_weight = HELPERS[f"arw/{index}/max_min"].tolist()
    schedule, expected = str(HELPERS[f"arw/{index}/schedule"]), HELPERS[f"arw/{index}/weights"]
    ids = jnp.asarray(fz.ar_step_ids_from_sizes(sizes))
    weights = fz.ar_loss_weights(ids, max_weight, min_weight, schedule)
    # Without weighting (max = min) the published code returns a scalar.
    expected = np.broadcast_to(expected, (sizes.sum(),))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize("index", indices("split"))
def test_split_probabilities(index):
    num_tokens, decay = int(HELPERS[f"split/{index}/S"]), float(HELPERS[f"split/{index}/decay"])
    # The decay is stored as float32; the published draw used its short decimal.
    probabilities = fz.num_ar_steps_probabilities(num_tokens, round(decay, 6))
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities, HELPERS[f"f64/split/{index}/p"], rtol=1e-12)


@pytest.mark.parametrize(("width", "side"), [(64, 8), (48, 4)])
def test_sincos_positions(width, side):
    table = sincos_positions(width, (side, side))
    # Float64 sines of angles that were rounded in another order.
    np.testing.assert_allclose(
        table, HELPERS[f"f64/sincos/dim{width}_grid{side}"], rtol=0, atol=1e-12
    )


def test_frozen_positions_of_a_published_model():
    assert "token_positions" not in params("B")
    table = sincos_positions(constructor("B")["hidden_size"], (4, 4))
    np.testing.assert_allclose(published_params("B")["pos_embed"][0], table, rtol=0, atol=1e-7)


@pytest.mark.parametrize("width", [256, 7])
def test_timestep_features(width):
    features = timestep_features(jnp.asarray(HELPERS["temb/t"]), width)
    assert features.dtype == jnp.float32
    # The published angles are float32 too: off by up to 4e-5 near t = 999.
    np.testing.assert_allclose(features, HELPERS[f"temb/dim{width}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("address", RESPACINGS)
def test_noise_schedules(address):
    golden = load("schedules")
    num_timesteps, respacing = address.split("_")
    schedule = make_noise_schedule("linear", int(num_timesteps))
    if respacing != "full":
        schedule = respace(schedule, respacing)
    np.testing.assert_array_equal(schedule.timestep_map, golden[f"f64/{address}/timestep_map"])
    compared = {"timestep_map"}
    for name, value in SCHEDULE_VALUES.items():
        # Float64 rounding, amplified where 1 - ᾱ cancels.
        np.testing.assert_allclose(
            value(schedule), golden[f"f64/{address}/{name}"], rtol=1e-9, atol=1e-15, err_msg=name
        )
        compared.add(name)
    variance = np.asarray(at(schedule.fixed_large_variance, jnp.arange(schedule.num_timesteps), 1))
    names = ("model_variance_fixed_large", "model_log_variance_fixed_large")
    for name, value in zip(names, (variance, np.log(variance)), strict=True):
        np.testing.assert_allclose(value, golden[f"f32/{address}/{name}"], rtol=1e-6)
        compared.add(name)
    assert compared == {key.split("/")[2] for key in golden if key.split("/")[1] == address}
