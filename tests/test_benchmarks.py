"""The benchmarks run, and their model FLOPs are what the traced programs hold."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

from benchmarks import scaling
from cfjax import build, objective, sampling
from cfjax.config_loading import load_config
from cfjax.flops import counted_flops, sampling_flops

REPOSITORY = Path(__file__).parent.parent
TINY = {
    "data.size": 4,
    "data.num_classes": 10,
    "model.width": 32,
    "model.depth": 3,
    "model.num_heads": 2,
    "model.num_condition_tokens": 4,
    "model.attention": "fused",  # "split" skips products that the model's FLOPs count
    "train.global_batch_size": 2,
    "sampling.num_ar_steps": 3,
    "sampling.denoising_steps": "4",
}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"diffusion.timesteps_per_ar_step": 2, "diffusion.timestep_sharing": "ar_step"},
        {"factorization.mode": "diffusion", "model.mlp_ratio": 2.0},
    ],
)
def test_train_flops_are_those_of_the_forward_pass(overrides):
    config = load_config(str(REPOSITORY / "benchmarks/mid_model.py"), TINY | overrides)
    model, objective_ = build.model(config), build.objective(config)
    params = jax.eval_shape(build.init_params(model), jax.random.key(0))

    inputs = params, jnp.zeros((2, 16, 16)), jnp.zeros(2, jnp.int32)

    def forward(model, params, tokens, labels):
        drawn = objective.corrupt(objective_, model, labels, 0, 0)
        return objective.loss(objective_, model, params, tokens, drawn).loss

    jaxpr = jax.make_jaxpr(functools.partial(forward, model))(*inputs)
    flops = build.training_forward_flops(config)
    assert counted_flops(jaxpr.jaxpr) == flops

    split = model.clone(attention="split")
    jaxpr = jax.make_jaxpr(functools.partial(forward, split))(*inputs)
    assert counted_flops(jaxpr.jaxpr) < flops


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_sampling_flops_are_those_of_the_program(guidance_scale):
    """Attention runs over the whole cache, filled or not: at least the model's, and near it."""
    overrides = TINY | {"sampling.guidance_scale": guidance_scale}
    config = load_config(str(REPOSITORY / "benchmarks/mid_model.py"), overrides)
    model = build.model(config)
    settings = build.sampling_settings(config)
    params = jax.eval_shape(build.init_params(model), jax.random.key(0))
    jaxpr = jax.make_jaxpr(
        lambda params, labels, keys: sampling.generate(model, params, settings, labels, keys)
    )(params, jnp.zeros(2, jnp.int32), jax.random.split(jax.random.key(0), 2))
    flops = 2 * sampling_flops(model, settings.split_sizes, settings.num_passes, settings.num_rows)
    assert flops <= counted_flops(jaxpr.jaxpr) <= 1.15 * flops


def run(name, *arguments):
    """Runs a benchmark; what it says in JSON."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds=1"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["benchmark"] == name
    return values


@pytest.mark.parametrize("name", [pytest.param("train_step", marks=pytest.mark.long), "sample"])
def test_benchmark_prints_json(name):
    overrides = [f"--config.{key}={value}" for key, value in TINY.items()]
    values = run(name, "--matmul_size=64", *overrides)
    assert values["seconds"] > 0 and values["tokens_per_second"] > 0
    assert values["ratio_to_matmul_min"] <= values["ratio_to_matmul"]


@pytest.mark.long
def test_scaling_runs_each_number_of_devices():
    flags = ["--devices=1,2", "--train_steps=1", "--batches=0", *tiny.flags()]
    values = run("scaling", *flags)
    for name in ("data=1", "data=2", "fsdp=2", "apart=2"):
        assert values[f"{name} best"] >= values[f"{name} train_steps_per_second"] > 0
        assert (f"{name} slowdown" in values) == (name != "data=1")
        assert (f"{name} overhead" in values) == (name in ("data=2", "fsdp=2"))
    assert values["batch_size"] == 16


def test_the_input_pipeline_is_measured():
    flags = ["--images=64", "--size=32", "--latents=600", "--latent_size=4", "--reads=200"]
    values = run("input_pipeline", *flags)
    assert values["images_per_cpu_second"] > 0 and values["latents_per_second"] > 0
    ratio = values["images_per_cpu_second"] / values["pillow_images_per_cpu_second"]
    assert values["images_ratio_to_pillow"] == pytest.approx(ratio)  # of the one round
    assert values["resident_mib_before"] > 0


def test_costs_are_medians_of_the_ratios_of_a_round():
    """One slow round, in which everything took ten times as long, changes nothing."""
    times = {
        "data=1": [(1.0, 2.0), (10.0, 2.0), (1.0, 2.0)],
        "data=2": [(1.2, 2.4), (12.0, 2.4), (1.2, 2.4)],
        "apart=2": [(1.1, 2.0), (11.0, 2.0), (1.1, 2.0)],
    }
    report = scaling.costs(times)
    assert report["data=2 slowdown"] == pytest.approx(0.2)
    assert report["data=2 overhead"] == pytest.approx(1.2 / 1.1 - 1)
    assert report["data=2 cpu_overhead"] == pytest.approx(0.2)
    assert report["data=2 train_steps_per_second"] == report["data=2 best"]
    assert report["data=1 train_steps_per_second"] == 1


def test_the_loader_is_measured_on_pictures(tmp_path):
    scaling.make_pictures(tmp_path, count=5, size=40)
    config = tiny.config(
        data__name="image_folder",
        data__path=str(tmp_path),
        data__channels=3,
        data__num_classes=2,
        train__global_batch_size=4,
    )
    assert scaling.loader_rate(config, num_batches=2, rounds=1) > 0
