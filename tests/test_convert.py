"""Published names: round trips, and what is refused."""

import jax
import numpy as np
import pytest
from golden_data import (
    MODELS,
    model,
    param_shapes,
    params,
    published_params,
    published_shapes,
)

from cfjax.convert import causal_fusion as convert
from cfjax.convert import published_file, transformer
from cfjax.convert.causal_fusion import params_from_published, params_to_published
from cfjax.convert.report import Report
from cfjax.errors import UserError
from cfjax.models.causal_fusion import SIZES, CausalFusion, named_size


def full_size(name):
    return CausalFusion(
        **named_size(name),
        grid=(16, 16),
        token_width=16,
        num_classes=1000,
        num_condition_tokens=64,
    )


@pytest.mark.parametrize("letter", MODELS)
def test_published_to_ours_and_back(letter):
    published = published_params(letter)
    again = params_to_published(params(letter), model(letter).grid)
    assert set(again) == set(published)
    for name, array in published.items():
        assert again[name].dtype == np.float32
        if name == "pos_embed" and letter == "B":
            # The frozen table is computed anew; the published one was rounded by another library.
            np.testing.assert_allclose(again[name], array, rtol=0, atol=1e-7)
        else:
            np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize("position_embedding", ["learned", "sincos"])
def test_ours_to_published_and_back(position_embedding):
    module = model("A", position_embedding=position_embedding, width=32, grid=(2, 3))
    shapes = param_shapes(module)
    rng = np.random.default_rng(0)
    ours = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    published = params_to_published(ours, module.grid)
    again = params_from_published(published, shapes, module.grid)
    jax.tree.map(np.testing.assert_array_equal, again, ours)
    assert jax.tree.structure(again) == jax.tree.structure(ours)


def test_every_published_value_is_used_once():
    """Distinct numbers go in, the same numbers come out: nothing is dropped or duplicated."""
    published, begin = {}, 0
    for name, array in published_params("A").items():
        numbers = np.arange(begin, begin + array.size, dtype=np.float32)
        published[name], begin = numbers.reshape(array.shape), begin + array.size
    ours = params_from_published(published, param_shapes(model("A")), model("A").grid)
    numbers = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(ours)])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(begin))


def test_boxed_parameters_are_taken_too():
    module = model("A")
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *_inputs(module))["params"])
    ours = params_from_published(published_params("A"), boxed, module.grid)
    jax.tree.map(np.testing.assert_array_equal, ours, params("A"))


def _inputs(module):
    num_tokens = module.num_tokens
    ids = np.zeros((1, num_tokens), np.int32)
    tokens = np.zeros((1, num_tokens, module.token_width), np.float32)
    return ids[:, 0], tokens, tokens[:, None], ids[:, :1, None], ids, ids


def test_missing_extra_and_misshapen_entries_are_listed_together():
    published = dict(published_params("A"))
    del published["x_proj.bias"], published["blocks.2.mlp.fc1.weight"]
    published["blocks.3.norm1.weight"] = np.ones(64, np.float32)
    published["cond_pos_embed"] = np.ones((1, 5, 64), np.float32)
    published["blocks.0.attn.qkv.weight"] = published["blocks.0.attn.qkv.weight"].T
    with pytest.raises(UserError) as error:
        params_from_published(published, param_shapes(model("A")), model("A").grid)
    for words in (
        "missing x_proj.bias;",
        "missing blocks.2.mlp.fc1.weight;",
        "extra blocks.3.norm1.weight;",
        "cond_pos_embed is (1, 5, 64) but the model's is (1, 4, 64);",
        "blocks.0.attn.qkv.weight is (64, 192) but the model's is (192, 64);",
    ):
        assert words in str(error.value)
    assert str(error.value).count(";") == 5  # those and nothing else


@pytest.mark.parametrize("other", [{"depth": 2}, {"num_classes": 9}, {"grid": (4, 4)}])
def test_weights_of_another_model_are_refused(other):
    module = model("A", **other)
    with pytest.raises(UserError, match="don't fit the model"):
        params_from_published(published_params("A"), param_shapes(module), module.grid)


def test_frozen_positions_are_checked():
    module = model("A", position_embedding="sincos")
    with pytest.raises(UserError, match=r"pos_embed differs .* learned positions"):
        params_from_published(published_params("A"), param_shapes(module), module.grid)
    # Frozen positions fit a model that would go on to learn them.
    learned = model("B", position_embedding="learned")
    ours = params_from_published(published_params("B"), param_shapes(learned), learned.grid)
    np.testing.assert_array_equal(ours["token_positions"], published_params("B")["pos_embed"][0])


@pytest.mark.parametrize(
    ("size", "published"),
    [("l", "CausalFusion-L"), ("xl", "CausalFusion-XL"), ("h48", "CausalFusion-H")],
)
def test_full_sizes_have_the_published_names_and_shapes(size, published):
    shapes = param_shapes(full_size(size))
    expected = dict(published_shapes()[published])
    total = expected.pop("__total__")
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total
    converted = convert.published_shapes(shapes, (16, 16))
    assert {name: list(shape) for name, shape in converted.items()} == expected
    assert list(converted) == list(expected)  # by which the optimizer's state is numbered


def test_models_that_the_published_code_lacks_are_refused(tmp_path):
    repeating = full_size("tiny").clone(condition_repeats=2)
    with pytest.raises(UserError, match=r"model\.condition_repeats is 2"):
        transformer.to_published(tmp_path, None, repeating, {}, None, tmp_path / "x.pt", Report())


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ("l", {"data.size": 16, "data.channels": 16, "model.patch_size": 1}),
        ("tiny", {"data.size": 32, "data.channels": 16, "model.patch_size": 2}),
        ("xl", {"data.size": 16, "data.channels": 4, "model.patch_size": 1}),
    ],
)
def test_sizes_follow_from_shapes(size, fields):
    token_width = fields["data.channels"] * fields["model.patch_size"] ** 2
    module = full_size(size).clone(token_width=token_width)
    sizes = published_file.infer_sizes(convert.published_shapes(param_shapes(module), (16, 16)))
    named = {f"model.{name}": value for name, value in named_size(size).items()}
    assert sizes == fields | named | {
        "model.mlp_ratio": 4.0,
        "model.num_condition_tokens": 64,
        "model.condition_repeats": 1,
        "model.position_embedding": "learned",
        "data.num_classes": 1000,
    }


def test_h_of_the_paper_has_a_billion_parameters():
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(full_size("h"))))
    # As published but for eight of the 48 layers.
    layer = {
        name: shape
        for name, shape in published_shapes()["CausalFusion-H"].items()
        if name.startswith("blocks.0.")
    }
    per_layer = sum(int(np.prod(shape)) for shape in layer.values())
    assert count == published_shapes()["CausalFusion-H"]["__total__"] - 8 * per_layer
    assert round(count / 1e9, 1) == 1.0
    assert SIZES["h"]["depth"] == 40
