"""Captioned scenes of MNIST digits: one model that draws them and describes them.

    python -m cfjax.train --config configs/mnist_scenes.py --workdir runs/mnist_scenes

Variants, as in the paper's Table 6a and to compare with:

| variant | trained on |
|---|---|
| `joint` | captions before images and after them, half of the time each |
| `text_to_image`, `image_to_text` | one of the two, in half as many train steps |
| `transfusion` | as `joint`, with all tokens of an image in one AR step |

Hardware: 2 CPU cores; `joint` in about an hour, on one of them 73 minutes. What to expect of it is in
docs/documents.md.
"""

from ml_collections import ConfigDict

from cfjax.errors import check_choice
from configs import mnist

VARIANTS = ("joint", "text_to_image", "image_to_text", "transfusion")


def get_config(variant: str = "joint") -> ConfigDict:
    """The quick start's model with text, on embedded scenes; one of the variants above."""
    check_choice("variant", variant, VARIANTS)
    config = mnist.get_config()

    config.data.name = "scenes"
    config.data.size = 24
    config.data.channels = 3
    config.data.num_classes = 0
    config.data.image_to_text_share = 0.25  # captions are learned in far fewer train steps

    config.text.tokenizer = "scene_words"
    config.text.max_length = 20
    config.text.tokens_per_row = 30
    config.text.images_per_row = 2

    config.model.width = 192
    config.model.depth = 5
    config.model.num_heads = 6
    config.model.patch_size = 6  # four tokens a cell of the grid
    config.model.position_scale = 16.0  # to be heard beside the 108 pixels of a token
    config.model.num_condition_tokens = 1  # of no class, which no document has

    # More images in few AR steps, where their own clean tokens don't tell what the caption says.
    config.factorization.ar_step_decay = 0.8
    config.diffusion.timesteps_per_ar_step = 2

    config.loss.text_loss_weight = 0.2

    config.optimizer.ema_decay = 0.998

    config.train.global_batch_size = 16  # rows of 2 documents
    config.train.num_train_steps = 6_000

    config.sampling.denoising_steps = "20"
    config.sampling.guidance_scale = 5.0

    if variant in ("text_to_image", "image_to_text"):
        config.data.image_to_text_share = float(variant == "image_to_text")
        config.train.num_train_steps //= 2
    elif variant == "transfusion":
        config.factorization.mode = "diffusion"
        config.loss.ar_loss_weight = 1.0
    return config
