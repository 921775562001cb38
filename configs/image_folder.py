"""Your own pictures: a folder with one sub-folder a class, as pixels of 64x64.

    python -m cfjax.train --config configs/image_folder.py --workdir runs/mine \
        --config.data.path=pictures --config.data.num_classes=3

Hardware: one accelerator. On 2 CPU cores a train step takes half a minute; there make the model
smaller, such as by

    --config.model.patch_size=8 --config.model.width=128 --config.model.depth=4 \
        --config.model.num_heads=4

The commands are run, to their first train steps; quality is not.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """A pixel model of 256 tokens of 4x4 pixels."""
    config = default.get_config()

    config.data.name = "image_folder"
    config.data.size = 64
    config.data.num_classes = 2
    config.data.on_corrupt = "skip"

    config.model.width = 384
    config.model.depth = 12
    config.model.num_heads = 6
    config.model.patch_size = 4
    config.model.num_condition_tokens = 16
    config.model.dtype = "float32"

    config.diffusion.noise_schedule = "cosine"
    config.diffusion.prediction_type = "x_start"

    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1_000
    config.optimizer.eps = 1e-8
    config.optimizer.ema_decay = 0.999

    config.train.global_batch_size = 64
    config.train.num_train_steps = 50_000
    config.train.log_every = 10
    config.train.checkpoint_every = 1_000

    config.sampling.denoising_steps = "50"
    config.sampling.solver = "ddim"
    config.sampling.clip_x_start = True
    config.sampling.guidance_scale = 1.5

    return config
