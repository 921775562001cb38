"""Solvers where the exact x_0 prediction is known: distributions, orders."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import ndtr

from cfjax.diffusion import process
from cfjax.diffusion.schedule import (
    make_noise_schedule,
    respace,
)
from cfjax.diffusion.solvers import SOLVERS, Solver, denoising_step, step_coefficients
from cfjax.errors import UserError

LINEAR, COSINE = make_noise_schedule("linear"), make_noise_schedule("cosine")
RULES = {
    "ddpm": {"name": "ddpm"},
    "ddpm_small": {"name": "ddpm", "variance": "fixed_small"},
    "ddim": {"name": "ddim"},
    "ddim_half": {"name": "ddim", "eta": 0.5},
    "ddim_full": {"name": "ddim", "eta": 1.0},
    "dpmpp_2m": {"name": "dpmpp_2m"},
    "dpmpp_2m_sde": {"name": "dpmpp_2m_sde"},
}


class Mixture(NamedTuple):
    """A mixture of Gaussians: weights `[modes]`, means and deviations `[modes, dimensions]`."""

    weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray

    def x_start(self, x_t, signal, sigma):
        """E[x_0 | x_t] for x_t `[dimensions]`."""
        weights, means, deviations = (jnp.asarray(values, x_t.dtype) for values in self)
        variances = (signal * deviations) ** 2 + sigma**2
        away = x_t[None] - signal * means
        log_density = -0.5 * (away**2 / variances + jnp.log(variances)).sum(-1)
        responsibility = jax.nn.softmax(jnp.log(weights) + log_density)
        of_mode = means + signal * deviations**2 / variances * away
        return (responsibility[:, None] * of_mode).sum(0)

    def cdf(self, x_t, signal, sigma):
        """P(noised target < x_t) in one dimension, for x_t `[samples]`."""
        deviations = np.sqrt((signal * self.deviations) ** 2 + sigma**2)[:, 0]
        away = x_t[:, None] - signal * self.means[None, :, 0]
        return (self.weights[None] * ndtr(away / deviations[None])).sum(-1)

    @property
    def mean(self):
        return self.weights @ self.means

    @property
    def variance(self):
        return self.weights @ (self.means**2 + self.deviations**2) - self.mean**2


def mixture(weights, means, deviations):
    return Mixture(*(np.array(values, np.float64) for values in (weights, means, deviations)))


GAUSSIAN = mixture([1], [[0.7]], [[0.5]])
TWO_MODES = mixture([0.3, 0.7], [[-2.0], [1.5]], [[0.3], [0.5]])
TARGETS = {
    "gaussian": GAUSSIAN,
    "gaussian_3d": mixture([1], [[0.7, 0.0, -1.0]], [[0.5, 1.5, 0.1]]),
    "two_modes": TWO_MODES,
    "two_modes_2d": mixture([0.6, 0.4], [[-1.5, 0.5], [1.5, -0.5]], [[0.4, 0.2], [0.3, 0.6]]),
}


def denoise(solver, schedule, predict_x_start, noise_at, x_t, last_index=0):
    """All denoising steps from x_t down to `last_index`, with a network that knows the target.

    `predict_x_start(x_t, signal, sigma)` is E[x_0 | x_t]; `noise_at(index)` is like x_t.
    """
    signal, sigma = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
    indices = np.arange(schedule.num_timesteps)
    tables = (step_coefficients(solver, schedule), signal, sigma)
    tables = jax.tree.map(lambda values: jnp.asarray(values, x_t.dtype), tables)

    def body(carry, inputs):
        x_t, previous_x_start = carry
        (coefficients, signal, sigma), index = inputs
        x_start = predict_x_start(x_t, signal, sigma)
        noise = (x_t - signal * x_start) / sigma
        velocity = signal * noise - sigma * x_start
        prediction = {"noise": noise, "x_start": x_start, "velocity": velocity}
        return denoising_step(
            solver,
            coefficients,
            x_t,
            prediction[solver.prediction_type],
            previous_x_start if solver.is_multistep else None,
            noise_at(index) if solver.needs_noise else None,
        ), None

    rows = jax.tree.map(lambda values: values[last_index:][::-1], (tables, indices))
    (x_t, _), _ = jax.lax.scan(body, (x_t, jnp.zeros_like(x_t)), rows)
    return x_t


NUM_SAMPLES, NUM_DENOISING_STEPS = 8192, 250


@functools.cache
def sampling_noise():
    shape = (NUM_SAMPLES, NUM_DENOISING_STEPS + 1, 3)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(solver, target_name, noise):
    """`[samples, dimensions]` from noise `[samples, 1 + denoising steps, dimensions]`."""
    schedule, target = respace(LINEAR, NUM_DENOISING_STEPS, "quadratic"), TARGETS[target_name]

    def draw_one(noise):
        return denoise(solver, schedule, target.x_start, lambda index: noise[index], noise[-1])

    return jax.vmap(draw_one)(noise[..., : len(target.mean)])


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize(
    "prediction_type",
    ["noise", *(pytest.param(it, marks=pytest.mark.long) for it in ("x_start", "velocity"))],
)
@pytest.mark.parametrize("rule", RULES)
def test_samples_have_the_distribution_of_the_target(rule, prediction_type, target_name):
    """Within four standard errors, and 3 % for the denoising steps being few."""
    target, four_errors = TARGETS[target_name], 4 / np.sqrt(NUM_SAMPLES)
    solver = Solver(prediction_type=prediction_type, **RULES[rule])
    samples = np.asarray(draw(solver, target_name, sampling_noise()), np.float64)
    deviation = np.sqrt(target.variance)
    assert (np.abs(samples.mean(0) - target.mean) < deviation * (four_errors + 0.03)).all()
    # Squares vary most for a Gaussian, by sqrt(2) of the variance: modes far apart have no tails.
    error = np.abs(samples.var(0) / target.variance - 1)
    assert (error < np.sqrt(2) * four_errors + 0.03).all()
    if len(target.weights) > 1:
        # The middle splits the modes but for 0.03 %.
        in_first = samples[:, 0] < target.means[:, 0].mean()
        assert abs(in_first.mean() - target.weights[0]) < 0.5 * four_errors + 0.003
        for mode, members in enumerate((samples[in_first], samples[~in_first])):
            np.testing.assert_allclose(members.mean(0), target.means[mode], rtol=0, atol=0.06)
            np.testing.assert_allclose(members.std(0), target.deviations[mode], rtol=0.08)


# The fewest for which the errors fall as their leading term does.
NUMBERS_OF_DENOISING_STEPS = (64, 128, 256)


def finely_respaced(num_denoising_steps):
    # So many timesteps that the even spacing of log SNR is hardly rounded.
    return respace(make_noise_schedule("linear", 100_000), num_denoising_steps, "logsnr")


def slope(errors):
    """The power of the number of denoising steps that the errors go with."""
    assert (np.diff(errors) < 0).all(), errors
    return np.polyfit(np.log(NUMBERS_OF_DENOISING_STEPS), np.log(errors), 1)[0]


@pytest.mark.parametrize("prediction_type", process.PREDICTION_TYPES)
@pytest.mark.parametrize("target", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two_modes"])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_the_deterministic_solvers(name, order, target, prediction_type):
    """The probability-flow ODE in one dimension keeps a sample at its quantile.

    Compared at the least noisy level: the last jump, to σ = 0, is the same however many came
    before. Slopes measured within 0.08 of the order.
    """
    solver, errors = Solver(name, prediction_type), []
    for num_denoising_steps in NUMBERS_OF_DENOISING_STEPS:
        schedule = finely_respaced(num_denoising_steps)
        signal, sigma = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
        with jax.enable_x64(True):
            start = jnp.linspace(-1.5, 1.5, 7)
            assert start.dtype == jnp.float64
            end = jax.vmap(
                lambda x, schedule=schedule: denoise(
                    solver, schedule, target.x_start, None, x, last_index=1
                )
            )(start[:, None])[:, 0]
            quantile = target.cdf(start, signal[-1], sigma[-1])
            error = target.cdf(end, signal[0], sigma[0]) - quantile
            errors.append(float(jnp.abs(error).max()))
    assert abs(slope(errors) + order) < 0.1


def test_a_gaussian_moves_as_the_closed_form_says():
    """(x_t - sqrt(ᾱ) m) / sqrt(ᾱ s² + 1 - ᾱ) is conserved: 256 steps of second order keep it."""
    schedule, mean, deviation = finely_respaced(256), 0.7, 0.5
    signal, variance = np.sqrt(schedule.alphas_cumprod), 1 - schedule.alphas_cumprod
    scale = np.sqrt((signal * deviation) ** 2 + variance)
    with jax.enable_x64(True):
        start = jnp.array([-2.0])
        end = denoise(Solver("dpmpp_2m"), schedule, GAUSSIAN.x_start, None, start, last_index=1)
        start, end = np.asarray(start), np.asarray(end)
    before = (start - signal[-1] * mean) / scale[-1]
    after = (end - signal[0] * mean) / scale[0]
    np.testing.assert_allclose(after, before, rtol=5e-4)


@pytest.mark.parametrize("deviation", [0.5, 2.0])
@pytest.mark.parametrize(
    ("rule", "order"), [("ddpm", 1), ("ddpm_small", 1), ("ddim_full", 1), ("dpmpp_2m_sde", 2)]
)
def test_order_of_the_variance_of_the_stochastic_solvers(rule, order, deviation):
    """Without sampling: for a Gaussian a denoising step is linear in x_t and noise.

    So x_t is held as its coefficients of the first noise and of the noise of each denoising step,
    and its variance is the sum of their squares.
    """
    solver, errors = Solver(prediction_type="x_start", **RULES[rule]), []

    def predict_x_start(x_t, signal, sigma):
        return signal * deviation**2 / ((signal * deviation) ** 2 + sigma**2) * x_t

    for num_denoising_steps in NUMBERS_OF_DENOISING_STEPS:
        schedule = finely_respaced(num_denoising_steps)
        variance = 1 + schedule.alphas_cumprod * (deviation**2 - 1)
        with jax.enable_x64(True):
            basis = jnp.eye(num_denoising_steps + 1)
            start = np.sqrt(variance[-1]) * basis[num_denoising_steps]
            end = denoise(
                solver, schedule, predict_x_start, lambda index, b=basis: b[index], start, 1
            )
            errors.append(abs(float((end**2).sum()) / variance[0] - 1))
    assert abs(slope(errors) + order) < 0.1


def one_denoising_step(solver, schedule, index, noise=None, seed=0, previous=None):
    x_t, prediction = np.random.default_rng(seed).normal(size=(2, 4, 6, 3)).astype(np.float32)
    at_index = jax.tree.map(lambda values: values[index], step_coefficients(solver, schedule))
    previous = np.zeros_like(x_t) if previous is None else previous
    return denoising_step(solver, at_index, x_t, prediction, previous, noise)


STOCHASTIC = [rule for rule in RULES if rule not in ("ddim", "dpmpp_2m")]


@pytest.mark.parametrize("rule", STOCHASTIC)
def test_temperature_scales_the_added_noise(rule):
    schedule = respace(LINEAR, 10)
    noise = np.random.default_rng(5).normal(size=(4, 6, 3)).astype(np.float32)

    def sample(temperature, noise):
        solver = Solver(temperature=temperature, **RULES[rule])
        return np.asarray(one_denoising_step(solver, schedule, 4, noise)[0])

    cold, plain, half, hot = (sample(t, noise) for t in (0.0, 1.0, 0.5, 2.0))
    deviation = step_coefficients(Solver(**RULES[rule]), schedule).noise[4]
    assert deviation > 0.1
    np.testing.assert_allclose(plain - cold, deviation * noise, rtol=0, atol=1e-5)
    np.testing.assert_allclose(half - cold, 0.5 * deviation * noise, rtol=0, atol=1e-5)
    np.testing.assert_allclose((hot - cold).var(), 4 * (plain - cold).var(), rtol=1e-4)
    # The coldest is deterministic, and takes no noise.
    np.testing.assert_array_equal(cold, sample(0.0, None))
    np.testing.assert_array_equal(cold, sample(0.0, 2 * noise))


def test_temperature_leaves_the_mean_alone():
    schedule = respace(LINEAR, 10)
    for rule in STOCHASTIC:
        *plain, noise = step_coefficients(Solver(**RULES[rule]), schedule)
        *cold, none = step_coefficients(Solver(temperature=0.0, **RULES[rule]), schedule)
        np.testing.assert_array_equal(plain, cold)
        assert (noise[1:] > 0).all() and (none == 0).all()


@pytest.mark.parametrize("held", [{}, {"clip_x_start": True}, {"dynamic_threshold": 0.9}])
@pytest.mark.parametrize("rule", RULES)
def test_the_last_denoising_step_ends_at_the_predicted_x_start(rule, held):
    noise = np.full((4, 6, 3), 100, np.float32)
    for schedule in (LINEAR, respace(COSINE, 2), respace(COSINE, 1)):
        solver = Solver(**RULES[rule], **held)
        sample, x_start = one_denoising_step(solver, schedule, 0, noise, previous=noise)
        np.testing.assert_array_equal(sample, x_start)
        coefficients = step_coefficients(solver, schedule)
        assert [values[0] for values in coefficients[2:]] == [0, 1, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_the_x_start_before_is_read_by_multistep_solvers_alone(rule):
    solver, schedule = Solver(**RULES[rule]), respace(COSINE, 10)
    noise, far = np.ones((4, 6, 3), np.float32), np.full((4, 6, 3), 50, np.float32)
    for index in range(10):
        outputs = [
            one_denoising_step(solver, schedule, index, noise, previous=previous)[0]
            for previous in (0 * far, far)
        ]
        is_read = solver.is_multistep and 0 < index < 9
        assert np.array_equal(*outputs) != is_read


def test_which_solvers_need_noise_and_which_are_multistep():
    assert {rule for rule in RULES if Solver(**RULES[rule]).needs_noise} == set(STOCHASTIC)
    assert not any(Solver(**RULES[rule], temperature=0.0).needs_noise for rule in STOCHASTIC)
    assert Solver("ddpm", temperature=0.1).needs_noise
    multistep = {rule for rule in RULES if Solver(**RULES[rule]).is_multistep}
    assert multistep == {"dpmpp_2m", "dpmpp_2m_sde"}


def test_a_threshold_follows_the_quantile_of_each_example():
    x_start = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    x_start *= np.array([0.1, 1.0, 10.0], np.float32)[:, None, None]
    solver = Solver("ddim", "x_start", dynamic_threshold=0.9)
    at_index = jax.tree.map(lambda values: values[500], step_coefficients(solver, LINEAR))
    _, held = denoising_step(solver, at_index, x_start, x_start, None, None)
    for example, ours in zip(x_start, held, strict=True):
        bound = max(1.0, np.quantile(np.abs(example), 0.9))
        np.testing.assert_allclose(ours, np.clip(example, -bound, bound) / bound, rtol=1e-5)
    # A small example is left alone, a large one fills the range.
    np.testing.assert_array_equal(held[0], x_start[0])
    assert (np.abs(held[2]) == 1).mean() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("num_denoising_steps", [1, 2, 50, 1000])
@pytest.mark.parametrize("prediction_type", process.PREDICTION_TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_float32_stays_finite_at_the_noisiest_timestep(rule, prediction_type, num_denoising_steps):
    """ᾱ of the cosine schedule ends at 2e-9."""
    assert COSINE.alphas_cumprod[-1] < 1e-8
    solver = Solver(prediction_type=prediction_type, **RULES[rule])
    for spacing in ("linear", "logsnr"):
        schedule = respace(COSINE, num_denoising_steps, spacing)
        coefficients = step_coefficients(solver, schedule)
        for values in coefficients:
            assert values.dtype == np.float64 and values.shape == (num_denoising_steps,)
            assert np.isfinite(values.astype(np.float32)).all()
        noise = np.ones((4, 6, 3), np.float32)
        sample, x_start = one_denoising_step(solver, schedule, -1, noise)
        assert np.isfinite(sample).all() and np.isfinite(x_start).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("rule", RULES)
def test_a_denoising_step_keeps_the_dtype_of_x_t(rule, dtype):
    solver = Solver(dynamic_threshold=0.5, **RULES[rule])
    coefficients = step_coefficients(solver, respace(LINEAR, 5))
    with jax.enable_x64(dtype == "float64"):
        x_t = jnp.ones((2, 3), dtype)
        for table_dtype in ("float32", "float64"):
            at_index = jax.tree.map(lambda v, d=table_dtype: v[2].astype(d), coefficients)
            # What comes from elsewhere may be wider.
            noise = np.ones((2, 3))
            outputs = jax.jit(denoising_step, static_argnums=0)(
                solver, at_index, x_t, noise, noise, noise
            )
            assert [values.dtype for values in outputs] == [dtype, dtype]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "dpm"}, "solver 'dpm'"),
        ({"prediction_type": "epsilon"}, "prediction type 'epsilon'"),
        ({"variance": "learned"}, "variance 'learned'"),
        ({"name": "ddim", "eta": -0.1}, r"eta is -0\.1.*\[0, 1\]"),
        ({"name": "ddim", "eta": float("nan")}, "eta is nan"),
        ({"name": "dpmpp_2m", "eta": 0.5}, r"eta is 0\.5, but solver 'dpmpp_2m'.*'ddim'"),
        ({"name": "ddpm", "eta": 1.0}, r"eta is 1\.0, but solver 'ddpm'"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"name": "ddim", "temperature": 0.9}, r"temperature is 0\.9, but solver 'ddim'"),
        ({"name": "dpmpp_2m", "temperature": 0.0}, r"temperature is 0\.0, but.*'dpmpp_2m'"),
        ({"dynamic_threshold": 1.0}, r"dynamic_threshold is 1\.0.*\(0, 1\)"),
        ({"dynamic_threshold": -0.5}, r"dynamic_threshold is -0\.5"),
        ({"dynamic_threshold": 0.9, "clip_x_start": True}, r"clip_x_start.*threshold is 0\.9"),
    ],
)
def test_refused_solvers(fields, words):
    with pytest.raises(UserError, match=words) as refusal:
        Solver(**fields)
    assert "\n" not in str(refusal.value)


def test_every_solver_is_tested_here():
    assert {fields["name"] for fields in RULES.values()} == set(SOLVERS)
