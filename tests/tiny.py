"""Tiny runs on the embedded digits, for tests of whole programs: 16 tokens of 7x7 pixels."""

import functools
from pathlib import Path

import jax
import numpy as np
from flax.core import meta

from cfjax import build, checkpoints, sharding, train_state
from cfjax.config_loading import config_to_json, load_config
from cfjax.optimizer import make_optimizer

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"
NUM_TRAIN_STEPS = 6
OVERRIDES = {
    "model.width": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.patch_size": 7,
    "model.num_condition_tokens": 2,
    "model.scan_layers": True,  # half the time to compile
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 2,
    "train.global_batch_size": 16,
    "train.num_train_steps": NUM_TRAIN_STEPS,
    "train.log_every": 2,
    "train.checkpoint_every": 3,
    "mesh.min_split_size": 0,  # all are split, small as they are
    "sampling.denoising_steps": "4",
    "sampling.images_per_device": 4,
}


def config(**overrides):
    """The tiny config; overrides by dotted key with "__" for the dot."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(str(CONFIGS / "mnist.py"), OVERRIDES | dotted)


def flags(**overrides):
    """The same as command-line flags."""
    return _as_flags("mnist.py", OVERRIDES, overrides)


def _as_flags(name, values, overrides):
    values = values | {name.replace("__", "."): value for name, value in overrides.items()}
    return [f"--config={CONFIGS / name}"] + [f"--config.{k}={v}" for k, v in values.items()]


AUTOENCODER_OVERRIDES = {
    "autoencoder.channels": 4,
    "autoencoder.channel_multipliers": (1, 2),
    "autoencoder.latent_channels": 2,
    "autoencoder.num_groups": 2,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 2,
    "train.global_batch_size": 16,
    "train.num_train_steps": NUM_TRAIN_STEPS,
    "train.log_every": 2,
    "train.checkpoint_every": 3,
}


def autoencoder_config(**overrides):
    """Like `config`, of an autoencoder: 14x14 latents of 2 channels."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(str(CONFIGS / "mnist_autoencoder.py"), AUTOENCODER_OVERRIDES | dotted)


def autoencoder_flags(**overrides):
    """The same as command-line flags."""
    return _as_flags("mnist_autoencoder.py", AUTOENCODER_OVERRIDES, overrides)


SCENES_OVERRIDES = OVERRIDES | {
    "data.image_to_text_share": 0.5,
    "text.tokenizer": "bytes",
    "text.max_length": 64,
    "factorization.ar_step_decay": 0.9,
    "diffusion.timesteps_per_ar_step": 1,
    "sampling.guidance_scale": 2.0,
}
DOCUMENT_OVERRIDES = SCENES_OVERRIDES | {
    "data.size": 32,
    "model.patch_size": 16,
    "model.num_condition_tokens": 1,
    "text.tokens_per_row": 96,
    "train.global_batch_size": 16,
}


def document_config(**overrides):
    """Like `config`, of captioned scenes: rows of 96 text tokens and 2 images of 4 tokens."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(str(CONFIGS / "mnist_scenes.py"), DOCUMENT_OVERRIDES | dotted)


def document_flags(**overrides):
    """The same as command-line flags."""
    return _as_flags("mnist_scenes.py", DOCUMENT_OVERRIDES, overrides)


def random_params(model):
    """Parameters without the zeros of an initialization, so that every part of the model matters."""
    shapes = meta.unbox(jax.eval_shape(build.init_params(model), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)


@functools.cache
def trained(workdir):
    """Trains the tiny config once for each workdir; the final state."""
    from cfjax.train import train

    return train(config(), workdir)


def save_random_checkpoint(workdir, seed=0, of_run=None, **overrides):
    """A checkpoint whose parameters are random, so that every part of the model matters.

    Of the config `of_run`, or of the tiny one with overrides.
    """
    of_run = of_run or config(**overrides)
    optimizer = make_optimizer(build.optimizer_settings(of_run))
    init = build.init_params(build.model(of_run))

    def create(key):
        boxed = init(key)
        keys = iter(jax.random.split(key, 100))

        def noisy(x):
            return x + 0.3 * jax.random.normal(next(keys), x.shape)

        return train_state.create(jax.tree.map(noisy, boxed), optimizer)

    key = jax.random.key(seed, impl="rbg")  # compiled in a third of the time
    state = sharding.born_sharded(create, sharding.make_mesh(), key)
    with checkpoints.CheckpointWriter(workdir, keep_last=1) as writer:
        writer.save(state, config_to_json(of_run), 0)
    return workdir
