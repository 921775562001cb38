"""From a config to its data and to the autoencoder whose latents the model sees."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from cfjax import autoencoder_files
from cfjax.autoencoder_files import Autoencoder
from cfjax.data.latents import check_autoencoder
from cfjax.data.sources import Source, open_source
from cfjax.errors import UserError, check_choice

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_NO_AUTOENCODER = (
    "autoencoder.path is empty, but the model sees latents; set it to the folder of the autoencoder"
    " that encoded them."
)


def sees_latents(config: ConfigDict) -> bool:
    """Whether the model's images are latents of an autoencoder rather than pixels."""
    return config.data.name == "latents" or bool(config.autoencoder.path)


def autoencoder(config: ConfigDict) -> Autoencoder | None:
    """The autoencoder of a model that sees latents; None for pixels.

    Raises:
      UserError: it is not named, missing or damaged, or does not fit the other fields.
    """
    if not sees_latents(config):
        return None
    settings, data = config.autoencoder, config.data
    check_choice("autoencoder.dtype", settings.dtype, DTYPES)
    if not settings.path:
        raise UserError(_NO_AUTOENCODER)
    loaded = autoencoder_files.load(settings.path, DTYPES[settings.dtype])
    found = loaded.module
    if found.latent_channels != data.channels:
        raise UserError(
            f"data.channels is {data.channels}, but the autoencoder in {settings.path} has latents"
            f" of {found.latent_channels} channels; set data.channels={found.latent_channels}."
        )
    if settings.scale not in (0, found.scale):
        raise UserError(
            f"autoencoder.scale is {settings.scale:g}, but that of the autoencoder in"
            f" {settings.path} is {found.scale:g}; set autoencoder.scale={found.scale:g}."
        )
    return loaded


def latent_scale(config: ConfigDict) -> float | None:
    """By what latents are multiplied before the model sees them; None for pixels.

    Raises:
      UserError: neither the config nor an autoencoder names it.
    """
    if not sees_latents(config):
        return None
    settings = config.autoencoder
    if settings.scale:
        return settings.scale
    if not settings.path:
        raise UserError(_NO_AUTOENCODER)
    return autoencoder_files.load_module(settings.path).scale


def images(config: ConfigDict, split: str, size: int = 0, channels: int = 0) -> Source:
    """What `config.data` names: split "train" or "held_out", by default at its size and channels.

    Raises:
      UserError: see `open_source`.
    """
    data = config.data
    return open_source(
        data.name,
        data.path,
        split,
        size=size or data.size,
        channels=channels or data.channels,
        num_classes=data.num_classes,
        on_corrupt=data.on_corrupt,
        tfds_name=data.tfds_name,
    )


def source(config: ConfigDict, split: str, loaded: Autoencoder | None) -> Source:
    """The data that a model is trained on.

    Latents; or images, where there is an autoencoder those that it encodes in training. `loaded` is
    what `autoencoder` gives for the config.

    Raises:
      UserError: see `open_source`; or latents of another autoencoder.
    """
    if loaded is None:
        return images(config, split)
    module = loaded.module
    if config.data.name != "latents":
        return images(config, split, config.data.size * module.downsampling, module.image_channels)
    opened = images(config, split)
    check_autoencoder(opened, loaded.checksum, module.scale)
    return opened
