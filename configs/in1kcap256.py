"""Recaptioned ImageNet at 256x256: text to image and image to text in one model (paper Table 6a).

    python -m cfjax.train --config configs/in1kcap256.py --workdir gs://bucket/runs/in1kcap \
        --config.data.path=gs://bucket/in1kcap --config.autoencoder.path=kl16

Variants: `l`, CausalFusion-L as in the paper (FID-30k 7.1, CIDEr 47.9), and `transfusion`, the same
with all tokens of an image in one AR step (the paper's Transfusion-L: 8.1, 34.5).

The paper leaves the tokenizer, the longest caption, the weight of the text loss, the share of
image-to-text documents and the dropout of captions open: those marked "ours" below. A tokenizer of
subwords makes captions shorter: `--config.text.tokenizer=tokenizer.json --config.text.max_length=96
--config.text.tokens_per_row=100`.

Hardware: TPU pod. Not run, but compiled for a v5e-256: docs/preflight.md.
"""

from ml_collections import ConfigDict

from cfjax.errors import check_choice
from cfjax.models.autoencoder_kl import KL16
from cfjax.models.causal_fusion import named_size
from configs import default

VARIANTS = ("l", "transfusion")


def get_config(variant: str = "l") -> ConfigDict:
    """One of the variants above."""
    check_choice("variant", variant, VARIANTS)
    config = default.get_config()
    config.data.name = "captioned_array_record"
    config.data.size = 16
    config.data.channels = 16
    config.data.num_classes = 0
    config.data.horizontal_flip = False  # captions say left and right
    config.data.image_to_text_share = 0.5  # ours
    config.autoencoder.scale = KL16["scale"]

    config.model.update(named_size("l"))
    config.model.num_condition_tokens = 1
    config.mesh.fsdp = 16  # chips over which the state is split; on fewer, their number
    # 3% fewer FLOPs than "fused" in the compiled train step, and a little less memory.
    config.model.attention = "split"
    # As those of imagenet256.py: without them half of the gathers of weights are waited for.
    config.train.tpu_compiler_options = (
        "xla_enable_async_all_gather=true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions=true",
    )

    config.text.tokenizer = "bytes"  # ours
    config.text.max_length = 256  # ours
    config.text.tokens_per_row = 260  # ours
    config.text.images_per_row = 1
    config.loss.text_loss_weight = 0.2  # ours; Transfusion weighs the diffusion loss with 5
    config.loss.text_dropout = 0.1  # ours
    if variant == "transfusion":
        config.factorization.mode = "diffusion"
        config.loss.ar_loss_weight = 1.0
    return config
