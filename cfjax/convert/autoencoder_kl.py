"""Names of published KL autoencoders to our parameters and back, on NumPy arrays.

Layouts: "ldm" (latent-diffusion, whose names MAR has too), "diffusers", and "diffusers_old", the
names of diffusers before 0.18, which most published files have.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from cfjax.errors import UserError
from cfjax.models.autoencoder_kl import AutoencoderKL

_LEVEL = re.compile(r"level(\d+)_(block|attn|downsample|upsample)(\d*)")
_MIDDLE = re.compile(r"middle_(block|attn)(\d*)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a framework names the parts; `{level}` counts in its own order, `{i}` from 0.

    Attributes:
      down, up: one level of the encoder and of the decoder.
      is_up_reversed: the decoder's levels count from the lowest resolution.
      block, attn, downsample, upsample: parts of a level.
      middle_block, middle_attn: parts of the middle, `{i}` from `first_middle`.
      leaves: our names of layers to theirs where they differ.
      is_attention_convolution: the weights of linear maps are 1x1 convolutions.
    """

    down: str
    up: str
    is_up_reversed: bool
    block: str
    attn: str
    downsample: str
    upsample: str
    middle_block: str
    middle_attn: str
    first_middle: int
    leaves: Mapping[str, str]
    is_attention_convolution: bool


_DIFFUSERS = Layout(
    down="down_blocks.{level}",
    up="up_blocks.{level}",
    is_up_reversed=True,
    block="resnets.{i}",
    attn="attentions.{i}",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    middle_block="mid_block.resnets.{i}",
    middle_attn="mid_block.attentions.0",
    first_middle=0,
    leaves={
        "shortcut": "conv_shortcut",
        "norm_out": "conv_norm_out",
        "norm": "group_norm",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "out": "to_out.0",
    },
    is_attention_convolution=False,
)
LAYOUTS = {
    "ldm": Layout(
        down="down.{level}",
        up="up.{level}",
        is_up_reversed=False,
        block="block.{i}",
        attn="attn.{i}",
        downsample="downsample.conv",
        upsample="upsample.conv",
        middle_block="mid.block_{i}",
        middle_attn="mid.attn_1",
        first_middle=1,
        leaves={
            "shortcut": "nin_shortcut",
            "query": "q",
            "key": "k",
            "value": "v",
            "out": "proj_out",
        },
        is_attention_convolution=True,
    ),
    "diffusers": _DIFFUSERS,
    "diffusers_old": dataclasses.replace(
        _DIFFUSERS,
        leaves={
            **_DIFFUSERS.leaves,
            "query": "query",
            "key": "key",
            "value": "value",
            "out": "proj_attn",
        },
    ),
}


def published_name(path: str, layout: Layout, num_levels: int) -> str:
    """The published name of our parameter `path`, such as "encoder/level0_block1/conv1/kernel"."""
    side, *parts, kind = path.split("/")
    parts = [_part(side, part, layout, num_levels) for part in parts]
    return ".".join([side, *parts, "bias" if kind == "bias" else "weight"])


def _part(side: str, part: str, layout: Layout, num_levels: int) -> str:
    if match := _LEVEL.fullmatch(part):
        level, kind, i = int(match[1]), match[2], match[3]
        if side == "decoder" and layout.is_up_reversed:
            level = num_levels - 1 - level
        above = layout.down if side == "encoder" else layout.up
        return f"{above.format(level=level)}.{getattr(layout, kind).format(i=i)}"
    if match := _MIDDLE.fullmatch(part):
        if match[1] == "attn":
            return layout.middle_attn
        return layout.middle_block.format(i=int(match[2]) + layout.first_middle)
    return layout.leaves.get(part, part)


def published_shape(path: str, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The published shape of our parameter `path`: outputs first, linear maps as they have them."""
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    if len(shape) == 2:
        return (*shape[::-1], 1, 1) if layout.is_attention_convolution else shape[::-1]
    return shape


def to_ours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A published array as our parameter of `shape`, in float32."""
    if len(shape) == 4:
        array = array.transpose(2, 3, 1, 0)
    elif len(shape) == 2:
        array = array.reshape(shape[::-1]).T
    return np.ascontiguousarray(array, np.float32)


def to_published(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `to_ours`, for a published `shape`."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array).reshape(shape)


def infer_layout(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The layout whose names these are.

    Raises:
      UserError: of none.
    """
    for name, layout in LAYOUTS.items():
        middle = f"encoder.{layout.middle_attn}.{layout.leaves['query']}.weight"
        if middle in shapes:
            return name
    raise UserError(
        "the weights are not those of a KL autoencoder: no name is encoder.mid.attn_1.q.weight or"
        " what diffusers calls it; pass the autoencoder's own file."
    )


def infer_module(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, scale: float, num_groups: int = 32
) -> AutoencoderKL:
    """The autoencoder whose published names and shapes these are; they are not yet checked.

    Raises:
      UserError: a name from which its shape follows is missing.
    """

    def has(name):
        return any(other.startswith(f"{name}.") for other in shapes)

    def count(template, key):
        return next(n for n in range(len(shapes) + 1) if not has(template.format(**{key: n})))

    num_levels = count(f"encoder.{layout.down}", "level")
    downs = [f"encoder.{layout.down.format(level=level)}" for level in range(num_levels)]
    ups = [f"decoder.{layout.up.format(level=level)}" for level in range(num_levels)]
    if layout.is_up_reversed:
        ups = ups[::-1]
    first_block, first_attn = layout.block.format(i=0), layout.attn.format(i=0)
    try:
        channels, image_channels = shapes["encoder.conv_in.weight"][:2]
        widths = [shapes[f"{down}.{first_block}.conv1.weight"][0] for down in downs]
        latent_channels = shapes["post_quant_conv.weight"][0]
        num_res_blocks = count(f"{downs[0]}.{layout.block}", "i")
    except KeyError as error:
        raise UserError(
            f"the weights of the autoencoder lack {error.args[0]}; fetch the file again."
        ) from error
    except (ValueError, IndexError) as error:
        raise UserError(
            "the weights of the autoencoder lack a level or have other dimensions than those of"
            " convolutions; fetch the file again."
        ) from error
    return AutoencoderKL(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        latent_channels=latent_channels,
        scale=scale,
        num_res_blocks=num_res_blocks,
        encoder_attention_levels=_with(has, downs, first_attn),
        decoder_attention_levels=_with(has, ups, first_attn),
        num_groups=num_groups,
        image_channels=image_channels,
    )


def _with(has, levels: list[str], part: str) -> tuple[int, ...]:
    return tuple(level for level, name in enumerate(levels) if has(f"{name}.{part}"))


def diffusers_config(module: AutoencoderKL) -> dict[str, object]:
    """What `diffusers.AutoencoderKL` needs besides the weights, its config.json."""
    levels = range(len(module.channel_multipliers))
    with_attention = module.encoder_attention_levels, module.decoder_attention_levels
    downs, ups = (
        ["Attn" * (level in some) + kind for level in levels]
        for some, kind in zip(
            with_attention, ("DownEncoderBlock2D", "UpDecoderBlock2D"), strict=True
        )
    )
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [m * module.channels for m in module.channel_multipliers],
        "down_block_types": downs,
        "up_block_types": ups[::-1],
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "latent_channels": module.latent_channels,
        "layers_per_block": module.num_res_blocks,
        "norm_num_groups": module.num_groups,
        "scaling_factor": module.scale,
    }
