"""The mid model of the benchmarks: 16x16 latents of 16 channels, depth 12, width 384, 6 heads.

As CPUs compute it fastest: float32, layers unrolled, context rows attending to context alone. On a
TPU pass --config.model.dtype=bfloat16 --config.model.scan_layers=true and compare
--config.model.attention=fused with splash.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """The published recipe with a model between the quick start's and CausalFusion-L."""
    config = default.get_config()

    config.data.size = 16
    config.data.channels = 16

    config.model.width = 384
    config.model.depth = 12
    config.model.num_heads = 6
    config.model.dtype = "float32"
    config.model.remat_policy = "none"
    config.model.attention = "split"
    config.model.scan_layers = False

    config.train.global_batch_size = 8

    config.sampling.num_ar_steps = 8
    config.sampling.denoising_steps = "10"

    return config
