"""The noise axis: schedules, respacing, conversions, posterior, solvers, loss weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.diffusion import process, solvers
from cfjax.diffusion.schedule import make_noise_schedule, respace, respaced_timesteps
from cfjax.diffusion.solvers import Solver, step_coefficients
from cfjax.diffusion.weighting import LOSS_WEIGHTINGS, loss_weight_table
from cfjax.errors import UserError

LINEAR, COSINE = make_noise_schedule("linear"), make_noise_schedule("cosine")


def normal(seed, shape=(4, 6, 3)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def denoising_step(solver, schedule, index, x_t, prediction, noise=None):
    """A denoising step of a solver that reads no x_0 predicted before."""
    at_index = jax.tree.map(lambda values: values[index], step_coefficients(solver, schedule))
    return solvers.denoising_step(solver, at_index, x_t, prediction, x_t, noise)


def test_linear_schedule():
    np.testing.assert_allclose(LINEAR.betas[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(np.diff(LINEAR.betas), (0.02 - 1e-4) / 999, rtol=1e-9)
    np.testing.assert_array_equal(LINEAR.timestep_map, np.arange(1000))
    # Fewer timesteps add as much noise in all.
    coarse = make_noise_schedule("linear", 100)
    np.testing.assert_allclose(coarse.betas[[0, -1]], [1e-3, 0.2], rtol=1e-12)
    # log ᾱ_T is -sum(beta + beta²/2 + ...), of which the first term is the same.
    np.testing.assert_allclose(coarse.betas.sum(), LINEAR.betas.sum(), rtol=1e-9)


def test_cosine_schedule():
    def signal(u):
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    t = np.arange(1000)
    expected = signal((t + 1) / 1000) / signal(0)
    # Up to the last timesteps, whose betas are capped.
    np.testing.assert_allclose(COSINE.alphas_cumprod[:990], expected[:990], rtol=1e-9)
    assert COSINE.betas.max() == 0.999 and (COSINE.betas > 0).all()
    assert (np.diff(COSINE.alphas_cumprod) < 0).all() and COSINE.alphas_cumprod[-1] > 0


@pytest.mark.parametrize(
    ("respacing", "expected"),
    [
        ("1", [0]),
        ("2", [0, 99]),
        ("4", [0, 33, 66, 99]),
        # 99 / 2 = 49.5 is rounded half to even.
        ("3", [0, 50, 99]),
        ("100", list(range(100))),
        ("ddim5", [0, 20, 40, 60, 80]),
        ("ddim100", list(range(100))),
        ("ddim1", [0]),
        # Sections of 34, 33 and 33 timesteps.
        ("2,1,3", [0, 33, 34, 67, 83, 99]),
    ],
)
def test_respaced_timesteps(respacing, expected):
    assert respaced_timesteps(100, respacing) == expected


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
@pytest.mark.parametrize("respacing", ["25", 25, "ddim50", "10,15,20", "1"])
def test_respacing_keeps_the_noise_levels(schedule, respacing):
    respaced = respace(schedule, respacing)
    np.testing.assert_allclose(
        respaced.alphas_cumprod, schedule.alphas_cumprod[respaced.timestep_map], rtol=1e-9
    )
    # The map leads to training timesteps even from a respaced schedule.
    if respaced.num_timesteps >= 5:
        twice = respace(respaced, "5")
        assert set(twice.timestep_map) <= set(respaced.timestep_map)
        np.testing.assert_allclose(
            twice.alphas_cumprod, schedule.alphas_cumprod[twice.timestep_map], rtol=1e-9
        )


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: make_noise_schedule("linaer"), "noise schedule 'linaer'.*'linear'"),
        (lambda: make_noise_schedule("linear", 0), "num_timesteps is 0"),
        (lambda: make_noise_schedule("linear", 20), "num_timesteps is 20.*more than 20"),
        (lambda: respace(LINEAR, "many"), "'many' is not understood"),
        (lambda: respace(LINEAR, ""), "'' is not understood"),
        (lambda: respace(LINEAR, "10,,20"), "'10,,20' is not understood"),
        (lambda: respace(LINEAR, "-5"), "'-5' is not understood"),
        (lambda: respace(LINEAR, 0), "'0' is not understood"),
        (lambda: respace(LINEAR, "ddim"), "'ddim' is not understood"),
        (lambda: respace(LINEAR, "ddim0"), "'ddim0' is not understood"),
        (lambda: respace(LINEAR, "ddim300"), "'ddim300'.*no integer stride.*'300'"),
        (lambda: respace(LINEAR, "ddim2000"), "'ddim2000'.*at most 1000"),
        (lambda: respace(LINEAR, "1001"), "'1001' asks for 1001 of 1000.*at most 1000"),
        (lambda: respace(LINEAR, "10,600"), "'10,600' asks for 600 of 500"),
        (lambda: Solver(name="dpm"), "solver 'dpm'"),
        (lambda: Solver(variance="learned"), "variance 'learned'"),
        (lambda: Solver(prediction_type="epsilon"), "prediction type 'epsilon'"),
        (lambda: Solver(name="ddim", eta=1.5), r"eta is 1\.5"),
        (lambda: loss_weight_table(LINEAR, "minsnr", "noise", 5), "'minsnr'.*'min_snr'"),
    ],
)
def test_refusals(attempt, words):
    with pytest.raises(UserError, match=words):
        attempt()


def test_equal_schedules_are_one_static_argument():
    traces = []

    def scale(schedule, x):
        traces.append(schedule)
        return x * process.at(schedule.betas, 3, x.ndim)

    scale = jax.jit(scale, static_argnums=0)
    for schedule in (LINEAR, make_noise_schedule("linear"), COSINE, respace(LINEAR, 1000)):
        scale(schedule, jnp.ones(2))
    # The respaced betas differ from those of LINEAR by rounding.
    assert len(traces) == 3
    assert make_noise_schedule("linear") == LINEAR != COSINE


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
@pytest.mark.parametrize("prediction_type", process.PREDICTION_TYPES)
def test_conversions_round_trip(schedule, prediction_type):
    x_start, noise = normal(0), normal(1)
    t = np.array([[0], [200], [500], [700]])
    x_t = process.add_noise(schedule, x_start, noise, t)
    prediction = process.prediction_target(schedule, prediction_type, x_start, noise, t)
    recovered = process.predicted_x_start(schedule, prediction_type, x_t, prediction, t)
    # Float32 rounding is divided by the scale of the signal, at least 0.17 here.
    np.testing.assert_allclose(recovered, x_start, rtol=0, atol=1e-5)
    # ... or by the scale of the noise, 0.006 at the least (cosine at t = 0).
    recovered = process.predicted_noise(schedule, x_t, recovered, t)
    np.testing.assert_allclose(recovered, noise, rtol=0, atol=2e-4)


def test_conversions_against_their_definitions():
    x_start, noise = normal(0).astype(np.float64), normal(1).astype(np.float64)
    t = np.array([7, 300, 640, 999])
    signal = LINEAR.alphas_cumprod[t][:, None, None] ** 0.5
    sigma = (1 - LINEAR.alphas_cumprod[t][:, None, None]) ** 0.5
    x_t = signal * x_start + sigma * noise
    inputs = (np.float32(x_start), np.float32(noise), t)
    np.testing.assert_allclose(process.add_noise(LINEAR, *inputs), x_t, rtol=0, atol=1e-6)
    velocity = process.prediction_target(LINEAR, "velocity", *inputs)
    np.testing.assert_allclose(velocity, signal * noise - sigma * x_start, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(process.prediction_target(LINEAR, "noise", *inputs), inputs[1])
    np.testing.assert_array_equal(process.prediction_target(LINEAR, "x_start", *inputs), inputs[0])


def test_an_example_an_ar_step_or_a_token_may_have_its_own_timestep():
    x_start, noise = normal(0), normal(1)
    t = np.random.default_rng(2).integers(0, 1000, (4, 6))
    by_token = process.add_noise(LINEAR, x_start, noise, t)
    for example, token in np.ndindex(4, 6):
        alone = process.add_noise(
            LINEAR, x_start[example, token], noise[example, token], t[example, token]
        )
        np.testing.assert_allclose(by_token[example, token], alone, rtol=1e-6)
    # Several noised copies of one clean image.
    copies = process.add_noise(LINEAR, x_start[:, None], normal(1, (4, 2, 6, 3)), t[:, None, :1])
    assert copies.shape == (4, 2, 6, 3)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, respace(LINEAR, "20")])
def test_posterior_follows_from_bayes(schedule):
    """Product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}), two Gaussians in x_{t-1}."""
    n = schedule.num_timesteps
    for t in (1, n // 2, n - 1):
        beta, previous = schedule.betas[t], schedule.alphas_cumprod[t - 1]
        x_start, x_t = normal(0, (5,)).astype(np.float64), normal(1, (5,)).astype(np.float64)
        precision = 1 / (1 - previous) + (1 - beta) / beta
        mean = np.sqrt(previous) * x_start / (1 - previous) + np.sqrt(1 - beta) * x_t / beta
        np.testing.assert_allclose(schedule.posterior_variance[t], 1 / precision, rtol=1e-9)
        ours = process.posterior_mean(schedule, np.float32(x_start), np.float32(x_t), t)
        np.testing.assert_allclose(ours, mean / precision, rtol=0, atol=2e-6)


def test_variances_at_index_0():
    assert LINEAR.posterior_variance[0] == 0
    assert LINEAR.fixed_large_variance[0] == LINEAR.posterior_variance[1]
    np.testing.assert_allclose(
        LINEAR.posterior_log_variance_clipped[:2], np.log(LINEAR.posterior_variance[1])
    )


@pytest.mark.parametrize("variance", solvers.VARIANCES)
@pytest.mark.parametrize("prediction_type", process.PREDICTION_TYPES)
def test_ddpm_step(variance, prediction_type):
    schedule, solver = respace(COSINE, "10"), Solver("ddpm", prediction_type, variance)
    x_t, prediction, noise = normal(0), normal(1), normal(2)
    step = jax.jit(denoising_step, static_argnums=(0, 1, 2))
    for index in (9, 4, 1, 0):
        sample, x_start = step(solver, schedule, index, x_t, prediction, noise)
        expected = process.predicted_x_start(schedule, prediction_type, x_t, prediction, index)
        np.testing.assert_allclose(x_start, expected, rtol=1e-5, atol=1e-5)
        mean = process.posterior_mean(schedule, expected, x_t, index)
        deviation = 0.0
        if index:
            large = variance == "fixed_large"
            values = schedule.betas if large else schedule.posterior_variance
            deviation = np.sqrt(values[index])
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(sample, mean + deviation * noise, atol=1e-5 * scale)


def test_ddim_step():
    schedule = respace(LINEAR, "10")
    x_start, noise = normal(0), normal(1)
    for index in (9, 5, 0):
        x_t = process.add_noise(schedule, x_start, noise, index)
        sample, predicted = denoising_step(Solver("ddim"), schedule, index, x_t, noise)
        # Given the true noise, the deterministic step stays on the straight line to x_0.
        expected = process.add_noise(schedule, x_start, noise, index - 1) if index else x_start
        np.testing.assert_allclose(sample, expected, rtol=0, atol=2e-4)
        # Rounding is divided by the scale of the signal, 0.006 at the noisiest timestep.
        np.testing.assert_allclose(predicted, x_start, rtol=0, atol=2e-4)


def test_ddim_with_all_the_noise_has_the_posterior_of_ddpm():
    schedule = respace(LINEAR, "10")
    x_t, prediction, noise = normal(0), normal(1), normal(2)
    for index in (8, 3, 1):
        ancestral = Solver("ddpm", "x_start", "fixed_small")
        stochastic = Solver("ddim", "x_start", eta=1.0)
        steps = [
            denoising_step(solver, schedule, index, x_t, prediction, noise)[0]
            for solver in (ancestral, stochastic)
        ]
        np.testing.assert_allclose(*steps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_clipping_holds_the_predicted_pixels_in_range(name):
    x_t, prediction = 3 * normal(0), normal(1)
    outputs = [
        denoising_step(Solver(name, clip_x_start=clip), LINEAR, 500, x_t, prediction, x_t)
        for clip in (False, True)
    ]
    (sample, x_start), (clipped_sample, clipped) = outputs
    assert np.abs(x_start).max() > 1
    np.testing.assert_array_equal(clipped, np.clip(x_start, -1, 1))
    assert not np.allclose(sample, clipped_sample)
    # A clipped x_0 is what the sample follows from.
    again = Solver(name, "x_start")
    np.testing.assert_allclose(
        denoising_step(again, LINEAR, 500, x_t, clipped, x_t)[0],
        clipped_sample,
        rtol=0,
        atol=1e-6,
    )


def test_which_solvers_need_noise():
    assert Solver("ddpm").needs_noise and Solver("ddim", eta=0.5).needs_noise
    assert not Solver("ddim").needs_noise


@pytest.mark.parametrize("respacing", ["1", "2"])
@pytest.mark.parametrize("solver", [Solver("ddpm"), Solver("ddpm", variance="fixed_small")])
def test_few_denoising_steps(respacing, solver):
    schedule = respace(LINEAR, respacing)
    x, noise = normal(0), normal(1)
    for index in reversed(range(schedule.num_timesteps)):
        x, x_start = denoising_step(solver, schedule, index, x, x, noise)
    np.testing.assert_allclose(x, x_start, rtol=1e-6)
    assert np.isfinite(x).all()


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_a_loss_weighting_weighs_the_same_errors_alike(schedule, weighting):
    """Whatever is predicted, an error of x_0 costs the same: only "none" depends on it."""
    gamma, snr = 2.0, schedule.snr
    error = 0.25
    costs = {
        "x_start": error**2,
        # An error e of x_0 at fixed x_t is one of e sqrt(ᾱ / (1 - ᾱ)) of ε ...
        "noise": error**2 * schedule.alphas_cumprod / (1 - schedule.alphas_cumprod),
        # ... and of e / sqrt(1 - ᾱ) of v.
        "velocity": error**2 / (1 - schedule.alphas_cumprod),
    }
    expected = {
        "min_snr": [min(s, gamma) for s in snr],
        "p2": [s * (1 + s) ** -gamma for s in snr],
        "truncated_snr": [max(s, 1.0) for s in snr],
    }
    for prediction_type, cost in costs.items():
        table = loss_weight_table(schedule, weighting, prediction_type, gamma)
        assert table.dtype == np.float64 and np.isfinite(table).all()
        if weighting == "none":
            np.testing.assert_array_equal(table, np.ones(1000))
        else:
            np.testing.assert_allclose(
                table * cost, error**2 * np.array(expected[weighting]), rtol=1e-9
            )


def test_loss_weights_as_their_papers_write_them():
    alphas_cumprod = LINEAR.alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)

    def table(weighting, prediction_type, gamma=5.0):
        return loss_weight_table(LINEAR, weighting, prediction_type, gamma)

    # Min-SNR section 3.4: min(SNR, γ) / SNR on ε, min(SNR, γ) / (SNR + 1) on v.
    np.testing.assert_allclose(table("min_snr", "noise"), np.minimum(1, 5 / snr), rtol=1e-9)
    np.testing.assert_allclose(
        table("min_snr", "velocity"), np.minimum(snr, 5) / (snr + 1), rtol=1e-9
    )
    # P2 section 3: the loss on ε times 1 / (1 + SNR)^γ = (1 - ᾱ)^γ.
    np.testing.assert_allclose(table("p2", "noise", 1.0), 1 - alphas_cumprod, rtol=1e-9)
    # Progressive distillation section 4: the loss on ε never counts less than on x_0.
    np.testing.assert_allclose(table("truncated_snr", "noise"), np.maximum(1, 1 / snr), rtol=1e-9)
