"""What a published checkpoint of CausalFusion holds, and what it tells of the config."""

import argparse
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

from cfjax.convert import optimizer_state, torch_files
from cfjax.convert.causal_fusion import POSITION_TABLE
from cfjax.convert.optimizer_state import AdamState
from cfjax.convert.torch_files import StateDict
from cfjax.errors import UserError

# The published sections, and what we call them.
SECTIONS = {"ema": "ema", "model": "params"}
# Of the published program's arguments, those that the optimizer's state does not have.
_ARGUMENTS = {
    "warmup_steps": "optimizer.warmup_steps",
    "global_batch_size": "train.global_batch_size",
}
_LATENT_CHANNELS = 16  # of KL-16, which the published models have


class Published(NamedTuple):
    """What a published file has.

    Attributes:
      sections: state dicts of "model" and "ema"; where the file has one of them, it is both.
      adam: the optimizer's state, if it is there and wanted.
      fields: config fields by dotted key of the optimizer and its run.
      others: names of what else is in the file.
    """

    sections: Mapping[str, StateDict]
    adam: AdamState | None
    fields: Mapping[str, float]
    others: list[str]


def open_published(path: str | PathLike, allow_pickle: bool, weights_only: bool) -> Published:
    """A published checkpoint, or a state dict.

    Args:
      path: the file.
      allow_pickle: read anything, which may run code that is in the file.
      weights_only: leave the optimizer's state out.

    Raises:
      UserError: the file cannot be read, has no weights in it, or has an optimizer's state that
        does not fit them.
    """
    document = torch_files.read(path, allow_pickle)
    if torch_files.is_state_dict(document):
        return Published(dict.fromkeys(SECTIONS, StateDict(document)), None, {}, [])
    if not isinstance(document, Mapping):
        document = {}
    found = {
        section: StateDict(document[section])
        for section in SECTIONS
        if torch_files.is_state_dict(document.get(section))
    }
    if not found:
        names = ", ".join(map(str, document)) or "nothing by name"
        raise UserError(
            f"the file {path} has no weights under model or ema, but {names}; pass a checkpoint of"
            " CausalFusion or its state dict."
        )
    either = next(iter(found.values()))
    sections = {section: found.get(section, either) for section in SECTIONS}
    adam, fields = None, {}
    if "opt" in document and not weights_only:
        adam = optimizer_state.from_published(document["opt"], sections["model"].shapes())
        fields = dict(adam.fields) | _fields_of_arguments(document.get("args"))
    used = [*found, "opt"] if adam else found
    return Published(sections, adam, fields, [str(name) for name in document if name not in used])


def _fields_of_arguments(arguments: Any) -> dict[str, int]:
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return {
        key: values[name] for name, key in _ARGUMENTS.items() if isinstance(values.get(name), int)
    }


def infer_fields(published: Published) -> dict[str, Any]:
    """Config fields by dotted key: sizes, whether the position table is learned, the optimizer.

    Raises:
      UserError: names are missing, or the grid is not a square.
    """
    fields = infer_sizes(published.sections["ema"].shapes()) | dict(published.fields)
    if published.adam and POSITION_TABLE not in published.adam.moments["exp_avg"]:
        fields["model.position_embedding"] = "sincos"  # the optimizer knew no gradient of it
    return fields


def infer_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Config fields by dotted key, from published names and shapes.

    Tokens are taken to have 16 channels where that is possible, which shapes don't tell.

    Raises:
      UserError: names are missing, or the grid is not a square.
    """
    try:
        _, num_tokens, width = shapes["pos_embed"]
        num_condition_tokens = shapes["cond_pos_embed"][1]
        token_width = shapes["x_proj.weight"][1]
        head_width = shapes["blocks.0.attn.q_norm.weight"][0]
        hidden_width = shapes["blocks.0.mlp.fc1.weight"][0]
        num_classes = shapes["y_embedder.embedding_table.weight"][0] - 1
    except KeyError as error:
        raise UserError(
            f"the weights lack {error.args[0]}, so that they are not CausalFusion's; pass another"
            " file."
        ) from error
    except (ValueError, IndexError) as error:
        raise UserError(
            "the shapes of the weights have other dimensions than CausalFusion's; pass another file."
        ) from error
    side = math.isqrt(num_tokens)
    channels = _LATENT_CHANNELS if token_width % _LATENT_CHANNELS == 0 else token_width
    patch_size = math.isqrt(token_width // channels)
    if side**2 != num_tokens or channels * patch_size**2 != token_width:
        raise UserError(
            f"{num_tokens} tokens of {token_width} values tell no square image; pass --config."
        )
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {
        "model.width": width,
        "model.depth": len(layers),
        "model.num_heads": width // head_width,
        "model.mlp_ratio": hidden_width / width,
        "model.patch_size": patch_size,
        "model.num_condition_tokens": num_condition_tokens,
        "model.condition_repeats": 1,
        "model.position_embedding": "learned",
        "data.size": side * patch_size,
        "data.channels": channels,
        "data.num_classes": num_classes,
    }
