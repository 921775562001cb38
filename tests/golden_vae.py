"""The golden autoencoder: its module, our parameters, and arrays in this package's layout."""

import functools
import json

import flax.traverse_util
import golden_data
import jax
import numpy as np

from cfjax.autoencoder_files import flat_shapes
from cfjax.convert import autoencoder_kl as convert
from cfjax.models.autoencoder_kl import AutoencoderKL

SCALE = 0.2325


def arrays():
    """The arrays of `golden/vae.npz` by key."""
    return golden_data.load("vae")


def nhwc(key):
    """An array, channels last."""
    return np.moveaxis(arrays()[key], 1, -1)


def published_params():
    """The published state dict."""
    return {
        key.removeprefix("param/"): array
        for key, array in arrays().items()
        if key.startswith("param/")
    }


@functools.cache
def module():
    """Our module of its config."""
    config = json.loads(str(arrays()["config"]))
    levels = [config["resolution"] // 2**level for level in range(len(config["ch_mult"]))]
    encoder, decoder = (
        tuple(levels.index(size) for size in config[f"{side}_attn_resolutions"])
        for side in ("encoder", "decoder")
    )
    return AutoencoderKL(
        channels=config["ch"],
        channel_multipliers=tuple(config["ch_mult"]),
        latent_channels=config["embed_dim"],
        scale=SCALE,
        num_res_blocks=config["num_res_blocks"],
        encoder_attention_levels=encoder,
        decoder_attention_levels=decoder,
    )


@functools.cache
def params():
    """The published weights as our parameters."""
    layout, published = convert.LAYOUTS["ldm"], published_params()
    num_levels = len(module().channel_multipliers)
    flat = {
        path: convert.to_ours(published[convert.published_name(path, layout, num_levels)], shape)
        for path, shape in flat_shapes(module()).items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(module, method, params, *args):
    """A method of the module, compiled."""
    return module.apply({"params": params}, *args, method=method)
