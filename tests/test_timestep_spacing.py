"""Which timesteps a schedule keeps: linear, quadratic, Karras and log-SNR spacing."""

import numpy as np
import pytest

from cfjax.diffusion.schedule import (
    TIMESTEP_SPACINGS,
    make_noise_schedule,
    respace,
    respaced_timesteps,
)
from cfjax.errors import UserError

LINEAR, COSINE = make_noise_schedule("linear"), make_noise_schedule("cosine")


def log_sigma(schedule):
    return 0.5 * np.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)


def nearest(schedule, wanted):
    """Timesteps nearest in log σ, each by itself."""
    return np.abs(log_sigma(schedule)[None] - np.asarray(wanted)[:, None]).argmin(1)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [1000, 4000])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_timesteps_are_distinct_and_reach_both_ends(spacing, num_timesteps, name):
    schedule = make_noise_schedule(name, num_timesteps)
    for count in (1, 2, 3, 5, 20, 50, 250, num_timesteps - 1, num_timesteps):
        respaced = respace(schedule, count, spacing)
        timesteps = respaced.timestep_map
        assert len(timesteps) == respaced.num_timesteps == count and timesteps.dtype == np.int32
        assert (np.diff(timesteps) > 0).all()
        assert timesteps[0] == 0 and timesteps[-1] == (num_timesteps - 1 if count > 1 else 0)
        # 1 - beta is as small as 2e-9 from one noise level to the next, and rounded to 1e-16.
        np.testing.assert_allclose(
            respaced.alphas_cumprod, schedule.alphas_cumprod[timesteps], rtol=1e-6
        )
        assert respace(schedule, str(count), spacing) == respaced


def test_linear_spacing_is_the_default():
    for respacing in (1, "7", "250", "ddim50", "10,15,20"):
        respaced = respace(LINEAR, respacing, "linear")
        assert respaced == respace(LINEAR, respacing)
        assert respaced.timestep_map.tolist() == respaced_timesteps(1000, str(respacing))


def test_quadratic_spacing():
    # Squares of 0, sqrt(999) / 4, ...: 0, 62.4, 249.75, 561.9, 999.
    assert respace(LINEAR, 5, "quadratic").timestep_map.tolist() == [0, 62, 250, 562, 999]
    # Of 0, 0.42, 1.66, 3.74, 6.66 the first two would coincide.
    assert respace(LINEAR, 50, "quadratic").timestep_map[:5].tolist() == [0, 1, 2, 4, 7]


@pytest.mark.parametrize("num_timesteps", [1000, 4000])
@pytest.mark.parametrize("count", [2, 5, 10])
def test_karras_spacing(count, num_timesteps):
    schedule = make_noise_schedule("linear", num_timesteps)
    low, high = np.exp(log_sigma(schedule)[[0, -1]])
    ramp = np.arange(count) / (count - 1)
    # EDM eq. 5 counts from the most noise.
    sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    expected = nearest(schedule, np.log(sigmas[::-1]))
    assert (np.diff(expected) > 0).all()
    np.testing.assert_array_equal(respace(schedule, count, "karras").timestep_map, expected)


@pytest.mark.parametrize("num_timesteps", [1000, 4000])
@pytest.mark.parametrize("count", [2, 5, 10])
def test_logsnr_spacing(count, num_timesteps):
    schedule = make_noise_schedule("linear", num_timesteps)
    table = np.log(schedule.snr)
    timesteps = respace(schedule, count, "logsnr").timestep_map
    gaps = np.diff(table[timesteps])
    even = (table[-1] - table[0]) / (count - 1)
    # Either end of a gap is off by at most half the way to the next timestep.
    way = np.abs(np.diff(table))
    around = [max(way[max(t - 1, 0)], way[min(t, len(way) - 1)]) / 2 for t in timesteps]
    assert (np.abs(gaps - even) <= np.add(around[1:], around[:-1]) + 1e-9).all()


@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
def test_timesteps_that_coincide_move_no_further_than_the_next_free_one(spacing):
    low, high = log_sigma(LINEAR)[[0, -1]]
    wanted = np.linspace(low, high, 250)
    if spacing == "karras":
        wanted = 7 * np.log(np.linspace(np.exp(low / 7), np.exp(high / 7), 250))
    alone = nearest(LINEAR, wanted)
    assert (np.diff(alone) == 0).any()
    expected = alone.copy()
    for i in range(1, 250):
        expected[i] = max(alone[i], expected[i - 1] + 1)
    np.testing.assert_array_equal(respace(LINEAR, 250, spacing).timestep_map, expected)
    assert (expected == alone).mean() > 0.5


def test_spacings_follow_the_noise_levels_of_a_respaced_schedule():
    twice = respace(respace(LINEAR, 500), 10, "logsnr")
    assert set(twice.timestep_map) <= set(respace(LINEAR, 500).timestep_map)


@pytest.mark.parametrize("spacing", ["quadratic", "karras", "logsnr"])
@pytest.mark.parametrize(
    ("respacing", "words"),
    [
        ("ddim50", "'ddim50' is not understood with {} timestep spacing.*'50'"),
        ("10,15,20", "'10,15,20' is not understood"),
        ("", "'' is not understood"),
        ("many", "'many' is not understood"),
        (0, "'0' is not understood"),
        (-5, "'-5' is not understood"),
        (1001, "'1001' asks for 1001 of 1000 timesteps; ask for at most 1000"),
    ],
)
def test_refused_respacings(spacing, respacing, words):
    with pytest.raises(UserError, match=words.format(spacing)):
        respace(LINEAR, respacing, spacing)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(UserError, match=r"timestep spacing 'karas'.*'karras'"):
        respace(LINEAR, 10, "karas")
