"""A tiny autoencoder, a few pictures and the config of a training on their latents."""

import functools
import io

import jax
import numpy as np
import tiny
from autoencoders import random_params
from PIL import Image

from cfjax import autoencoder_files
from cfjax.config_loading import load_config
from cfjax.data import image_records
from cfjax.data.images import center_crop
from cfjax.data.record_shards import ShardWriter
from cfjax.encode import encode
from cfjax.models.autoencoder_kl import AutoencoderKL

# Images of 16x16 to latents of 8x8x4.
IMAGE_SIZE, SIZE, CHANNELS = 16, 8, 4
MODULE = AutoencoderKL(
    channels=8,
    channel_multipliers=(1, 2),
    latent_channels=CHANNELS,
    scale=0.5,
    num_res_blocks=1,
    num_groups=4,
)
CLASSES = ("cat", "dog", "owl")


def config(**overrides):
    """Overrides by dotted key with "__" for the dot."""
    values = {
        "data.size": SIZE,
        "data.channels": CHANNELS,
        "data.num_classes": len(CLASSES),
        "data.num_threads": 2,
        "autoencoder.scale": 0.0,
    }
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(f"{tiny.CONFIGS / 'imagenet256.py'}:l", values | dotted)


def flags(**overrides):
    """The same as command-line flags."""
    values = {"size": SIZE, "channels": CHANNELS, "num_classes": len(CLASSES), "num_threads": 2}
    return [
        f"--config={tiny.CONFIGS / 'imagenet256.py'}:l",
        "--config.autoencoder.scale=0",
        *(f"--config.data.{name}={value}" for name, value in (values | overrides).items()),
    ]


@functools.cache
def params():
    return random_params(MODULE)


def save_autoencoder(folder):
    """Its path, and the sha256 of its weights."""
    return str(folder), autoencoder_files.save(folder, MODULE, params())


@functools.partial(jax.jit, static_argnames="method")
def apply(arrays, method):
    """A method of the autoencoder."""
    return MODULE.apply({"params": params()}, arrays, method=method)


def picture(index):
    pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def crop(index):
    """What is encoded of `picture(index)`."""
    return center_crop(picture(index), IMAGE_SIZE)


def make_pictures(folder, per_class=14):
    """A folder a class."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            picture(100 * label + i).save(folder / name / f"{i:02d}.png")


def file_bytes(image, kind):
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def odd_images():
    """Of odd modes, which are read; and broken ones."""
    deep = np.linspace(0, 0xFFFF, 1600).reshape(40, 40).astype(np.uint16)
    whole = file_bytes(picture(7), "JPEG")
    return {
        "cmyk.jpg": file_bytes(picture(4).convert("CMYK"), "JPEG"),
        "palette.gif": file_bytes(picture(5).convert("P"), "GIF"),
        "deep.png": file_bytes(Image.fromarray(deep), "PNG"),
        "cut.jpg": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.png": b"no picture",
    }


def make_records(folder):
    """Four shards of six: sound ones but for the odd images, in the second."""
    description = {"stored_as": "original", "size": 0, "channels": 3, "class_names": [*CLASSES]}
    writer = ShardWriter(folder / "train", image_records.KIND, description, 4)
    writer.begin()
    for shard in writer.missing():
        if shard == 1:
            images = odd_images()
        else:
            of_shard = range(6 * shard, 6 * shard + 6)
            images = {f"{i}.png": file_bytes(picture(i), "PNG") for i in of_shard}
        writer.write(shard, (image_records.pack(1, name, it) for name, it in images.items()))
    writer.finish()
    return writer


def contents(folder):
    """The bytes of every file in it, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(pictures, vae, out, dataset=None, overrides=(), **options):
    """Encodes with the tiny config: shards of ten images, three at a time on each device."""
    options = {"examples_per_shard": 10, "images_per_device": 3} | options
    dataset = dataset or f"image_folder:{pictures}"
    return encode(config(**dict(overrides)), dataset, str(out), vae=vae, **options)
