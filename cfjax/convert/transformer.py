"""Published checkpoints of CausalFusion to ours and back, with little in memory at a time."""

import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from cfjax import checkpoint_weights, program
from cfjax.convert import causal_fusion, torch_files
from cfjax.convert.causal_fusion import POSITION_TABLE
from cfjax.convert.report import Report, check_names_and_shapes
from cfjax.convert.torch_files import StateDict
from cfjax.errors import UserError
from cfjax.models.causal_fusion import CausalFusion

# The published sections, and what we call them.
SECTIONS = {"ema": "ema", "model": "params"}
_LATENT_CHANNELS = 16  # of KL-16, which the published models have


class Published(NamedTuple):
    """What a published file has.

    Attributes:
      sections: state dicts of "model" and "ema"; where the file has one of them, it is both.
      others: names of what else is in the file.
    """

    sections: Mapping[str, StateDict]
    others: list[str]


def open_published(path: str | PathLike, allow_pickle: bool) -> Published:
    """A published checkpoint, or a state dict.

    Raises:
      UserError: the file cannot be read, or has no weights in it.
    """
    document = torch_files.read(path, allow_pickle)
    if torch_files.is_state_dict(document):
        return Published(dict.fromkeys(SECTIONS, StateDict(document)), [])
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
    return Published(sections, [str(name) for name in document if name not in found])


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


def to_ours(
    open_file: Callable[[], Published],
    model: CausalFusion,
    config_json: str,
    abstract_params: Any,
    workdir: str | PathLike,
    report: Report,
) -> None:
    """Writes a checkpoint of the published weights.

    Args:
      open_file: makes what `open_published` returns; called once for each section, so that the
        pages of a file that is mapped are let go between.
      model: of our side.
      config_json: the config that makes it.
      abstract_params: its parameters, as `ShapeDtypeStruct`s on one device.
      workdir: a new folder.
      report: is filled.

    Raises:
      UserError: weights are missing, extra or misshapen; they are listed.
    """
    expected = causal_fusion.published_shapes(abstract_params, model.grid)
    published = open_file()
    report.leave_out(dict.fromkeys(published.others, "they are not weights"))
    if published.sections["model"] is published.sections["ema"]:
        report.say("Parameters and their average are the same, as the file has one of the two.")
    for state_dict in published.sections.values():
        shapes = state_dict.shapes()
        table = shapes.get(POSITION_TABLE)
        if _is_other_grid(table, expected[POSITION_TABLE]):
            shapes[POSITION_TABLE] = expected[POSITION_TABLE]
        check_names_and_shapes(shapes, expected, causal_fusion.MEND)
        if model.position_embedding != "learned":
            side = math.isqrt(table[1])
            grid = model.grid if table == expected[POSITION_TABLE] else (side, side)
            causal_fusion.check_frozen_positions(state_dict[POSITION_TABLE], grid)
    report.say_casts(state_dict.dtypes().values())
    del published, state_dict
    if table != expected[POSITION_TABLE]:
        side, (rows, columns) = math.isqrt(table[1]), model.grid
        how = "interpolated bicubically to the"
        if model.position_embedding != "learned":
            how = "the frozen sin-cos table, and gives way to that of"
        report.say(
            f"The position table of {side}x{side} tokens is {how} {rows}x{columns} of the config."
        )
    report.map_names(expected, _ours(abstract_params))

    def make(section):
        def arrays():
            published = dict(open_file().sections[section])
            table = published[POSITION_TABLE]
            if table.shape != expected[POSITION_TABLE]:
                published[POSITION_TABLE] = _on_grid(table, model)
            params = causal_fusion.params_from_published(published, abstract_params, model.grid)
            return flax.traverse_util.flatten_dict(params, sep="/")

        return arrays

    program.check_workdir_writable(workdir)
    checkpoint_weights.write(
        workdir,
        config_json,
        abstract_params,
        {ours: make(section) for section, ours in SECTIONS.items()},
    )


def to_published(
    workdir: str | PathLike,
    train_step: int | None,
    model: CausalFusion,
    abstract_params: Any,
    out: Path,
    report: Report,
) -> None:
    """Writes a `.pt` with "model" and "ema" that the published code loads.

    Raises:
      UserError: there is no such checkpoint, it is corrupt or of another architecture than `model`,
        or the model is none that the published code has.
    """
    if model.condition_repeats != 1:
        raise UserError(
            f"model.condition_repeats is {model.condition_repeats}, which the published code does"
            " not have; only models with 1 can be written for it."
        )
    shapes = causal_fusion.published_shapes(abstract_params, model.grid)
    leaves = {
        section: checkpoint_weights.arrays_by_path(workdir, ours, abstract_params, train_step)
        for section, ours in SECTIONS.items()
    }

    def arrays():
        for section in SECTIONS:
            for path, value in leaves[section]:
                for name, array in causal_fusion.leaf_to_published(path, value, shapes):
                    yield section, name, array
            if model.position_embedding != "learned":
                table = POSITION_TABLE
                yield section, table, causal_fusion.frozen_positions(shapes[table], model.grid)

    program.check_workdir_writable(out.parent)
    torch_files.write(out, {"model": shapes, "ema": shapes}, arrays())
    report.map_names(shapes, _ours(abstract_params))


def _ours(abstract_params: Any) -> dict[str, str]:
    """Our path, with the index of the layer, by published name."""
    flat = flax.traverse_util.flatten_dict(abstract_params, sep="/")
    ours = {POSITION_TABLE: "computed: frozen sin-cos positions"}
    for path, leaf in flat.items():
        names = causal_fusion.published_names(path, leaf.shape[0])
        stacked = path.startswith("blocks/")
        ours |= {name: f"{path}[{i}]" if stacked else path for i, name in enumerate(names)}
    return ours


def _is_other_grid(table: tuple[int, ...] | None, expected: tuple[int, ...]) -> bool:
    """Whether this is the shape of a table of as wide a model with another square grid."""
    return (
        table is not None
        and len(table) == 3
        and (table[0], table[2]) == (expected[0], expected[2])
        and math.isqrt(table[1]) ** 2 == table[1]
    )


def _on_grid(table: np.ndarray, model: CausalFusion) -> np.ndarray:
    """A published table `[1, L, D]` of another square grid, on the grid of `model`."""
    side = math.isqrt(table.shape[1])
    width = table.shape[-1]
    if model.position_embedding != "learned":
        return causal_fusion.frozen_positions((1, model.num_tokens, width), model.grid)
    resized = jax.image.resize(
        table.reshape(side, side, width), (*model.grid, width), "cubic", antialias=False
    )
    return np.asarray(resized).reshape(1, model.num_tokens, width)
