"""The KL autoencoder of latent diffusion: images to latents and back (arXiv 2112.10752).

vae = AutoencoderKL(**KL16)
moments = vae.apply({"params": params}, images, method="encode")
latents = vae.scale * moments.sample(key)
images = vae.apply({"params": params}, latents / vae.scale, method="decode")

Small enough to be on every device whole, so that its parameters carry no logical axes.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cfjax.errors import UserError

MAX_LOGVAR, MIN_LOGVAR = 20.0, -30.0

# MAR's: 16 times smaller, 16 channels; attention at the encoder's last level alone.
KL16 = {
    "channels": 128,
    "channel_multipliers": (1, 1, 2, 2, 4),
    "latent_channels": 16,
    "encoder_attention_levels": (4,),
    "scale": 0.2325,
}
# Stable Diffusion's: 8 times smaller, 4 channels.
KL8 = {
    "channels": 128,
    "channel_multipliers": (1, 2, 4, 4),
    "latent_channels": 4,
    "scale": 0.18215,
}
NAMED = {"kl16": KL16, "kl8": KL8}


class Moments(NamedTuple):
    """The posterior of latents, a diagonal Gaussian; not yet multiplied by the scale.

    Attributes:
      mean: `[batch, h, w, latent channels]`.
      logvar: the logarithm of the variance, like `mean`, clipped to [-30, 20].
    """

    mean: jax.Array
    logvar: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """Latents drawn from the posterior."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def mode(self) -> jax.Array:
        """The likeliest latents."""
        return self.mean


def split_moments(parameters: jax.Array) -> Moments:
    """What `AutoencoderKL.encode_parameters` returns, as moments."""
    mean, logvar = jnp.split(parameters, 2, axis=-1)
    return Moments(mean, jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR))


class AutoencoderKL(nn.Module):
    """Encoder and decoder of one shape, mirrored.

    Attributes:
      channels: of the widest resolution.
      channel_multipliers: channels of each level over `channels`; a level halves the resolution of
        the one before.
      latent_channels: of the latents.
      scale: by which latents are multiplied for a diffusion model, to a variance near one.
      num_res_blocks: of each level of the encoder; the decoder has one more.
      encoder_attention_levels, decoder_attention_levels: with attention after each residual block,
        counted from the widest resolution. The middle always has it.
      num_groups: of the norms.
      image_channels: of the images.
      dtype: of convolutions and matrix products; parameters, norms and softmax are float32. With
        float32 they run at the highest precision, as scores of images depend on it.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    latent_channels: int
    scale: float
    num_res_blocks: int = 2
    encoder_attention_levels: tuple[int, ...] = ()
    decoder_attention_levels: tuple[int, ...] = ()
    num_groups: int = 32
    image_channels: int = 3
    dtype: Any = jnp.float32

    @property
    def downsampling(self) -> int:
        """How many pixels a latent has along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def setup(self):
        shape = {
            "channels": self.channels,
            "channel_multipliers": tuple(self.channel_multipliers),
            "num_groups": self.num_groups,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(
            **shape,
            num_res_blocks=self.num_res_blocks,
            attention_levels=tuple(self.encoder_attention_levels),
            out_channels=2 * self.latent_channels,
        )
        self.decoder = Decoder(
            **shape,
            num_res_blocks=self.num_res_blocks + 1,
            attention_levels=tuple(self.decoder_attention_levels),
            out_channels=self.image_channels,
        )
        self.quant_conv = _conv(2 * self.latent_channels, self.dtype, kernel=1)
        self.post_quant_conv = _conv(self.latent_channels, self.dtype, kernel=1)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images to their reconstructions from the likeliest latents."""
        return self.decode(self.encode(images).mode())

    def encode(self, images: jax.Array) -> Moments:
        """Images `[batch, H, W, C]` in [-1, 1] to the posterior of their latents, float32.

        Raises:
          UserError: H or W is not a multiple of `downsampling`.
        """
        return split_moments(self.encode_parameters(images))

    def encode_parameters(self, images: jax.Array) -> jax.Array:
        """Like `encode`, but mean and unclipped log-variance in one array, float32 `[.., 2 c]`."""
        if images.shape[1] % self.downsampling or images.shape[2] % self.downsampling:
            raise UserError(
                f"images of {images.shape[1]}x{images.shape[2]} cannot be encoded; height and width"
                f" must be multiples of {self.downsampling}."
            )
        hidden = self.encoder(images.astype(self.dtype))
        return self.quant_conv(hidden).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents `[batch, h, w, c]`, divided by the scale, to float32 images around [-1, 1]."""
        hidden = self.post_quant_conv(latents.astype(self.dtype))
        return self.decoder(hidden).astype(jnp.float32)


class Encoder(nn.Module):
    """`[batch, H, W, C]` to `[batch, h, w, out_channels]`."""

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    out_channels: int
    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _conv(self.channels, self.dtype, name="conv_in")(x)
        last = len(self.channel_multipliers) - 1
        for level, multiplier in enumerate(self.channel_multipliers):
            for i in range(self.num_res_blocks):
                width = multiplier * self.channels
                name = f"level{level}_block{i}"
                x = ResBlock(width, self.num_groups, self.dtype, name=name)(x)
                if level in self.attention_levels:
                    name = f"level{level}_attn{i}"
                    x = SelfAttention(self.num_groups, self.dtype, name=name)(x)
            if level != last:
                # The published code pads below and to the right alone.
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
                name = f"level{level}_downsample"
                x = _conv(x.shape[-1], self.dtype, stride=2, padding="VALID", name=name)(x)
        x = _middle(x, self.num_groups, self.dtype)
        x = _norm(self.num_groups, self.dtype, "norm_out")(x)
        return _conv(self.out_channels, self.dtype, name="conv_out")(nn.silu(x))


class Decoder(nn.Module):
    """`[batch, h, w, c]` to `[batch, H, W, out_channels]`; levels are named as the encoder's."""

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    out_channels: int
    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = self.channel_multipliers[-1] * self.channels
        x = _conv(width, self.dtype, name="conv_in")(x)
        x = _middle(x, self.num_groups, self.dtype)
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            for i in range(self.num_res_blocks):
                width = multiplier * self.channels
                name = f"level{level}_block{i}"
                x = ResBlock(width, self.num_groups, self.dtype, name=name)(x)
                if level in self.attention_levels:
                    name = f"level{level}_attn{i}"
                    x = SelfAttention(self.num_groups, self.dtype, name=name)(x)
            if level:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = _conv(x.shape[-1], self.dtype, name=f"level{level}_upsample")(x)
        x = _norm(self.num_groups, self.dtype, "norm_out")(x)
        return _conv(self.out_channels, self.dtype, name="conv_out")(nn.silu(x))


class ResBlock(nn.Module):
    """Two convolutions with norm and SiLU before each, and a shortcut."""

    channels: int
    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _norm(self.num_groups, self.dtype, "norm1")(x)
        y = _conv(self.channels, self.dtype, name="conv1")(nn.silu(y))
        y = _norm(self.num_groups, self.dtype, "norm2")(y)
        y = _conv(self.channels, self.dtype, name="conv2")(nn.silu(y))
        if x.shape[-1] != self.channels:
            x = _conv(self.channels, self.dtype, kernel=1, name="shortcut")(x)
        return x + y


class SelfAttention(nn.Module):
    """One head over all places of `[batch, h, w, c]`."""

    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        y = _norm(self.num_groups, self.dtype, "norm")(x)
        y = y.reshape(batch, height * width, channels)

        def linear(name):
            return nn.Dense(channels, dtype=self.dtype, precision=_precision(self.dtype), name=name)

        queries, keys, values = (linear(name)(y) for name in ("query", "key", "value"))
        precision = _precision(self.dtype)
        logits = jnp.einsum(
            "bqc,bkc->bqk", queries, keys, precision=precision, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1).astype(self.dtype)
        attended = jnp.einsum("bqk,bkc->bqc", weights, values, precision=precision)
        return x + linear("out")(attended).reshape(x.shape)


def _middle(x: jax.Array, num_groups: int, dtype: Any) -> jax.Array:
    x = ResBlock(x.shape[-1], num_groups, dtype, name="middle_block0")(x)
    x = SelfAttention(num_groups, dtype, name="middle_attn")(x)
    return ResBlock(x.shape[-1], num_groups, dtype, name="middle_block1")(x)


def _norm(num_groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def _conv(
    channels: int,
    dtype: Any,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: str = "SAME",
    name: str | None = None,
) -> nn.Conv:
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=stride,
        padding=padding,
        dtype=dtype,
        precision=_precision(dtype),
        name=name,
    )


def _precision(dtype: Any) -> jax.lax.Precision:
    highest = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT
