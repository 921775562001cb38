"""Four published training iterations: clipping, AdamW, warm-up and EMA."""

import functools

import jax
import numpy as np
import optax
import pytest
from golden_data import (
    MODELS,
    ids_of,
    in_order,
    load,
    model,
    params,
    published_params,
    to_tokens,
)
from quick_jit import quick_jit

from cfjax import objective, train_state
from cfjax.convert.causal_fusion import params_to_published
from cfjax.diffusion.schedule import make_noise_schedule
from cfjax.factorization import Factorization, FactorizationPlan
from cfjax.optimizer import OptimizerSettings, learning_rate_schedule, make_optimizer


def settings_of(golden):
    # Stored as float32; the published run used the short decimals.
    def setting(name):
        return round(float(golden[name]), 16 if name == "eps" else 6)

    b1, b2 = (round(float(beta), 6) for beta in golden["betas"])
    settings = OptimizerSettings(
        learning_rate=setting("lr"),
        warmup_steps=int(golden["warmup_steps"]),
        b1=b1,
        b2=b2,
        eps=setting("eps"),
        max_grad_norm=setting("clip"),
    )
    return settings, setting("ema_decay")


@functools.cache
def gradients_of(letter):
    """A compiled function of parameters and an iteration's number: its loss and their gradients."""
    golden, module = load(f"model{letter}_optim"), model(letter)
    published = objective.Objective(Factorization("decayed"), make_noise_schedule("linear"))

    @quick_jit
    def compiled(params, tokens, drawn):
        def loss_fn(params):
            return objective.loss(published, module, params, tokens, drawn).loss

        return jax.value_and_grad(loss_fn)(params)

    def loss_and_gradients(params, i):
        order = golden["ids_shuffle"][i]
        drawn = objective.Corruption(
            np.where(golden["drop_mask"][i], module.null_class, golden["y"][i]),
            FactorizationPlan(order, ids_of(golden[f"step{i}/split_sizes"], len(order))),
            golden["t"][i][:, None, None],
            in_order(to_tokens(letter, golden["noise"][i]), order)[:, None],
        )
        return compiled(params, to_tokens(letter, golden["x"][i]), drawn)

    return loss_and_gradients


def iterate(letter, state, iterations):
    """The state after these of our iterations, and loss and gradient norm of each."""
    settings, ema_decay = settings_of(load(f"model{letter}_optim"))
    optimizer = make_optimizer(settings)

    @jax.jit
    def update(state, grads):
        new_state = train_state.apply_gradients(state, grads, optimizer, ema_decay)
        return new_state, optax.tree.norm(grads)

    losses, norms = [], []
    for i in iterations:
        loss, grads = gradients_of(letter)(state.params, i)
        state, norm = update(state, grads)
        losses.append(float(loss))
        norms.append(float(norm))
    return state, losses, norms


@functools.cache
def run(letter):
    """Loss and gradient norm of each iteration, and the published names of the final state."""
    optimizer = make_optimizer(settings_of(load(f"model{letter}_optim"))[0])
    state = train_state.create(jax.tree.map(jax.numpy.asarray, params(letter)), optimizer)
    state, losses, norms = iterate(letter, state, range(4))
    return losses, norms, *published_ends(letter, state)


def published_ends(letter, state):
    """Parameters and their average by published name."""
    grid = model(letter).grid
    return params_to_published(state.params, grid), params_to_published(state.ema_params, grid)


def assert_published_ends(letter, final, ema):
    """Asserts that these are what four published iterations end with."""
    golden = load(f"model{letter}_optim")
    compared = [key.removeprefix("after/") for key in golden if key.startswith("after/")]
    assert len(compared) >= 9
    for name in compared:
        # Float32 rounding of parameters of order 1; four updates moved them by up to 2.5e-3.
        for ours, key in ((final, "after"), (ema, "ema")):
            np.testing.assert_allclose(
                ours[name], golden[f"{key}/{name}"], rtol=0, atol=2e-6, err_msg=f"{key}/{name}"
            )


@pytest.mark.parametrize("letter", MODELS)
def test_learning_rates(letter):
    golden = load(f"model{letter}_optim")
    schedule = learning_rate_schedule(settings_of(golden)[0])
    np.testing.assert_allclose([schedule(i) for i in range(4)], golden["lr_used"], rtol=1e-6)


@pytest.mark.parametrize("letter", MODELS)
def test_losses_and_gradient_norms(letter):
    golden, (losses, norms, _, _) = load(f"model{letter}_optim"), run(letter)
    np.testing.assert_allclose(losses, golden["loss"], rtol=2e-5)
    np.testing.assert_allclose(norms, golden["grad_norm_before_clip"], rtol=5e-4)


@pytest.mark.parametrize("letter", MODELS)
def test_parameters_and_ema(letter):
    golden, (_, _, final, ema) = load(f"model{letter}_optim"), run(letter)
    assert_published_ends(letter, final, ema)
    moved = {key.removeprefix("deltanorm/") for key in golden if key.startswith("deltanorm/")}
    assert moved == set(final)
    for name in moved:
        # The gradient of this one is rounding noise, which Adam turns into full updates.
        if not name.endswith("k_norm.bias"):
            change = np.linalg.norm(final[name] - published_params(letter)[name])
            np.testing.assert_allclose(
                change, golden[f"deltanorm/{name}"], rtol=5e-5, atol=2e-6, err_msg=name
            )
