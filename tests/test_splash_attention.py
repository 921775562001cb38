"""Splash attention, interpreted on the CPU: equal to fused attention in all that training uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import example_inputs
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval
from quick_jit import quick_jit
from test_model import PLANS, SMALL, assert_same_up_to_order, random_inputs, random_params

from cfjax import sharding
from cfjax.errors import UserError
from cfjax.factorization import CLEAN, CONDITION, NOISED, generalized_causal_mask, mask_terms
from cfjax.flops import counted_flops
from cfjax.models.attention import ATTENDED, HEADS, attend
from cfjax.models.masks import MaskFunction, PackedMask
from cfjax.models.splash_attention import (
    LANES,
    MAX_BLOCK,
    SUBLANES,
    block_sizes,
    splash_attention,
)

SPLASH = SMALL.clone(attention="splash")
ONE_DEVICE = sharding.make_mesh(devices=jax.devices()[:1])


def dense_mask(function, ids):
    lengths = [function.num_condition, function.num_clean, function.num_tokens * function.copies]
    kinds = np.repeat([CONDITION, CLEAN, NOISED], lengths)
    copies = np.repeat(np.arange(function.copies), function.num_tokens)
    kinds[lengths[0] + lengths[1] :] += copies
    condition = np.zeros((len(ids), lengths[0]), int)
    clean = ids[:, : function.num_clean]
    every = np.concatenate([condition, clean, *[ids] * function.copies], axis=1)
    terms = mask_terms(jnp.asarray(kinds)[None], jnp.asarray(every), function.num_tokens)
    return np.asarray(generalized_causal_mask(terms, terms))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("num_condition", [0, 2])
def test_packed_mask_is_the_generalized_causal_mask(plan, copies, num_condition):
    ids = np.asarray(PLANS[plan])
    num_before = max(int((row < row.max()).sum()) for row in ids)
    for num_clean in {num_before, 6}:
        function = MaskFunction(num_condition, num_clean, 6, copies)
        packed = function.pack(jnp.asarray(ids))
        assert packed.shape == (2, function.length)
        keys = jnp.arange(function.length + 5)
        seen = np.asarray(function(packed[..., None], keys[None, None]))
        np.testing.assert_array_equal(seen[..., : function.length], dense_mask(function, ids))
        assert not seen[..., function.length :].any()


def test_packed_mask_of_long_sequences():
    """512 x 512 pixels in tokens of one latent, with four copies; the largest ids of each field."""
    function = MaskFunction(64, 1024, 1024, 4)
    ids = np.stack([np.arange(1024), np.zeros(1024, int), np.arange(1024) // 512])
    seen = function(function.pack(jnp.asarray(ids))[..., None], jnp.arange(5184)[None, None])
    np.testing.assert_array_equal(seen, dense_mask(function, ids))
    with pytest.raises(UserError, match=r'16384 noised tokens take 32; use .*attention="fused"'):
        MaskFunction(64, 16384, 16384, 3)


def attention_inputs(function, ids, heads, width, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (len(ids), function.length, heads, width)
    queries, *others = (jax.random.normal(key, shape, dtype) for key in keys)
    return queries * width**-0.5, *others


@functools.partial(quick_jit, static_argnums=0)
def output_and_gradients(attention, queries, keys, values, cotangent):
    output, pullback = jax.vjp(attention, queries, keys, values)
    return output, pullback(cotangent)


# Float32: sums of up to 1200 terms in another order. In bfloat16 the attention weights are rounded
# to 8 bits before the product with the values, in one of the two.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [40, 600])
def test_equals_fused_in_output_and_gradients(num_tokens, dtype, tolerance):
    """One block for 84 tokens; for 1204 two of 640, and of the keys one part or, in float32, two."""
    function = MaskFunction(4, num_tokens, num_tokens, 1)
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (2, num_tokens)), axis=1)
    mask = PackedMask(function.pack(jnp.asarray(ids)), function)
    dense = jnp.asarray(dense_mask(function, ids))
    arguments = attention_inputs(function, ids, 2, 16, dtype)
    with jax.set_mesh(ONE_DEVICE):
        result = output_and_gradients(
            lambda *qkv: splash_attention(*qkv, mask, HEADS, ATTENDED), *arguments
        )
    expected = output_and_gradients(
        lambda queries, keys, values: attend(queries, keys, values, dense), *arguments
    )
    for ours, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == dtype
        ours, other = (np.asarray(x, np.float32) for x in (ours, other))
        np.testing.assert_allclose(ours, other, rtol=0, atol=tolerance * np.abs(other).max())


def value_and_grad(module, params, inputs, mesh=ONE_DEVICE):
    with sharding.activate(mesh):
        return quick_jit(
            jax.value_and_grad(lambda params: jnp.mean(module.apply(params, **inputs) ** 2))
        )(params)


@pytest.mark.parametrize(
    ("plan", "copies", "num_clean"),
    [
        ("irregular", 2, 6),
        ("diffusion", 1, None),
        pytest.param("ar", 1, 6, marks=pytest.mark.long),
        pytest.param("irregular", 1, None, marks=pytest.mark.long),
    ],
)
def test_model_with_splash_equals_fused(plan, copies, num_clean):
    """One split for the batch and one for each example ("irregular").

    `num_clean` None: no more than the plan needs, so none for pure diffusion.
    """
    ids = np.asarray(PLANS[plan])
    if num_clean is None:
        num_clean = max(int((row < row.max()).sum()) for row in ids)
        assert num_clean == 0 or plan != "diffusion"
    params = random_params(SMALL)
    inputs = random_inputs(SMALL, ids, copies=copies, num_clean=num_clean)
    assert_same_up_to_order(
        value_and_grad(SPLASH, params, inputs), value_and_grad(SMALL, params, inputs)
    )


@functools.cache
def fused_irregular():
    return value_and_grad(SMALL, random_params(SMALL), random_inputs(SMALL, PLANS["irregular"]))


@pytest.mark.parametrize(
    "variant",
    [
        {"remat_policy": "dots"},
        pytest.param({"remat_policy": "full"}, marks=pytest.mark.long),
        pytest.param({"scan_layers": False, "remat_policy": "dots"}, marks=pytest.mark.long),
    ],
)
def test_scanned_and_rematerialized_splash_agrees(variant):
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"])
    result = value_and_grad(SPLASH.clone(**variant), params, inputs)
    assert_same_up_to_order(result, fused_irregular())


def kernels(jaxpr):
    """Names of the Pallas kernels in a jaxpr."""
    names = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            names.append(equation.params["name"])
        else:
            for inner in jaxprs_in_params(equation.params):
                names += kernels(inner)
    return names


@pytest.mark.parametrize(("policy", "num_forward"), [("none", 1), ("dots", 1), ("full", 2)])
def test_remat_keeps_what_splash_returns(policy, num_forward):
    """The kernel of the forward pass runs again in the backward pass only if nothing is kept."""
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"])
    module = SPLASH.clone(remat_policy=policy)
    with sharding.activate(ONE_DEVICE):
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda params: jnp.mean(module.apply(params, **inputs) ** 2))
        )(params)
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    names = kernels(used)
    assert sum("fwd" in name for name in names) == num_forward, names
    assert sum("dkv" in name for name in names) == 1, names


def test_eight_devices_as_one():
    wide = SMALL.clone(width=32, num_heads=4)
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (8, 6)), axis=1)
    inputs, params = random_inputs(wide, ids - ids[:, :1]), random_params(wide)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = sharding.assemble_global_batch(inputs, mesh)
    with sharding.activate(mesh):
        shardings = sharding.state_shardings(
            jax.eval_shape(functools.partial(wide.init, jax.random.key(0)), *example_inputs(wide)),
            mesh,
        )
    result = value_and_grad(
        wide.clone(attention="splash"), jax.device_put(params, shardings), batch, mesh
    )
    assert len(result[1]["params"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.device_set) == 8
    assert_same_up_to_order(result, value_and_grad(wide, params, inputs))


def test_no_mesh_is_refused():
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"])
    with pytest.raises(UserError, match=r"inside cfjax\.sharding\.activate\(mesh\)"):
        SPLASH.apply(params, **inputs)


def test_counted_flops():
    """Two products forward, five backward, of padded sequences, and one row sum of products."""

    def counted(module, mesh):
        params, inputs = random_params(module), random_inputs(module, [range(6)] * 8)
        with sharding.activate(mesh):
            gradient = jax.grad(lambda params: jnp.mean(module.apply(params, **inputs) ** 2))
            return counted_flops(jax.make_jaxpr(gradient)(params).jaxpr)

    def product(num_queries, num_keys):
        return 8 * SMALL.depth * 2 * num_queries * num_keys * SMALL.width

    length = SMALL.condition_length + 12
    others = counted(SMALL, ONE_DEVICE) - 6 * product(length, length)
    padded = -(-length // SUBLANES) * SUBLANES
    expected = others + 7 * product(padded, LANES) + product(padded, 1)
    assert counted(SPLASH, ONE_DEVICE) == expected
    assert counted(SPLASH, sharding.make_mesh(fsdp=2, tensor=2)) == expected


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "queries", "block", "keys"),
    [
        (13, jnp.bfloat16, 16, 128, 128),
        (320, jnp.bfloat16, 320, 384, 384),
        (575, jnp.bfloat16, 576, 640, 640),
        (1088, jnp.bfloat16, 640, 640, 1280),
        (2112, jnp.bfloat16, 768, 768, 2304),
        (2112, jnp.float32, 640, 640, 1280),
        (5184, jnp.bfloat16, 640, 640, 1920),
    ],
)
def test_blocks_follow_from_the_length(num_tokens, dtype, queries, block, keys):
    sizes = block_sizes(num_tokens, dtype)
    assert (sizes.block_q, sizes.block_kv, sizes.block_kv_compute) == (queries, keys, block)
    assert (sizes.block_q_dkv, sizes.block_kv_dkv) == (queries, keys)
    assert sizes.has_backward_blocks
    assert block % LANES == 0 and block <= MAX_BLOCK
