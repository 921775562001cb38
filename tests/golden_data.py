"""Loads the golden arrays (see golden/README.md) in this package's layouts, cached for the session."""

import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cfjax.convert.causal_fusion import params_from_published
from cfjax.models.causal_fusion import CausalFusion
from cfjax.models.patches import patchify, unpatchify

FOLDER = pathlib.Path(__file__).parent / "golden"
MODELS = ("A", "B")
SPLITS = ("diffusion", "ar", "irregular")


@functools.cache
def load(name):
    """The arrays of `golden/{name}.npz` by key."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@functools.cache
def published_shapes():
    """Shapes by published name, of the full-size models by name."""
    return json.loads((FOLDER / "param_shapes.json").read_text())


@functools.cache
def constructor(letter):
    """The published constructor's arguments of golden model "A" or "B"."""
    return json.loads(str(load(f"model{letter}_params")["config"]))


@functools.cache
def published_params(letter):
    """The published state dict of golden model "A" or "B"."""
    arrays = load(f"model{letter}_params").items()
    return {key.removeprefix("param/"): array for key, array in arrays if key != "config"}


def model(letter, **overrides):
    """Our model of the sizes of golden model "A" or "B"."""
    config = constructor(letter)
    side = config["input_size"] // config["patch_size"]
    fields = {
        "width": config["hidden_size"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "grid": (side, side),
        "token_width": config["patch_size"] ** 2 * config["latent_channels"],
        "num_classes": config["num_classes"],
        "num_condition_tokens": config["num_cond_tokens"],
        "position_embedding": "learned" if config["trainable_pos"] else "sincos",
    }
    return CausalFusion(**(fields | overrides))


def example_inputs(module, batch=1, copies=1):
    """Zeros of the shapes of the inputs of `CausalFusion.__call__`."""
    num_tokens = module.num_tokens
    tokens = jnp.zeros((batch, num_tokens, module.token_width))
    ids = jnp.zeros((batch, num_tokens), jnp.int32)
    noised = jnp.zeros((batch, copies, num_tokens, module.token_width))
    timesteps = jnp.zeros((batch, copies, 1), jnp.int32)
    return jnp.zeros(batch, jnp.int32), tokens, noised, timesteps, ids, ids


def param_shapes(module):
    """Shapes of the model's parameters, without boxes and without making them."""
    init = functools.partial(module.init, jax.random.key(0))
    return nn.meta.unbox(jax.eval_shape(init, *example_inputs(module))["params"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(module, method, params, *args):
    """A method of the model, compiled."""
    return module.apply({"params": params}, *args, method=method)


@functools.cache
def params(letter):
    """The published weights of golden model "A" or "B" as our parameters."""
    module = model(letter)
    return params_from_published(published_params(letter), param_shapes(module), module.grid)


def to_tokens(letter, latents):
    """Latents `[N, C, H, W]` to tokens `[N, L, p * p * C]` in raster order."""
    return patchify(np.moveaxis(latents, 1, -1), constructor(letter)["patch_size"])


def to_latents(letter, tokens):
    """Inverse of `to_tokens`."""
    images = unpatchify(tokens, constructor(letter)["patch_size"], model(letter).grid)
    return np.moveaxis(np.asarray(images), -1, 1)


def in_order(tokens, order):
    """Tokens `[N, L, ...]` in raster order to generation order `[N, L, ...]`."""
    return np.take_along_axis(np.asarray(tokens), order[:, :, None], axis=1)


def ids_of(split_sizes, batch):
    """AR-step ids `[batch, L]` of one split shared by the batch."""
    ids = np.concatenate([[step] * size for step, size in enumerate(split_sizes)])
    return np.broadcast_to(ids.astype(np.int32), (batch, len(ids)))


def assert_close_to_max(actual, expected, rtol):
    """Asserts |actual - expected| <= rtol * max|expected| elementwise, and equal shapes."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert difference <= rtol * scale, (
        f"differs by {difference:.3g}, {difference / scale:.3g} of max"
    )
