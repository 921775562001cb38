"""The transformer with published weights: training prediction, inner activations, KV-cached inference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import (
    MODELS,
    SPLITS,
    apply,
    assert_close_to_max,
    ids_of,
    in_order,
    load,
    model,
    params,
    to_latents,
    to_tokens,
)
from quick_jit import quick_jit

from cfjax.diffusion.process import add_noise
from cfjax.diffusion.schedule import make_noise_schedule
from cfjax.factorization import CLEAN, CONDITION, NOISED, mask_terms
from cfjax.models.causal_fusion import Block, CausalFusion

# Of the largest value. The published timestep angles are float32; that alone moves predictions by
# 1.2e-5 of their largest value.
RTOL = 1e-4


def training_inputs(letter, split, num_clean):
    golden = load(f"model{letter}_train_{split}")
    order = golden["ids_shuffle"]
    clean = in_order(to_tokens(letter, golden["x"]), order)[:, :num_clean]
    noised = in_order(to_tokens(letter, golden["x_t"]), order)[:, None]
    ids = ids_of(golden["split_sizes"], len(order))
    return golden["y_used"], clean, noised, golden["t"][:, None, None], order, ids


@pytest.mark.parametrize("letter", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_training_prediction(letter, split):
    golden = load(f"model{letter}_train_{split}")
    apply = quick_jit(model(letter).apply)
    num_tokens = model(letter).num_tokens
    covering = num_tokens - int(golden["last_split_size"])
    for num_clean in sorted({covering, (covering + num_tokens) // 2, num_tokens}):
        inputs = training_inputs(letter, split, num_clean)
        prediction = apply({"params": params(letter)}, *inputs)
        assert prediction.dtype == jnp.float32
        assert_close_to_max(prediction[:, 0], golden["pred"], RTOL)


@pytest.mark.parametrize("letter", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_noised_latents(letter, split):
    golden = load(f"model{letter}_train_{split}")
    x_t = add_noise(make_noise_schedule("linear"), golden["x"], golden["noise"], golden["t"])
    np.testing.assert_allclose(x_t, golden["x_t"], rtol=0, atol=1e-6)  # float32 rounding
    np.testing.assert_array_equal(to_latents(letter, to_tokens(letter, golden["x"])), golden["x"])


@pytest.mark.parametrize("letter", MODELS)
def test_inner_activations(letter):
    golden = load(f"model{letter}_train_irregular")
    module, weights = model(letter), {"params": params(letter)}
    num_tokens = module.num_tokens
    num_clean = num_tokens - int(golden["last_split_size"])
    labels, clean, noised, t, order, ids = training_inputs(letter, "irregular", num_clean)

    def embed(module, tokens, indices):
        return module.clean_image_tokens(tokens, indices)

    t_embedded = module.apply(weights, t[:, 0, 0], method=lambda m, t: m.timestep_embedding(t))
    assert_close_to_max(t_embedded, golden["dbg/t_embed"], RTOL)
    np.testing.assert_array_equal(params(letter)["label_table"][labels], golden["dbg/y_embed"])

    condition = module.apply(weights, labels, method=CausalFusion.condition_tokens)
    clean = module.apply(weights, clean, order[:, :num_clean], method=embed)
    noised = module.apply(weights, noised[:, 0], order, method=embed) + t_embedded[:, None]
    x = jnp.concatenate([condition, clean, noised], axis=1)
    assert_close_to_max(x[:1], golden["dbg/seq_in"], RTOL)

    lengths = [module.condition_length, num_clean, num_tokens]
    kinds = np.repeat([CONDITION, CLEAN, NOISED], lengths)
    sequence_ids = np.concatenate([0 * kinds[: lengths[0]], ids[0, :num_clean], ids[0]])
    terms = mask_terms(jnp.asarray(kinds)[None], jnp.asarray(sequence_ids)[None], num_tokens)
    num_context = module.condition_length + num_clean
    terms = tuple(
        jax.tree.map(lambda term, rows=rows: term[:, rows], terms)
        for rows in (slice(num_context), slice(num_context, None))
    )
    first_layer = {"params": jax.tree.map(lambda leaf: leaf[0], params(letter)["blocks"])}
    for attention in ("fused", "split"):
        block = Block(module.num_heads, module.mlp_ratio, module.dtype, module.dtype, attention)
        (output, _), captured = block.apply(
            first_layer, golden["dbg/seq_in"], None, terms, None, capture_intermediates=True
        )
        inner = captured["intermediates"]
        assert_close_to_max(inner["norm1"]["__call__"][0], golden["dbg/attn0_in"], 1e-5)
        assert_close_to_max(inner["attn"]["__call__"][0][0], golden["dbg/attn0_out"], 1e-5)
        assert_close_to_max(output, golden["dbg/block0_out"], 1e-5)


def guided(prediction, scale):
    """Of a batch `[conditional | unconditional]`."""
    if scale == 1:
        return prediction
    conditional, unconditional = np.split(np.asarray(prediction), 2)
    return unconditional + scale * (conditional - unconditional)


def assert_cache(kv_cache, golden, prefix):
    """Compares the filled entries with golden keys and values `[N, heads, length, head_width]`."""
    length = int(kv_cache.length)
    compared = [key for key in golden if key.startswith(prefix)]
    assert compared
    for key in compared:
        layer, name = key.removeprefix(prefix).split("/")
        ours = {"k": kv_cache.keys, "v": kv_cache.values}[name][int(layer.removeprefix("layer"))]
        assert_close_to_max(ours[..., :length].swapaxes(2, 3), golden[key], RTOL)


@pytest.mark.parametrize("letter", MODELS)
@pytest.mark.parametrize(("scale", "spare"), [(1, 5), (3, 0)])
def test_cached_inference(letter, scale, spare):
    golden, module = load(f"model{letter}_infer"), model(letter)
    weights, prefix = params(letter), f"cfg{scale}"
    first = int(golden["k1"])
    copies = 1 if scale == 1 else 2
    order = np.concatenate([golden["order"]] * copies)
    labels = golden["y"]
    if scale != 1:
        labels = np.concatenate([labels, np.full_like(labels, golden["null_label"])])
    assert module.null_class == golden["null_label"]
    raster = np.broadcast_to(np.arange(module.num_tokens), order.shape)
    x_start, x_t = (np.concatenate([golden[name]] * copies) for name in ("x0_tokens", "xn_tokens"))

    run = functools.partial(apply, module)

    def assert_predictions(kv_cache, tokens, indices, names):
        for name in names:
            t = np.full(len(labels), int(name.split("/t")[1]))
            prediction = run(CausalFusion.denoise, weights, kv_cache, tokens, t, indices)
            prediction = guided(prediction, scale)
            assert_close_to_max(prediction, golden[f"{prefix}/{name}"], RTOL)

    condition = run(CausalFusion.condition_tokens, weights, labels)
    np.testing.assert_array_equal(condition, golden[f"{prefix}/cond_tokens"])
    capacity = module.condition_length + first + spare
    kv_cache = module.apply(
        {"params": weights}, len(labels), capacity, method=CausalFusion.empty_cache
    )
    kv_cache = run(CausalFusion.extend, weights, kv_cache, condition)
    assert_cache(kv_cache, golden, f"{prefix}/cache_cond/")

    times = [f"t{t}" for t in golden["ts"]]
    assert_predictions(kv_cache, x_t, raster, [f"all/{t}" for t in times])
    indices = order[:, :first]
    assert_predictions(kv_cache, in_order(x_t, indices), indices, [f"ar1/{t}" for t in times])

    clean = run(CausalFusion.clean_image_tokens, weights, in_order(x_start, indices), indices)
    expected = np.concatenate([golden[f"{prefix}/clean_tokens"]] * copies)
    assert_close_to_max(clean, expected, RTOL)
    kv_cache = run(CausalFusion.extend, weights, kv_cache, clean)
    assert_cache(kv_cache, golden, f"{prefix}/cache_ar/")
    indices = order[:, first:]
    assert_predictions(kv_cache, in_order(x_t, indices), indices, [f"ar2/{t}" for t in times])
