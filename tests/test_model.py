"""The transformer's properties: causality, cached = uncached, variants that must agree, meshes.

A file of over 400 lines, as all of these share their random parameters and inputs.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import apply, example_inputs
from quick_jit import quick_jit

from cfjax import sharding
from cfjax.errors import UserError
from cfjax.flops import counted_flops
from cfjax.models.causal_fusion import CausalFusion, named_size
from cfjax.models.layers import sincos_positions
from cfjax.models.patches import patchify, unpatchify

GRID, TOKEN_WIDTH, NUM_CLASSES = (2, 3), 5, 3
NUM_TOKENS = GRID[0] * GRID[1]
SMALL = CausalFusion(
    width=16,
    depth=2,
    num_heads=2,
    grid=GRID,
    token_width=TOKEN_WIDTH,
    num_classes=NUM_CLASSES,
    num_condition_tokens=2,
)
PLANS = {
    "diffusion": [[0] * 6] * 2,
    "ar": [list(range(6))] * 2,
    "irregular": [[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 3, 3]],
}
# Float32 rounding through two layers, of activations and predictions of order 1.
ROUNDING = 2e-5


def random_params(module, seed=0):
    """Parameters without zeros or ones, such as an initialization has, that would hide a defect."""
    init = functools.partial(module.init, jax.random.key(0))
    shapes = nn.meta.unbox(jax.eval_shape(init, *example_inputs(module))["params"])
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        is_scale = path[-1].key == "scale"
        return (rng.normal(size=leaf.shape) * 0.3 + is_scale).astype(leaf.dtype)

    return {"params": jax.tree_util.tree_map_with_path(draw, shapes)}


def random_inputs(module, ids, copies=1, seed=1, num_clean=NUM_TOKENS):
    rng = np.random.default_rng(seed)
    ids = np.asarray(ids, np.int32)
    batch = len(ids)

    def normal(*shape):
        return rng.normal(size=(batch, *shape, module.token_width)).astype(np.float32)

    return {
        "labels": rng.integers(0, module.num_classes + 1, batch),
        "clean_tokens": normal(module.num_tokens)[:, :num_clean],
        "noised_tokens": normal(copies, module.num_tokens),
        "t": rng.integers(0, 1000, (batch, copies, 1)),
        "token_order": np.stack([rng.permutation(module.num_tokens) for _ in ids]),
        "ar_step_ids": ids,
    }


@functools.partial(jax.jit, static_argnums=0)
def predict(module, params, inputs):
    return module.apply(params, **inputs)


@functools.partial(quick_jit, static_argnums=(0, 3))
def influence(module, params, inputs, name):
    """Largest |d prediction / d input| by `[batch, (copy,) position]` of both."""
    tokens = inputs[name]

    def of_tokens(tokens):
        return module.apply(params, **(inputs | {name: tokens}))

    jacobian = jax.jacrev(lambda tokens: of_tokens(tokens).sum(axis=(0, -1)))(tokens)
    # [copies, L, batch, (copies,) positions, width]; examples do not mix (checked below).
    return jnp.abs(jacobian).max(-1)


@pytest.mark.parametrize("plan", PLANS)
def test_causality_by_gradient(plan):
    ids = np.asarray(PLANS[plan])
    params, inputs = random_params(SMALL), random_inputs(SMALL, ids, copies=2)
    by_clean = np.asarray(influence(SMALL, params, inputs, "clean_tokens"))
    by_noised = np.asarray(influence(SMALL, params, inputs, "noised_tokens"))
    for example in range(len(ids)):
        query, key = ids[example][:, None], ids[example][None]
        for copy in range(2):
            # A clean token counts for all later AR steps and for no other.
            np.testing.assert_array_equal(by_clean[copy, :, example] > 0, key < query)
            # A noised token counts for its own copy and AR step.
            own = by_noised[copy, :, example, copy]
            np.testing.assert_array_equal(own > 0, key == query)
            assert not by_noised[copy, :, example, 1 - copy].any()


def test_examples_do_not_mix_and_labels_count():
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"])
    before = predict(SMALL, params, inputs)
    changed = inputs | {"labels": np.array([(inputs["labels"][0] + 1) % 4, inputs["labels"][1]])}
    after = predict(SMALL, params, changed)
    np.testing.assert_array_equal(after[1], before[1])
    assert (np.abs(after[0] - before[0]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("plan", PLANS)
def test_cached_equals_uncached(plan):
    """Every AR step, denoised from the cache, as in the training sequence."""
    variables = random_params(SMALL)
    params = variables["params"]
    for example, ids in enumerate(PLANS[plan]):
        ids = np.asarray(ids)
        inputs = random_inputs(SMALL, [ids], seed=example)
        expected = predict(SMALL, variables, inputs)[:, 0]
        run = functools.partial(apply, SMALL)

        capacity = SMALL.condition_length + NUM_TOKENS
        kv_cache = SMALL.apply(variables, 1, capacity, method=CausalFusion.empty_cache)
        condition = run(CausalFusion.condition_tokens, params, inputs["labels"])
        kv_cache = run(CausalFusion.extend, params, kv_cache, condition)
        for ar_step in range(ids.max() + 1):
            positions = np.flatnonzero(ids == ar_step)
            indices = inputs["token_order"][:, positions]
            x_t = inputs["noised_tokens"][:, 0, positions]
            before = jax.tree.map(jnp.copy, kv_cache)
            prediction = run(
                CausalFusion.denoise, params, kv_cache, x_t, inputs["t"][:, 0, 0], indices
            )
            np.testing.assert_allclose(prediction, expected[:, positions], atol=ROUNDING)
            clean = inputs["clean_tokens"][:, positions]
            embedded = run(CausalFusion.clean_image_tokens, params, clean, indices)
            kv_cache = run(CausalFusion.extend, params, kv_cache, embedded)
            filled = int(before.length)
            assert int(kv_cache.length) == filled + len(positions)
            np.testing.assert_array_equal(kv_cache.keys[..., :filled], before.keys[..., :filled])


@pytest.mark.parametrize("plan", PLANS)
def test_clean_tokens_of_the_last_ar_step_may_be_left_out(plan):
    ids = np.asarray(PLANS[plan])
    params = random_params(SMALL)
    expected = predict(SMALL, params, random_inputs(SMALL, ids))
    covering = max(int((row < row.max()).sum()) for row in ids)
    inputs = random_inputs(SMALL, ids, num_clean=covering)
    np.testing.assert_allclose(predict(SMALL, params, inputs), expected, atol=ROUNDING)


def test_order_within_an_ar_step_does_not_matter():
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"][:1])
    swap = np.array([1, 0, 4, 3, 2, 5])  # within AR steps 0, 0, 1, 1, 1, 2
    swapped = inputs | {
        "clean_tokens": inputs["clean_tokens"][:, swap],
        "noised_tokens": inputs["noised_tokens"][:, :, swap],
        "token_order": inputs["token_order"][:, swap],
    }
    np.testing.assert_allclose(
        predict(SMALL, params, swapped),
        predict(SMALL, params, inputs)[:, :, swap],
        atol=ROUNDING,
    )


def test_copies_are_independent():
    ids = PLANS["irregular"]
    params, inputs = random_params(SMALL), random_inputs(SMALL, ids, copies=3)
    together = predict(SMALL, params, inputs)
    assert together.shape == (2, 3, NUM_TOKENS, TOKEN_WIDTH)
    for copy in range(3):
        alone = inputs | {name: inputs[name][:, copy : copy + 1] for name in ("noised_tokens", "t")}
        np.testing.assert_allclose(
            together[:, copy], predict(SMALL, params, alone)[:, 0], atol=ROUNDING
        )


def test_each_token_may_have_its_own_timestep():
    params, inputs = random_params(SMALL), random_inputs(SMALL, [[0, 0, 0, 1, 1, 1]])
    shared = {
        step: predict(SMALL, params, inputs | {"t": np.full((1, 1, 1), step)}) for step in (3, 700)
    }
    mixed = predict(SMALL, params, inputs | {"t": np.array([[[3] * 3 + [700] * 3]])})
    # The timestep of another AR step is not seen.
    np.testing.assert_allclose(mixed[:, :, :3], shared[3][:, :, :3], atol=ROUNDING)
    np.testing.assert_allclose(mixed[:, :, 3:], shared[700][:, :, 3:], atol=ROUNDING)
    assert np.abs(shared[3] - shared[700]).max() > 1e-2


def value_and_grad(module, params, inputs):
    @quick_jit
    def run(params):
        return jax.value_and_grad(lambda p: jnp.mean(module.apply(p, **inputs) ** 2))(params)

    return run(params)


@pytest.mark.parametrize(
    "variant",
    [
        {"remat_policy": "dots"},
        {"remat_policy": "full"},
        {"scan_layers": False},
        {"attention": "split"},
        pytest.param({"scan_layers": False, "remat_policy": "dots"}, marks=pytest.mark.long),
        pytest.param({"attention": "split", "remat_policy": "dots"}, marks=pytest.mark.long),
    ],
)
def test_scanned_rematerialized_and_split_layers_agree(variant):
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"])
    value, grads = reference = value_and_grad(SMALL, params, inputs)
    module = SMALL.clone(**variant)
    assert_same_up_to_order(value_and_grad(module, params, inputs), reference)
    # Not the comparison of nothing with nothing; softmax does not see the bias of the key norm.
    grads["params"]["blocks"]["attn"]["k_norm"].pop("bias")
    assert value > 0.1 and all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))


def assert_same_up_to_order(actual, expected):
    """Of sums that may be taken in another order, relative to the largest value of each array."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7 + 1e-5 * np.abs(b).max()),
        actual,
        expected,
    )


def test_remat_recomputes():
    """The policies differ in what the backward pass keeps, or they would not be worth a name."""
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"])

    def num_kept(policy):
        module = SMALL.clone(remat_policy=policy)
        kept = jax.eval_shape(
            lambda params: jax.vjp(lambda p: module.apply(p, **inputs), params)[1], params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(kept))

    assert num_kept("full") < num_kept("dots") < num_kept("none")


@pytest.mark.parametrize("gradient_dtype", [jnp.float32, jnp.bfloat16])
def test_dots_recompute_no_linear_map(gradient_dtype):
    """Nor does it matter how the gradients of the weights are summed."""
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"])

    def flops(policy):
        module = SMALL.clone(remat_policy=policy, dtype=jnp.bfloat16, gradient_dtype=gradient_dtype)
        gradient = jax.grad(lambda p: module.apply(p, **inputs).sum())
        return counted_flops(jax.make_jaxpr(gradient)(params).jaxpr)

    batch, _, num_tokens, _ = inputs["noised_tokens"].shape
    length = SMALL.condition_length + inputs["clean_tokens"].shape[1] + num_tokens
    attention = 2 * 2 * batch * length**2 * SMALL.width
    assert flops("dots") - flops("none") == SMALL.depth * attention
    assert flops("full") > flops("dots")


def test_bfloat16_is_close_to_float32():
    params, inputs = random_params(SMALL), random_inputs(SMALL, PLANS["irregular"])
    half = SMALL.clone(dtype=jnp.bfloat16)
    expected, prediction = predict(SMALL, params, inputs), predict(half, params, inputs)
    assert prediction.dtype == jnp.float32
    # bfloat16 keeps 8 bits, an error of 0.4% at each of some 20 roundings on the way.
    scale = np.abs(expected).max()
    difference = np.abs(prediction - expected).max()
    assert 1e-4 * scale < difference < 0.05 * scale
    init = jax.eval_shape(functools.partial(half.init, jax.random.key(0)), *example_inputs(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(init)} == {jnp.dtype("float32")}
    cache = half.apply(params, 1, 4, method=CausalFusion.empty_cache)
    assert cache.keys.dtype == jnp.bfloat16


def test_repeated_condition_tokens():
    repeated = SMALL.clone(condition_repeats=3)
    params = random_params(repeated)["params"]
    assert params["label_table"].shape == (4, 2 * 16)
    assert params["condition_positions"].shape == (6, 16)
    inputs = random_inputs(SMALL, PLANS["irregular"])
    table = params["label_table"]
    learned = params | {"label_table": np.concatenate([table, table, table], axis=1)}
    expected = predict(SMALL.clone(num_condition_tokens=6), {"params": learned}, inputs)
    np.testing.assert_array_equal(predict(repeated, {"params": params}, inputs), expected)


def test_learned_positions_start_as_the_frozen_table():
    learned, frozen = SMALL, SMALL.clone(position_embedding="sincos")
    init = jax.jit(functools.partial(learned.init, jax.random.key(0)))
    variables = nn.meta.unbox(init(*example_inputs(learned)))
    without = dict(random_params(learned)["params"])
    table = variables["params"]["token_positions"]
    np.testing.assert_allclose(table, sincos_positions(16, GRID), rtol=0, atol=1e-7)
    del without["token_positions"]
    assert jax.tree.structure({"params": without}) == jax.tree.structure(random_params(frozen))
    inputs = random_inputs(SMALL, PLANS["irregular"])
    np.testing.assert_allclose(
        predict(frozen, {"params": without}, inputs),
        predict(learned, {"params": without | {"token_positions": table}}, inputs),
        atol=ROUNDING,
    )


def test_learned_positions_start_at_a_scale():
    params = []
    for model in (SMALL, SMALL.clone(position_scale=8.0)):
        init = jax.jit(functools.partial(model.init, jax.random.key(0)))
        params.append(nn.meta.unbox(init(*example_inputs(model)))["params"])
    one, eight = params
    np.testing.assert_array_equal(eight.pop("token_positions"), 8 * one.pop("token_positions"))
    jax.tree.map(np.testing.assert_array_equal, eight, one)


def test_initialization():
    wide = SMALL.clone(width=64, num_classes=500)
    init = functools.partial(wide.init, jax.random.key(0))
    params = nn.meta.unbox(jax.jit(init)(*example_inputs(wide))["params"])
    blocks = params["blocks"]
    # Xavier-uniform bounds; queries, keys and values count as one matrix, as published.
    for kernel, inputs, outputs in (
        (params["token_embedding"]["kernel"], TOKEN_WIDTH, 64),
        (params["timestep_embedding"]["fc1"]["kernel"], 256, 64),
        (blocks["attn"]["qkv"]["kernel"], 64, 3 * 64),
        (blocks["attn"]["proj"]["kernel"], 64, 64),
        (blocks["mlp"]["fc1"]["kernel"], 64, 256),
        (blocks["mlp"]["fc2"]["kernel"], 256, 64),
    ):
        bound = (6 / (inputs + outputs)) ** 0.5
        assert 0.95 * bound < np.abs(kernel).max() <= bound
    assert not np.array_equal(blocks["mlp"]["fc1"]["kernel"][0], blocks["mlp"]["fc1"]["kernel"][1])
    np.testing.assert_allclose(np.std(params["label_table"]), 0.02, rtol=0.02)
    assert not params["final_projection"]["kernel"].any()
    assert not blocks["attn"]["proj"]["bias"].any() and "bias" not in blocks["attn"]["qkv"]
    assert (blocks["norm1"]["scale"] == 1).all()
    prediction = predict(
        SMALL, {"params": zero_final(random_params(SMALL))}, random_inputs(SMALL, PLANS["ar"])
    )
    assert not prediction.any()


def zero_final(params):
    final = jax.tree.map(np.zeros_like, params["params"]["final_projection"])
    return params["params"] | {"final_projection": final}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"remat_policy": "some"}, "remat policy 'some'"),
        ({"position_embedding": "rotary"}, "position embedding 'rotary'"),
        ({"position_embedding": "sincos", "position_scale": 8.0}, "position scale 8.0"),
        ({"num_heads": 3}, "width 16 is not divisible by 3 heads"),
        ({"width": 18}, "width 18 is not divisible by 4"),
    ],
)
def test_refusals(fields, words):
    module = SMALL.clone(**fields)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(functools.partial(module.init, jax.random.key(0)), *example_inputs(module))


def test_named_sizes():
    assert named_size("xl") == {"width": 1280, "depth": 32, "num_heads": 20}
    assert (named_size("h")["depth"], named_size("h48")["depth"]) == (40, 48)
    with pytest.raises(UserError, match=r"model size 'xxl'; did you mean 'xl'\?"):
        named_size("xxl")


WIDE = SMALL.clone(width=32, num_heads=4)


def on_mesh(mesh):
    """Value and gradient of `WIDE` as made and run on a mesh."""
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (8, NUM_TOKENS)), axis=1)
    inputs = random_inputs(WIDE, ids - ids[:, :1])
    # The final layer starts at zero, which would hide all else.
    final = random_params(WIDE)["params"]["final_projection"]
    with sharding.activate(mesh):
        init = functools.partial(WIDE.init, jax.random.key(0))
        params = sharding.born_sharded(init, mesh, *example_inputs(WIDE))["params"]
        batch = sharding.assemble_global_batch(inputs, mesh)
        return value_and_grad(WIDE, {"params": params | {"final_projection": final}}, batch)


@functools.cache
def on_one_device():
    return on_mesh(sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "sizes",
    [
        *(pytest.param(sizes, marks=pytest.mark.long) for sizes in ({}, {"fsdp": 4})),
        {"fsdp": 2, "tensor": 4},
    ],
)
def test_eight_devices_as_one(sizes):
    result = on_mesh(sharding.make_mesh(**sizes))
    kernel = result[1]["params"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert_same_up_to_order(result, on_one_device())


def test_compile_time_does_not_grow_with_depth():
    """Scanned layers are one piece of the program, however many they are."""

    def num_operations(depth, scan_layers):
        module = SMALL.clone(depth=depth, scan_layers=scan_layers)
        inputs = example_inputs(module)
        shapes = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), *inputs)
        compiled = jax.jit(module.apply).lower(nn.meta.unbox(shapes), *inputs).compile()
        return len(compiled.as_text().splitlines())

    assert num_operations(8, True) < 1.2 * num_operations(2, True)
    assert num_operations(8, False) > 2 * num_operations(2, False)


def test_patches():
    images = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    tokens = patchify(images, 2)
    assert tokens.shape == (2, 6, 12)
    # Token 4 is at row 1, column 1 of the 2 x 3 grid; within it row, column, channel.
    np.testing.assert_array_equal(tokens[1, 4], images[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(unpatchify(tokens, 2, (2, 3)), images)
