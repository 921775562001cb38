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
    "model.split_attention": False,  # which skips products that the model's FLOPs count
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

    split = model.clone(split_attention=True)
    jaxpr = jax.make_jaxpr(functools.partial(forward, split))(*inputs)
    assert counted_flops(jaxpr.jaxpr) < flops


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_sampling_flops_are_those_of_the_program(guidance_scale):
    """Attention runs over the whole cache, filled or not: at least the model's, and near it."""
    overrides = TINY | {"sampling.guidance_scale": guidance_scale}
    config = load_config(str(REPOSITORY / "benchmarks/mid_model.py"), overrides)
    model = build.model(config)
    settings, schedule = build.sampling_settings(config)
    params = jax.eval_shape(build.init_params(model), jax.random.key(0))
    jaxpr = jax.make_jaxpr(
        lambda params, labels, keys: sampling.generate(
            model, params, schedule, settings, labels, keys
        )
    )(params, jnp.zeros(2, jnp.int32), jax.random.split(jax.random.key(0), 2))
    flops = 2 * sampling_flops(
        model, settings.split_sizes, schedule.num_timesteps, guidance_scale > 1
    )
    assert flops <= counted_flops(jaxpr.jaxpr) <= 1.15 * flops


@pytest.mark.parametrize("name", ["train_step", "sample"])
def test_benchmark_prints_json(name):
    overrides = [f"--config.{key}={value}" for key, value in TINY.items()]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds=1", "--matmul_size=64"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    run = subprocess.run(
        [*command, *overrides],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    values = json.loads(run.stdout.splitlines()[-1])
    assert values["benchmark"] == name
    assert values["seconds"] > 0 and values["tokens_per_second"] > 0
    assert values["ratio_to_matmul_min"] <= values["ratio_to_matmul"]
