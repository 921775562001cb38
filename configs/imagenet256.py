"""ImageNet at 256x256 in latents: the paper's system-level models and its ablations.

    python -m cfjax.train --config configs/imagenet256.py:xl --workdir gs://bucket/runs/xl \
        --config.data.path=gs://bucket/imagenet256-kl16 --config.autoencoder.path=kl16

Variants (paper tables 9 and 10; FID as the paper reports it):

| variant | model | paper |
|---|---|---|
| `l` | 368M, KL-16 latents of 16x16x16 | FID-50k 5.12, with guidance 1.94 |
| `xl` | 676M, the same latents | FID-50k 3.61, with guidance 1.77 |
| `h` | 1B, 40 layers | FID-50k with guidance 1.64 |
| `h48` | H with the published code's 48 layers | - |
| `ablation` | 308M, Stable Diffusion latents of 32x32x4, patch 2 | FID-10k 12.13 (table 3c) |
| `in_context_dit` | `ablation` as pure diffusion: table 1, last row | FID-10k 13.78 |

The other rows of table 1 take parts of the architecture away that this model always has. The
ablations' rows are `:ablation` with overrides:

| paper | override |
|---|---|
| table 2, S_train = 4 | `--config.factorization.mode=fixed --config.factorization.num_ar_steps=4` |
| table 2, uniform random | `--config.factorization.mode=random` |
| table 3a, γ | `--config.factorization.ar_step_decay=0.95` |
| table 3b, order | `--config.factorization.token_order=raster` |
| table 3c, λ | `--config.loss.ar_loss_weight=1.5` |
| table 7, another t for each AR step | `--config.diffusion.timestep_sharing=ar_step` |
| table 7, 4 t per AR step | the same with `--config.diffusion.timesteps_per_ar_step=4` |
| table 8, condition tokens | `--config.model.num_condition_tokens=16` |
| table 8, 4 repeated 16 times | `--config.model.condition_repeats=16` |

Hardware: TPU pod. Not run.
"""

from ml_collections import ConfigDict

from cfjax.errors import check_choice
from cfjax.models.autoencoder_kl import KL8, KL16
from cfjax.models.causal_fusion import named_size
from configs import default

STEPS_PER_EPOCH = 1_281_167 / 2048
SYSTEM_LEVEL = ("l", "xl", "h", "h48")
ABLATIONS = ("ablation", "in_context_dit")


def get_config(variant: str = "xl") -> ConfigDict:
    """One of the variants above."""
    check_choice("variant", variant, SYSTEM_LEVEL + ABLATIONS)
    config = default.get_config()
    config.data.name = "latents"
    config.train.clean_length_buckets = 6
    config.model.update(named_size(variant if variant in SYSTEM_LEVEL else "l"))
    config.mesh.fsdp = 16  # chips over which the state is split; on fewer, their number
    # Fewest bytes in the compiled train step; "split" has 2% fewer FLOPs (docs/preflight.md).
    config.model.attention = "splash"
    # With these, gathers of weights overlap with all other work in a layer. Without the first a v4
    # waits for all of them, without the second a v5p or v6e, without the third a v5e for half.
    config.train.tpu_compiler_options = (
        "xla_enable_async_all_gather=true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions=true",
    )
    if variant in SYSTEM_LEVEL:
        config.data.size = 16
        config.data.channels = 16
        config.autoencoder.scale = KL16["scale"]
        return config

    config.data.size = 32
    config.data.channels = 4
    config.autoencoder.scale = KL8["scale"]
    config.model.patch_size = 2
    config.model.num_condition_tokens = 4
    config.model.position_embedding = "sincos"
    config.train.num_train_steps = round(240 * STEPS_PER_EPOCH)
    if variant == "in_context_dit":
        config.factorization.mode = "diffusion"
        config.loss.ar_loss_weight = 1.0
    return config
