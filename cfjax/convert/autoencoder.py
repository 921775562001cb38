"""Published files of KL autoencoders to ours and back, one array in memory at a time."""

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cfjax import autoencoder_files, program
from cfjax.convert import autoencoder_kl, torch_files
from cfjax.convert.autoencoder_kl import LAYOUTS
from cfjax.convert.report import Report, check_names_and_shapes
from cfjax.convert.torch_files import StateDict
from cfjax.errors import UserError
from cfjax.models.autoencoder_kl import KL8, KL16, AutoencoderKL
from cfjax.tensor_files import TensorFile, write_tensors

# Formats: their layout when written, and their scale unless a config beside the file has another.
FORMATS = {"mar": "ldm", "ldm": "ldm", "diffusers": "diffusers", "diffusers_old": "diffusers_old"}
SCALES = {"mar": KL16["scale"]}
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SECTIONS = ("state_dict", "model")
_LDM_PREFIX = "first_stage_model."
_FIRST = re.compile(r"(|.*\.)encoder\.conv_in\.weight")
_MEND = "fetch the file again, or take the one that has this autoencoder."


def open_published(path: str | PathLike, allow_pickle: bool) -> tuple[Any, dict[str, Any]]:
    """The arrays of a file, with `shapes()` and `dtypes()`, and the config of diffusers beside it or {}.

    Args:
      path: a `.safetensors`, any other file of PyTorch, or a folder of diffusers.
      allow_pickle: read anything, which may run code that is in the file.

    Raises:
      UserError: the file cannot be read, or has no weights in it.
    """
    place = Path(path)
    if place.is_dir():
        place = place / DIFFUSERS_WEIGHTS
    config_file = place.parent / "config.json"
    config = _read_diffusers_config(config_file) if config_file.is_file() else {}
    if place.suffix == ".safetensors":
        return TensorFile(place), config
    document = torch_files.read(place, allow_pickle)
    for section in _SECTIONS:
        if isinstance(document, Mapping) and isinstance(document.get(section), Mapping):
            document = document[section]
            break
    if isinstance(document, Mapping):
        # Beside weights, checkpoints of whole models have counters and settings.
        tensors = {k: v for k, v in document.items() if torch_files.is_state_dict({k: v})}
        if tensors:
            return StateDict(tensors), config
    raise UserError(f"the file {path} has no weights in it; pass that of an autoencoder.")


def _read_diffusers_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        is_of_autoencoder = config.get("_class_name") == "AutoencoderKL"
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not is_of_autoencoder:
        return {}
    if config.get("shift_factor"):
        raise UserError(
            f"{path} has a shift_factor of {config['shift_factor']}, which latents here do not"
            " have; take an autoencoder without one."
        )
    return config


def to_ours(
    arrays: Any,
    source_format: str,
    config: Mapping[str, Any],
    scale: float | None,
    out: Path,
    report: Report,
) -> AutoencoderKL:
    """Writes a folder that `autoencoder_files.load` reads.

    Args:
      arrays: published arrays by name, with `shapes()` and `dtypes()`.
      source_format: one of `FORMATS`.
      config: of diffusers, or {}.
      scale: of the latents; by default that of `config`, or of the format.
      out: the folder.
      report: is filled.

    Raises:
      UserError: weights are missing, extra or misshapen; they are listed.
    """
    prefix = _prefix(arrays)
    shapes = _without_others(arrays.shapes(), prefix, report)
    layout_name = autoencoder_kl.infer_layout(shapes)
    if layout_name.startswith("diffusers") != source_format.startswith("diffusers"):
        raise UserError(f"these are names of {layout_name}, not of {source_format}; pass --from.")
    layout = LAYOUTS[layout_name]
    if scale is None:
        scale = config.get("scaling_factor", SCALES.get(source_format, KL8["scale"]))
        report.say(f"Latents are multiplied by {scale}; --scale gives another.")
    module = autoencoder_kl.infer_module(shapes, layout, scale, config.get("norm_num_groups", 32))
    ours, expected = published_shapes(module, layout_name)
    check_names_and_shapes(shapes, expected, _MEND)
    report.map_names(expected, {name: path for path, name in ours.items()})
    dtypes = arrays.dtypes()
    report.say_casts(dtypes[prefix + name] for name in expected)
    flat = autoencoder_files.flat_shapes(module)
    converted = (
        (path, autoencoder_kl.to_ours(arrays[prefix + ours[path]], shape))
        for path, shape in flat.items()
    )
    program.check_workdir_writable(out)
    autoencoder_files.save_streaming(out, module, converted)
    return module


def to_published(folder: str | PathLike, target_format: str, out: Path, report: Report) -> None:
    """Writes a file, or a folder for diffusers.

    Raises:
      UserError: the folder has no autoencoder, or a damaged one.
    """
    loaded = autoencoder_files.load(folder)
    layout = FORMATS[target_format]
    ours, expected = published_shapes(loaded.module, layout)
    report.map_names(expected, {name: path for path, name in ours.items()})
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params)
    }
    arrays = (
        (name, autoencoder_kl.to_published(flat[path], expected[name]))
        for path, name in ours.items()
    )
    if layout.startswith("diffusers"):
        program.check_workdir_writable(out)
        write_tensors(out / DIFFUSERS_WEIGHTS, expected, arrays)
        document = autoencoder_kl.diffusers_config(loaded.module)
        (out / "config.json").write_text(json.dumps(document, indent=2) + "\n")
        return
    prefix = _LDM_PREFIX if target_format == "ldm" else ""
    section = "state_dict" if target_format == "ldm" else "model"
    program.check_workdir_writable(out.parent)
    shapes = {prefix + name: shape for name, shape in expected.items()}
    torch_files.write(
        out,
        {section: torch_files.entries(section, shapes)},
        (((section, prefix + name), array) for name, array in arrays),
    )


def published_shapes(
    module: AutoencoderKL, layout_name: str
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Published names by our path, and their shapes, in the same order."""
    layout, num_levels = LAYOUTS[layout_name], len(module.channel_multipliers)
    names, shapes = {}, {}
    for path, shape in autoencoder_files.flat_shapes(module).items():
        names[path] = autoencoder_kl.published_name(path, layout, num_levels)
        shapes[names[path]] = autoencoder_kl.published_shape(path, shape, layout)
    return names, shapes


def _prefix(arrays: Mapping[str, np.ndarray]) -> str:
    """What stands before every name of the autoencoder."""
    prefixes = [match[1] for match in map(_FIRST.fullmatch, arrays) if match]
    if len(prefixes) != 1:
        found = f"has several ({', '.join(prefixes)})" if prefixes else "has none"
        raise UserError(
            f"of an autoencoder's first name, encoder.conv_in.weight, the file {found}; pass a file"
            " with one autoencoder in it."
        )
    return prefixes[0]


def _without_others(
    shapes: Mapping[str, tuple[int, ...]], prefix: str, report: Report
) -> dict[str, tuple[int, ...]]:
    """Shapes of what has the prefix, taken away, but for what only served to train it."""
    left_out, kept = {}, {}
    for name, shape in shapes.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            left_out[name] = f"they don't begin with {prefix}"
        elif inner.startswith("loss."):
            left_out[name] = "they belong to the loss that trained the autoencoder"
        else:
            kept[inner] = shape
    report.leave_out(left_out)
    return kept
