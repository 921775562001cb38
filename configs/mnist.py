"""The quick start: 4,000 embedded MNIST digits, 49 tokens of 4x4 pixels, on a laptop CPU.

    python -m cfjax.train --config configs/mnist.py --workdir runs/mnist

Hardware: 2 CPU cores. Expected: see the table in the README.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """The small pixel model of the quick start."""
    config = default.get_config()

    config.data.name = "mnist"
    config.data.size = 28
    config.data.channels = 1
    config.data.num_classes = 10
    config.data.horizontal_flip = False

    config.model.width = 96
    config.model.depth = 4
    config.model.num_heads = 4
    config.model.patch_size = 4
    config.model.num_condition_tokens = 4
    config.model.dtype = "float32"
    config.model.remat_policy = "none"
    config.model.attention = "split"  # this and unrolled layers: faster on a CPU by a third
    config.model.scan_layers = False

    # Pixels have bounds: x_0 is learned in far fewer train steps than ε. Unweighted, its loss counts
    # high noise as much as low, which is where the context of clean tokens matters.
    config.diffusion.prediction_type = "x_start"
    config.diffusion.noise_schedule = "cosine"

    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.eps = 1e-8
    config.optimizer.ema_decay = 0.995

    config.mesh.min_split_size = 2**16  # none is worth a gather

    config.train.global_batch_size = 64
    config.train.num_train_steps = 2_000
    config.train.log_every = 50
    config.train.checkpoint_every = 500

    config.sampling.denoising_steps = "25"
    config.sampling.solver = "ddim"
    config.sampling.clip_x_start = True
    config.sampling.guidance_scale = 2.0
    config.sampling.images_per_device = 32

    return config
