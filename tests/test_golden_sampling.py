"""Guidance, ancestral trajectories and generation in several AR steps, with the published noise."""

import functools

import jax
import numpy as np
import pytest
from golden_data import MODELS, assert_close_to_max, in_order, load, model, params, to_latents

from cfjax import sampling
from cfjax.diffusion.schedule import make_noise_schedule, respace
from cfjax.diffusion.solvers import Solver
from cfjax.guidance import Guidance
from cfjax.guided_network import Network, guided_prediction, prefill

# Of the largest value. The published timestep angles are float32, which moves predictions by 1.2e-5
# of their largest value.
RTOL = 1e-4
SCHEDULE = make_noise_schedule("linear")


@pytest.mark.parametrize("letter", ["A", pytest.param("B", marks=pytest.mark.long)])
def test_guidance_and_its_interval(letter):
    golden, module = load(f"model{letter}_infer"), model(letter)
    indices = golden["order"][:, : int(golden["k1"])]
    x_t = in_order(golden["xn_tokens"], indices)
    interval = tuple(golden["cfg_interval"].tolist())
    for scale, guidance, prefix in (
        (1, Guidance(1.0), "ar1"),
        (3, Guidance(3.0), "ar1"),
        (3, Guidance(3.0, interval), "ar1_interval"),
    ):
        network = Network(module, params(letter))
        caches = prefill(network, None, golden["y"], 0, is_guided=scale > 1)
        times = golden["interval_ts" if prefix == "ar1_interval" else "ts"]
        for t in times:
            is_guided = guidance.is_guided(t)
            predict = jax.jit(
                functools.partial(
                    guided_prediction, network, None, scale=scale if is_guided else None
                )
            )
            prediction = predict(caches, x_t, t, indices)
            assert_close_to_max(prediction, golden[f"cfg{scale}/{prefix}/t{t}"], RTOL)


def generate(letter, golden, order, split_sizes, respacing, scale, noise, variance="fixed_large"):
    """Tokens in grid order and their trajectory; `noise[ar_step]` in call order."""
    schedule = respace(SCHEDULE, respacing)
    settings = sampling.SamplingSettings(
        split_sizes=split_sizes,
        schedules=(schedule,) * len(split_sizes),
        solver=Solver("ddpm", variance=variance),
        guidance=Guidance(scale),
    )

    def noise_at(size):
        def draw(ar_step, index):
            assert noise[ar_step].shape[2] == size
            return jax.numpy.asarray(noise[ar_step])[schedule.num_timesteps - 1 - index]

        return draw

    @jax.jit
    def run(params):
        return sampling.generate_from_noise(
            Network(model(letter), params),
            settings,
            golden["y"],
            order,
            golden["z"],
            noise_at,
            record=True,
        )

    return run(params(letter))


@pytest.mark.parametrize("letter", MODELS)
@pytest.mark.parametrize("scale", [1, 2.5])
def test_ancestral_trajectory(letter, scale):
    golden = load(f"model{letter}_sample")
    num_tokens = golden["z"].shape[1]
    raster = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), golden["z"].shape[:2])
    arguments = (
        letter,
        golden,
        raster,
        (num_tokens,),
        str(golden["respacing"]),
        scale,
        [golden["noise"]],
    )
    tokens, trajectory = generate(*arguments)
    prefix = f"cfg{scale}"
    for ours, expected in zip(trajectory.x_t[0], golden[f"{prefix}/samples"], strict=True):
        assert_close_to_max(ours, expected, RTOL)
    x_start = trajectory.x_start[0]
    assert_close_to_max(x_start[0], golden[f"{prefix}/pred_xstart_first"], RTOL)
    assert_close_to_max(x_start[-1], golden[f"{prefix}/pred_xstart_last"], RTOL)
    assert_close_to_max(to_latents(letter, tokens), golden[f"{prefix}/latent_nchw"], RTOL)
    tokens, _ = generate(*arguments, variance="fixed_small")
    assert_close_to_max(tokens, golden[f"{prefix}/final_sigma_small"], RTOL)


@pytest.mark.parametrize("letter", MODELS)
def test_generation_in_several_ar_steps(letter):
    golden = load(f"model{letter}_sample")
    split_sizes = tuple(golden["ar/split_sizes"].tolist())
    tokens, trajectory = generate(
        letter,
        golden,
        golden["ar/order"],
        split_sizes,
        str(golden["ar/respacing"]),
        float(golden["ar/cfg_scale"]),
        [golden[f"ar/step{i}/noise"] for i in range(len(split_sizes))],
    )
    for i in range(len(split_sizes)):
        assert_close_to_max(trajectory.x_t[i][-1], golden[f"ar/step{i}/final"], RTOL)
    assert_close_to_max(tokens, golden["ar/tokens_raster"], RTOL)
    assert_close_to_max(to_latents(letter, tokens), golden["ar/latent_nchw"], RTOL)
