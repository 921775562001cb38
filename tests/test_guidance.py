"""Guidance: its scale along both axes, what is computed where, autoguidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cfjax import build, sampling
from cfjax.diffusion.schedule import make_noise_schedule, respace
from cfjax.errors import UserError
from cfjax.flops import counted_flops, sampling_flops
from cfjax.guidance import Guidance
from cfjax.rng import per_example_keys

SCHEDULE = respace(make_noise_schedule("linear"), "10")
BATCH = 2


def test_the_scale_over_the_ar_position():
    sizes = (1, 3, 4)
    np.testing.assert_allclose(Guidance(3.0).by_ar_step(sizes, 8), [1, 1, 1])
    linear = Guidance(3.0, schedule="linear")
    np.testing.assert_allclose(linear.by_ar_step(sizes, 8), [1 / 8, 1 / 2, 1])
    cosine = Guidance(3.0, schedule="cosine")
    expected = [(1 - np.cos(np.pi / 8)) / 2, 1 / 2, 1]
    np.testing.assert_allclose(cosine.by_ar_step(sizes, 8), expected)
    # Tokens that are known are there before the first AR step.
    np.testing.assert_allclose(linear.by_ar_step((2, 2), 8), [6 / 8, 1])


def test_the_scale_over_the_noise():
    np.testing.assert_allclose(Guidance(2.0).by_timestep(SCHEDULE), np.ones(10))
    falling = Guidance(2.0, power=2.0).by_timestep(SCHEDULE)
    np.testing.assert_allclose(falling, (1 - SCHEDULE.timestep_map / 1000) ** 2)
    assert falling[0] == 1.0


def test_the_interval_is_half_open():
    guidance = Guidance(2.0, (111, 333))
    assert guidance.is_guided(np.array([110, 111, 332, 333])).tolist() == [False, True, True, False]
    assert not Guidance(1.0).is_guided(np.arange(1000)).any()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scale": 0.5}, "guidance_scale is 0.5, but must be at least 1"),
        ({"scale": float("nan")}, "guidance_scale is nan"),
        ({"interval": (5, 5)}, r"guidance_interval is \(5, 5\)"),
        ({"schedule": "square"}, "unknown guidance schedule 'square'"),
        ({"power": -1.0}, "guidance_power is -1"),
    ],
)
def test_bad_guidance_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Guidance(**fields)


@pytest.fixture(scope="module")
def network():
    model = build.sampling_model(tiny.config())
    return model, jax.tree.map(jnp.asarray, tiny.random_params(model))


def settings_of(split_sizes=(), **sampling_fields):
    fields = {f"sampling__{name}": value for name, value in sampling_fields.items()}
    return build.sampling_settings(tiny.config(**fields), split_sizes)


def arguments():
    keys = per_example_keys(jax.random.key(0), jnp.arange(BATCH))
    return jnp.arange(BATCH), keys


def flops_of(model, params, settings, **guide):
    def generate(params, labels, keys):
        return sampling.generate(model, params, settings, labels, keys, **guide)

    return counted_flops(jax.make_jaxpr(generate)(params, *arguments()).jaxpr)


@pytest.mark.parametrize(
    ("interval", "num_guided"),
    [((0, 1000), 10), ((111, 445), 4), ((0, 1), 1), ((999, 1000), 1), ((112, 222), 0)],
)
def test_the_interval_costs_what_it_should(network, interval, num_guided):
    """Timesteps are 0, 111, 222, ...: outside the interval one half alone is computed."""
    model, params = network
    settings = settings_of(
        num_ar_steps=1, denoising_steps="10", guidance_interval=interval, guidance_scale=2.0
    )
    assert settings.num_passes == (10 + num_guided,)
    exact = BATCH * sampling_flops(
        model, settings.split_sizes, settings.num_passes, settings.num_rows
    )
    # Condition tokens, when they are pushed, attend to the empty cache too.
    assert exact <= flops_of(model, params, settings) <= 1.001 * exact
    if num_guided == 0:
        unguided = settings_of(num_ar_steps=1, denoising_steps="10", guidance_scale=1.0)
        assert flops_of(model, params, settings) == flops_of(model, params, unguided)


def test_an_interval_guides_as_where_it_is_everywhere(network):
    """Guided denoising steps at the noisy end are those of full guidance; the others unguided."""
    model, params = network
    trajectories = {}
    for name, scale, interval in (
        ("all", 3.0, (0, 1000)),
        ("noisy", 3.0, (500, 1000)),
        ("clean", 3.0, (0, 1)),
        ("none", 1.0, (0, 1000)),
    ):
        settings = settings_of(
            num_ar_steps=1, denoising_steps="4", guidance_scale=scale, guidance_interval=interval
        )
        trajectories[name] = sampling.generate(
            model, params, settings, *arguments(), return_trajectory=True
        )[1].x_start[0]
    # Timesteps 999, 666, 333, 0.
    np.testing.assert_allclose(trajectories["all"][:2], trajectories["noisy"][:2], atol=1e-5)
    assert np.abs(trajectories["all"][2] - trajectories["noisy"][2]).max() > 1e-3
    assert np.abs(trajectories["none"][0] - trajectories["noisy"][0]).max() > 1e-3
    # Outside it is the prediction for the class, not for none.
    np.testing.assert_allclose(trajectories["none"][:3], trajectories["clean"][:3], atol=1e-5)
    assert np.abs(trajectories["none"][3] - trajectories["clean"][3]).max() > 1e-3


def test_autoguidance_by_the_model_itself_changes_nothing(network):
    """weaker + scale (stronger - weaker), both the same; tolerance: rounding times the scale."""
    model, params = network
    settings = settings_of(num_ar_steps=4, guidance_scale=3.0)
    by_itself = sampling.generate(
        model, params, settings, *arguments(), guide_model=model, guide_params=params
    )
    unguided = settings_of(num_ar_steps=4, guidance_scale=1.0)
    np.testing.assert_allclose(
        by_itself, sampling.generate(model, params, unguided, *arguments()), atol=1e-4
    )


def test_autoguidance_by_a_smaller_model(network):
    """It is guided by its own prediction, with its own KV cache, and computed where it is needed."""
    model, params = network
    smaller = model.clone(width=8, depth=1)
    weaker = jax.tree.map(jnp.asarray, tiny.random_params(smaller))
    guide = {"guide_model": smaller, "guide_params": weaker}
    settings = settings_of(num_ar_steps=4, guidance_scale=2.0)
    guided = sampling.generate(model, params, settings, *arguments(), **guide)
    assert np.isfinite(guided).all()
    assert np.abs(guided - sampling.generate(model, params, settings, *arguments())).max() > 1e-3
    unguided = settings_of(num_ar_steps=4, guidance_scale=1.0)
    counted = flops_of(model, params, settings, **guide)
    alone = flops_of(model, params, unguided)
    assert flops_of(model, params, unguided, **guide) == alone
    assert counted == alone + flops_of(smaller, weaker, unguided)


def test_guidance_needs_class_dropout():
    config = tiny.config(loss__class_dropout=0.0)
    with pytest.raises(UserError, match=r"trained with loss\.class_dropout=0"):
        build.sampling_settings(config)
    build.sampling_settings(config, is_autoguided=True)
    config.sampling.guidance_scale = 1.0
    build.sampling_settings(config)
