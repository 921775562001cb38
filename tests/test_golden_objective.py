"""Loss and gradients of the published batches, for one, L and some AR steps."""

import functools

import jax
import numpy as np
import pytest
from golden_data import (
    MODELS,
    SPLITS,
    assert_close_to_max,
    ids_of,
    in_order,
    load,
    model,
    params,
    to_tokens,
)
from quick_jit import quick_jit

from cfjax import objective
from cfjax.convert.causal_fusion import params_to_published
from cfjax.diffusion.schedule import make_noise_schedule
from cfjax.factorization import Factorization, FactorizationPlan

MODES = {"diffusion": "diffusion", "ar": "ar", "irregular": "decayed"}


@functools.cache
def loss_and_grads(letter, split):
    golden = load(f"model{letter}_train_{split}")
    module = model(letter)
    published = objective.Objective(Factorization(MODES[split]), make_noise_schedule("linear"))
    order = golden["ids_shuffle"]
    labels = np.where(golden["drop_mask"], module.null_class, golden["y"])
    np.testing.assert_array_equal(labels, golden["y_used"])
    drawn = objective.Corruption(
        labels,
        FactorizationPlan(order, ids_of(golden["split_sizes"], len(order))),
        golden["t"][:, None, None],
        in_order(to_tokens(letter, golden["noise"]), order)[:, None],
    )
    tokens = to_tokens(letter, golden["x"])

    def loss_fn(params):
        output = objective.loss(published, module, params, tokens, drawn)
        return output.loss, output

    (_, output), grads = quick_jit(jax.value_and_grad(loss_fn, has_aux=True))(params(letter))
    return output, params_to_published(grads, module.grid)


@pytest.mark.parametrize("letter", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_loss(letter, split):
    golden, (output, _) = load(f"model{letter}_train_{split}"), loss_and_grads(letter, split)
    # The published timestep angles are float32: predictions move by 1.2e-5 of their largest value.
    assert_close_to_max(output.prediction[:, 0], golden["pred"], 1e-4)
    assert_close_to_max(output.squared_error[:, 0], golden["loss_elem"], 5e-4)
    np.testing.assert_allclose(output.loss, golden["loss"], rtol=2e-5)
    np.testing.assert_allclose(output.loss, golden["f64/loss"], rtol=2e-5)


@pytest.mark.parametrize("letter", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_gradients(letter, split):
    golden, (_, grads) = load(f"model{letter}_train_{split}"), loss_and_grads(letter, split)
    compared = [key.removeprefix("grad/") for key in golden if key.startswith("grad/")]
    assert len(compared) >= 10
    for name in compared:
        assert_close_to_max(grads[name], golden[f"grad/{name}"], 5e-4)

    norms = {key.removeprefix("gradnorm/") for key in golden if key.startswith("gradnorm/")}
    frozen = set() if "token_positions" in params(letter) else {"pos_embed"}
    assert norms == set(grads) - frozen
    for name in norms:
        norm = np.linalg.norm(grads[name])
        if name.endswith("k_norm.bias"):
            # Zero but for rounding: softmax does not see a constant added to all keys.
            assert norm < 1e-5 and golden[f"gradnorm/{name}"] < 1e-5
        else:
            np.testing.assert_allclose(norm, golden[f"gradnorm/{name}"], rtol=5e-4, err_msg=name)
