"""Schedules, noise and solvers against the schedulers of diffusers; run by `launch/test.sh --all`."""

import numpy as np
import pytest

from cfjax.diffusion import process
from cfjax.diffusion.schedule import make_noise_schedule, respace
from cfjax.diffusion.solvers import Solver, denoising_step

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

SHAPE = (2, 5, 4)
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"noise": "epsilon", "x_start": "sample", "velocity": "v_prediction"}


def scheduler(cls, schedule, **fields):
    return cls(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=SCHEDULES[schedule],
        **fields,
    )


def normal(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def assert_close(actual, expected):
    # Their ᾱ is a float32 product of 1,000 factors, off by 1e-5; ours is float64. Relative to the
    # largest value: at high noise x_0 is a hundred times the input.
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_noise_and_velocity(schedule):
    theirs, ours = scheduler(diffusers.DDPMScheduler, schedule), make_noise_schedule(schedule)
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-3)
    x_start, noise, t = normal(0), normal(1), np.array([3, 640])
    arguments = (torch.tensor(x_start), torch.tensor(noise), torch.tensor(t))
    assert_close(process.add_noise(ours, x_start, noise, t), theirs.add_noise(*arguments))
    velocity = process.prediction_target(ours, "velocity", x_start, noise, t)
    assert_close(velocity, theirs.get_velocity(*arguments))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "fixed_small_log"])
def test_ddpm(schedule, prediction_type, clip, variance):
    theirs = scheduler(
        diffusers.DDPMScheduler,
        schedule,
        prediction_type=PREDICTION_TYPES[prediction_type],
        variance_type=variance,
        clip_sample=clip,
    )
    ours = respace(make_noise_schedule(schedule), "12")
    theirs.set_timesteps(timesteps=ours.timestep_map[::-1].tolist())
    solver = Solver("ddpm", prediction_type, variance.removesuffix("_log"), clip_x_start=clip)
    x_t = normal(0)
    for index in reversed(range(ours.num_timesteps)):
        prediction = normal(100 + index)
        expected = theirs.step(
            torch.tensor(prediction),
            int(ours.timestep_map[index]),
            torch.tensor(x_t),
            generator=torch.Generator().manual_seed(index),
        )
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)).numpy()
        sample, x_start = denoising_step(solver, ours, x_t, prediction, index, noise)
        assert_close(x_start, expected.pred_original_sample)
        assert_close(sample, expected.prev_sample)
        x_t = np.clip(expected.prev_sample.numpy(), -3, 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(schedule, prediction_type, clip, eta):
    theirs = scheduler(
        diffusers.DDIMScheduler,
        schedule,
        prediction_type=PREDICTION_TYPES[prediction_type],
        clip_sample=clip,
        timestep_spacing="leading",
        set_alpha_to_one=True,
    )
    theirs.set_timesteps(50)
    ours = respace(make_noise_schedule(schedule), "ddim50")
    np.testing.assert_array_equal(ours.timestep_map[::-1], theirs.timesteps.numpy())
    solver = Solver("ddim", prediction_type, eta=eta, clip_x_start=clip)
    x_t = normal(0)
    for index in reversed(range(0, 50, 7)):
        prediction, noise = normal(100 + index), normal(200 + index)
        expected = theirs.step(
            torch.tensor(prediction),
            int(ours.timestep_map[index]),
            torch.tensor(x_t),
            eta=eta,
            # As published (DDIM), ε follows from the clipped x_0.
            use_clipped_model_output=True,
            variance_noise=torch.tensor(noise),
        )
        sample, x_start = denoising_step(solver, ours, x_t, prediction, index, noise)
        assert_close(x_start, expected.pred_original_sample)
        if index:
            assert_close(sample, expected.prev_sample)
        x_t = np.clip(expected.prev_sample.numpy(), -3, 3)
    # The last denoising step ends at x_0 itself, where they would add noise for eta > 0.
    np.testing.assert_allclose(sample, x_start, rtol=1e-6, atol=1e-6)
