"""Schedules, noise and solvers against the schedulers of diffusers; run by `launch/test.sh --all`."""

import jax
import numpy as np
import pytest

from cfjax.diffusion import process, solvers
from cfjax.diffusion.schedule import NoiseSchedule, make_noise_schedule, respace
from cfjax.diffusion.solvers import Solver, step_coefficients

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.oracle

SHAPE = (2, 5, 4)
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"noise": "epsilon", "x_start": "sample", "velocity": "v_prediction"}
NUM_DENOISING_STEPS = [2, 20, *(pytest.param(number, marks=pytest.mark.long) for number in (5, 50))]
# How x_0 is held in range: not at all, clipped, or by its quantile.
RANGES = {"free": {}, "clip": {"clip_x_start": True}, "threshold": {"dynamic_threshold": 0.8}}

denoising_step = jax.jit(solvers.denoising_step, static_argnums=0)


def scheduler(cls, schedule, **fields):
    return cls(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=SCHEDULES[schedule],
        **fields,
    )


def range_fields(held):
    """Their names of the fields in `RANGES`; x_0 is divided by its quantile however large."""
    return {
        "thresholding": held == "threshold",
        "dynamic_thresholding_ratio": 0.8,
        "sample_max_value": 1e9,
    } | ({"clip_sample": held == "clip"})


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


def with_exact_tables(theirs, schedule: NoiseSchedule):
    """Their scheduler with our tables, all float64.

    Theirs are float32, and ᾱ a product of 1,000 of them, so that a comparison closer than 1e-4
    would compare rounding. That the tables agree is tested above; the formulas stay theirs.
    """
    theirs.betas = torch.tensor(schedule.betas)
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
    theirs.one = theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    theirs.alpha_t = theirs.alphas_cumprod.sqrt()
    theirs.sigma_t = (1 - theirs.alphas_cumprod).sqrt()
    theirs.lambda_t = theirs.alpha_t.log() - theirs.sigma_t.log()
    theirs.sigmas = theirs.sigma_t / theirs.alpha_t
    return theirs


def model_output(schedule, prediction_type, index, x_t):
    """A made-up network, in float64: a smooth function of x_t and the noise level."""
    mix = np.random.default_rng(7).normal(size=(SHAPE[-1], SHAPE[-1]))
    x_start = 1.6 * np.tanh(x_t @ mix + index / schedule.num_timesteps)
    signal = schedule.alphas_cumprod[index] ** 0.5
    sigma = (1 - schedule.alphas_cumprod[index]) ** 0.5
    noise = (x_t - signal * x_start) / sigma
    velocity = signal * noise - sigma * x_start
    return {"noise": noise, "x_start": x_start, "velocity": velocity}[prediction_type]


def assert_same_trajectory(solver, schedule, their_step, has_x_start=True):
    """Denoises from the same noise with ours and theirs, each from its own sample.

    Each denoising step adds the same noise and asks the same network. All float64 but for what
    they hold in float32 (see the callers), 6e-8 relative a denoising step: 1e-5 of the largest
    value leaves room for the network to amplify it.
    """
    coefficients = step_coefficients(solver, schedule)
    ours = theirs = normal(0).astype(np.float64)
    x_start = np.zeros_like(ours)
    with jax.enable_x64(True):
        for index in reversed(range(schedule.num_timesteps)):
            prediction, their_prediction = (
                model_output(schedule, solver.prediction_type, index, x) for x in (ours, theirs)
            )
            noise = normal(200 + index).astype(np.float64)
            stepped = their_step(
                torch.tensor(their_prediction), index, torch.tensor(theirs), torch.tensor(noise)
            )
            at_index = jax.tree.map(lambda values, i=index: values[i], coefficients)
            ours, x_start = denoising_step(solver, at_index, ours, prediction, x_start, noise)
            assert ours.dtype == x_start.dtype == np.float64
            ours, x_start, theirs = np.array(ours), np.array(x_start), stepped.prev_sample.numpy()
            pairs = [(ours, theirs)]
            if has_x_start:
                pairs.append((x_start, stepped.pred_original_sample.numpy()))
            for actual, expected in pairs:
                np.testing.assert_allclose(
                    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
                )
    # The compiler may round the two in different ways.
    np.testing.assert_allclose(ours, x_start, rtol=0, atol=1e-14 * np.abs(x_start).max())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_denoising_steps", NUM_DENOISING_STEPS)
@pytest.mark.parametrize("held", RANGES)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "fixed_small_log"])
def test_ddpm(schedule, prediction_type, num_denoising_steps, held, variance, monkeypatch):
    theirs = scheduler(
        diffusers.DDPMScheduler,
        schedule,
        prediction_type=PREDICTION_TYPES[prediction_type],
        variance_type=variance,
        **range_fields(held),
    )
    full = make_noise_schedule(schedule)
    ours = respace(full, num_denoising_steps, "quadratic")
    with_exact_tables(theirs, full).set_timesteps(timesteps=ours.timestep_map[::-1].tolist())

    def their_step(prediction, index, x_t, noise):
        # It draws the noise itself, and takes none.
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise
        )
        return theirs.step(prediction, int(ours.timestep_map[index]), x_t)

    solver = Solver("ddpm", prediction_type, variance.removesuffix("_log"), **RANGES[held])
    assert_same_trajectory(solver, ours, their_step)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_denoising_steps", NUM_DENOISING_STEPS)
@pytest.mark.parametrize("held", RANGES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["ddim", "quadratic"])
def test_ddim(schedule, prediction_type, num_denoising_steps, held, eta, spacing):
    fields = {
        "prediction_type": PREDICTION_TYPES[prediction_type],
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
        **range_fields(held),
    }
    full = make_noise_schedule(schedule)
    if spacing == "ddim":
        theirs = with_exact_tables(scheduler(diffusers.DDIMScheduler, schedule, **fields), full)
        ours = respace(full, f"ddim{num_denoising_steps}")
        their_timesteps = ours.timestep_map
    else:
        # It knows a constant stride alone: the respaced schedule is its schedule of training.
        ours = respace(full, num_denoising_steps, spacing)
        theirs = diffusers.DDIMScheduler(
            num_denoising_steps, trained_betas=ours.betas.tolist(), **fields
        )
        with_exact_tables(theirs, ours)
        their_timesteps = np.arange(num_denoising_steps)
    theirs.set_timesteps(num_denoising_steps)
    np.testing.assert_array_equal(their_timesteps[::-1], theirs.timesteps.numpy())

    def their_step(prediction, index, x_t, noise):
        return theirs.step(
            prediction,
            int(their_timesteps[index]),
            x_t,
            eta=eta,
            # As published (DDIM), ε follows from the clipped x_0.
            use_clipped_model_output=True,
            variance_noise=noise if eta else None,
        )

    solver = Solver("ddim", prediction_type, eta=eta, **RANGES[held])
    assert_same_trajectory(solver, ours, their_step)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_denoising_steps", NUM_DENOISING_STEPS)
@pytest.mark.parametrize("held", ["free", "threshold"])
@pytest.mark.parametrize("spacing", ["linear", "karras"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
# They make NumPy arrays of torch tensors.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpm_solver(schedule, prediction_type, num_denoising_steps, held, spacing, name):
    """They hold x_t and the noise in float32 within a denoising step, and never clip."""
    fields = range_fields(held)
    del fields["clip_sample"]
    theirs = scheduler(
        diffusers.DPMSolverMultistepScheduler,
        schedule,
        prediction_type=PREDICTION_TYPES[prediction_type],
        algorithm_type={"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}[name],
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        use_karras_sigmas=False,
        **fields,
    )
    full = make_noise_schedule(schedule)
    ours = respace(full, num_denoising_steps, spacing)
    theirs.set_timesteps(timesteps=ours.timestep_map[::-1].tolist())
    with_exact_tables(theirs, full)
    # Of the denoising steps, and 0 after the last.
    theirs.sigmas = torch.tensor(np.append(ours.snr[::-1] ** -0.5, 0.0))

    def their_step(prediction, index, x_t, noise):
        return theirs.step(prediction, int(ours.timestep_map[index]), x_t, variance_noise=noise)

    solver = Solver(name, prediction_type, **RANGES[held])
    assert_same_trajectory(solver, ours, their_step, has_x_start=False)
