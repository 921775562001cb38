"""The KL autoencoder against the published one, its named configs, and decoding in tiles."""

import functools

import golden_vae
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import assert_close_to_max, published_shapes
from golden_vae import nhwc

from cfjax.autoencoder_files import flat_shapes
from cfjax.convert import autoencoder_kl as convert
from cfjax.data.images import to_uint8
from cfjax.errors import UserError
from cfjax.models.autoencoder_kl import KL8, KL16, NAMED, AutoencoderKL, Moments, split_moments
from cfjax.models.tiled_decoding import decode_tiled

# The published float32 code differs from itself in float64 by 1e-6 (moments) and 1.7e-6 (images).
RTOL = 1e-5


def test_encodes_as_published():
    parameters = golden_vae.apply(
        golden_vae.module(), "encode_parameters", golden_vae.params(), nhwc("image")
    )
    assert_close_to_max(parameters, nhwc("moments"), RTOL)
    moments = split_moments(parameters)
    assert_close_to_max(moments.mean, nhwc("mean"), RTOL)
    assert_close_to_max(moments.logvar, nhwc("logvar"), RTOL)
    assert moments.mode() is moments.mean


def test_samples_and_scales_as_published(monkeypatch):
    moments = Moments(nhwc("mean"), nhwc("logvar"))
    monkeypatch.setattr(jax.random, "normal", lambda *_: nhwc("eps"))
    sample = moments.sample(jax.random.key(0))
    assert_close_to_max(sample, nhwc("posterior_sample"), RTOL)
    assert_close_to_max(golden_vae.module().scale * sample, nhwc("latent"), RTOL)


def test_samples_differ_by_key_with_the_standard_deviation():
    moments = Moments(jnp.full((1, 64, 64, 4), 3.0), jnp.full((1, 64, 64, 4), 2 * np.log(0.5)))
    sample = np.asarray(moments.sample(jax.random.key(1)))
    # 16,384 draws: their mean scatters by 0.004, their deviation by 0.003.
    assert abs(sample.mean() - 3) < 0.02 and abs(sample.std() - 0.5) < 0.015
    assert not np.array_equal(sample, moments.sample(jax.random.key(2)))


def test_decodes_as_published_to_the_same_pixels():
    module = golden_vae.module()
    latents = nhwc("latent") / module.scale
    images = golden_vae.apply(module, "decode", golden_vae.params(), latents)
    assert_close_to_max(images, nhwc("decoded"), RTOL)
    pixels, expected = to_uint8(images).astype(int), golden_vae.arrays()["uint8_nhwc"].astype(int)
    # Truncation turns a difference in the last bits into a grey level, in a pixel or two.
    assert np.abs(pixels - expected).max() <= 1 and (pixels != expected).mean() < 1e-3


def test_logvar_is_clipped():
    parameters = nhwc("clamp/parameters")
    np.testing.assert_array_equal(split_moments(parameters).logvar, nhwc("clamp/logvar"))


def test_bfloat16_by_choice_is_close_and_float32_at_the_highest_precision():
    module, params = golden_vae.module(), golden_vae.params()
    half = module.clone(dtype=jnp.bfloat16)
    images = nhwc("image")
    assert_close_to_max(
        golden_vae.apply(half, "__call__", params, images).astype(np.float32),
        golden_vae.apply(module, "__call__", params, images),
        0.1,
    )
    for one, precision in ((module, "HIGHEST"), (half, "DEFAULT")):
        text = str(jax.make_jaxpr(functools.partial(one.apply, {"params": params}))(images))
        assert "precision=None" not in text
        assert (f"Precision.{precision}" in text) and ("bf16" in text) == (one is half)


def test_kl16_is_the_published_default():
    shapes, layout = flat_shapes(AutoencoderKL(**KL16)), convert.LAYOUTS["ldm"]
    expected = dict(published_shapes()["vae_default"])
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == expected.pop("__total__")
    converted = {
        convert.published_name(path, layout, 5): list(convert.published_shape(path, shape, layout))
        for path, shape in shapes.items()
    }
    assert converted == expected
    assert (KL16["scale"], AutoencoderKL(**KL16).downsampling) == (0.2325, 16)


def test_kl8_is_stable_diffusions():
    module = AutoencoderKL(**KL8)
    count = sum(int(np.prod(shape)) for shape in flat_shapes(module).values())
    assert count == 83_653_863  # as diffusers counts those of runwayml/stable-diffusion-v1-5
    assert (module.scale, module.downsampling, module.latent_channels) == (0.18215, 8, 4)


@pytest.mark.parametrize("name", NAMED)
def test_named_configs_infer_their_module(name):
    module = AutoencoderKL(**NAMED[name])
    for layout in convert.LAYOUTS.values():
        num_levels = len(module.channel_multipliers)
        shapes = {
            convert.published_name(path, layout, num_levels): convert.published_shape(
                path, shape, layout
            )
            for path, shape in flat_shapes(module).items()
        }
        assert len(shapes) == len(flat_shapes(module))
        assert convert.infer_module(shapes, layout, module.scale) == module


def test_images_that_do_not_divide_are_refused():
    module = golden_vae.module()
    with pytest.raises(UserError, match=r"32x40 .* multiples of 16"):
        jax.eval_shape(
            functools.partial(module.apply, method="encode"),
            {"params": golden_vae.params()},
            jnp.zeros((1, 32, 40, 3)),
        )


def upsampled(latents):
    """Decodes each latent by itself, so that tiles must give what the whole gives."""
    return latents.repeat(2, axis=1).repeat(2, axis=2)[..., :2]


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 5), (4, 4)])
@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
def test_tiles_blend_to_the_whole(size, overlap):
    latents = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    tiled = jax.jit(lambda x: decode_tiled(upsampled, x, 2, 8, overlap))(latents)
    np.testing.assert_allclose(tiled, upsampled(latents), rtol=1e-6, atol=1e-6)


def test_tiles_fade_into_each_other():
    """Tiles of other brightness: no jump between pixels is larger than a ramp's step."""
    seen = []

    def decode(latents):
        seen.append(latents.shape)
        return jnp.broadcast_to(latents[:, :1, :1], latents.shape)

    latents = np.broadcast_to(np.arange(24.0, dtype=np.float32)[:, None], (24, 24))[None, ..., None]
    blended = np.asarray(decode_tiled(decode, latents, 1, 8, 4))[0, :, 12, 0]
    assert set(seen) == {(1, 8, 8, 1)}
    assert np.diff(blended).max() <= 1.01 and blended[0] == 0 and blended[-1] == 16
    hard = np.asarray(decode_tiled(decode, latents, 1, 8, 0))[0, :, 12, 0]
    assert np.diff(hard).max() == 8


def test_tiles_save_memory():
    module, params = golden_vae.module(), golden_vae.params()
    latents = jnp.zeros((1, 16, 16, 16))

    def decode(x):
        return module.apply({"params": params}, x, method="decode")

    def temporary(function):
        return jax.jit(function).lower(latents).compile().memory_analysis().temp_size_in_bytes

    whole = temporary(decode)
    tiled = temporary(lambda x: decode_tiled(decode, x, module.downsampling, 4, 1))
    assert tiled < whole / 2


@pytest.mark.parametrize("overlap", [8, 9, -1])
def test_tiles_that_do_not_advance_are_refused(overlap):
    with pytest.raises(UserError, match=f"tiles of 8 latents cannot overlap by {overlap}"):
        decode_tiled(upsampled, jnp.zeros((1, 16, 16, 3)), 2, 8, overlap)
