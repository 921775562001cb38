"""Tiny runs on the embedded scenes, for tests of whole programs: 4 tokens of 8x8 pixels an image."""

import tiny

from cfjax.config_loading import load_config

OVERRIDES = tiny.SCENES_OVERRIDES | {
    "data.size": 16,
    "model.patch_size": 8,
    "text.tokens_per_row": 136,
    "train.global_batch_size": 8,
}
SEQUENCES = {"model.patch_size": 14, "train.global_batch_size": 8}


def config(name="mnist_scenes.py", **overrides):
    """The tiny config; overrides by dotted key with "__" for the dot."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    base = OVERRIDES if name == "mnist_scenes.py" else tiny.OVERRIDES | SEQUENCES
    return load_config(str(tiny.CONFIGS / name), base | dotted)
