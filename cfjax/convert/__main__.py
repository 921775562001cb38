"""Published weights to ours and back: `python -m cfjax.convert --from mar --source kl16.ckpt --out kl16`.

One side is "cfjax", the other one of

| format | what it is | here |
|---|---|---|
| `published` | a `.pt` of CausalFusion: `model`, `ema`, `opt`; or a state dict | a run's workdir |
| `mar` | `kl16.ckpt`, the KL-16 autoencoder of MAR | an autoencoder's folder |
| `ldm` | a `.ckpt` with the KL-8 autoencoder of Stable Diffusion in it | an autoencoder's folder |
| `diffusers` | `.safetensors` of `AutoencoderKL`, or its folder | an autoencoder's folder |
| `diffusers_old` | the same with the names of before 0.18 | an autoencoder's folder |
| `lpips` | a folder with VGG-16 of torchvision and the layers of LPIPS | a folder, no way back |
| `inception` | `.pb` of the ADM suite, `.pth` of pytorch-fid or torch-fidelity | a file, no way back |

With "cfjax" on both, a run's weights start another with images of another size, that of `--config`.

Missing, extra and misshapen arrays are refused. `conversion.json` beside the result lists every name
with its shape and has the sha256 of source and result. See docs/weights.md.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import ConfigDict

import cfjax
from cfjax import (
    autoencoder_files,
    build,
    checkpoint_folders,
    checkpoints,
    program,
    sharding,
)
from cfjax.config_loading import (
    config_from_json,
    config_to_json,
    define_config_flag,
    load_config,
)
from cfjax.convert import autoencoder, inception, lpips, new_run, published_file, transformer
from cfjax.convert.published_file import Published
from cfjax.convert.report import REPORT_FILE, Report, checksum
from cfjax.errors import UserError, check_choice
from cfjax.optimizer import make_optimizer
from cfjax.paths import is_cloud
from cfjax.train_state import TrainState

OURS, PUBLISHED = "cfjax", "published"
_ONE_WAY = (lpips.FORMAT, inception.FORMAT)
FORMATS = (OURS, PUBLISHED, *autoencoder.FORMATS, *_ONE_WAY)
_DEFAULT_CONFIG = Path(cfjax.__file__).parent.parent / "configs" / "imagenet256.py"
_GROUPS = re.compile(r"(model|data|optimizer|train)\.")


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    values = flags.FLAGS.flag_values_dict()
    source_format, target_format = values["from"], values["to"]
    for name in (source_format, target_format):
        check_choice("format", name, FORMATS)
    if OURS not in (source_format, target_format):
        raise UserError(
            f"--from={source_format} --to={target_format} must have {OURS} on one side."
        )
    if target_format in _ONE_WAY:
        raise UserError(f"--to={target_format} is not possible; its published files are the same.")
    if source_format == target_format and flags.FLAGS["config"].value is None:
        raise UserError(
            f"--from={OURS} --to={OURS} needs --config, that of the new run; or name the other format"
            " in one of them."
        )
    for name in ("source", "out"):
        if is_cloud(values[name]):
            raise UserError(
                f"--{name}={values[name]} must be on disk; copy from there or to there."
            )
    source, out = Path(values["source"]), Path(values["out"])
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; pass a new --out or remove it.")
    if not source.exists():
        raise UserError(f"there is no {source}; pass another --source.")
    is_folder = target_format.startswith("diffusers") or (
        target_format == OURS and source_format != inception.FORMAT
    )
    report = Report()
    try:
        _convert(source_format, target_format, source, out, report)
        path = out / REPORT_FILE if is_folder else out.with_name(f"{out.name}.{REPORT_FILE}")
        report.write(path, checksum(_files_of(source, source_format)), checksum(out))
    except OSError as error:
        raise UserError(
            f"{out} could not be written ({error.strerror or error}); remove what is there of it,"
            " give the folder space and write permission and run again."
        ) from error
    logging.info("The converted weights are in %s.", out)


def _convert(
    source_format: str, target_format: str, source: Path, out: Path, report: Report
) -> None:
    values = flags.FLAGS.flag_values_dict()
    config, train_step = flags.FLAGS["config"].value, values["train_step"]
    weights_only, allow_pickle = values["weights_only"], values["allow_pickle"]
    if source_format == PUBLISHED:
        open_file = functools.partial(
            published_file.open_published, source, allow_pickle, weights_only
        )
        _published_to_ours(open_file, out, config, report)
    elif target_format == PUBLISHED:
        _ours_to_published(source, train_step, weights_only, out, report)
    elif source_format == target_format:
        _ours_to_ours(source, train_step, config, out, report)
    elif source_format == lpips.FORMAT:
        lpips.to_ours(source, allow_pickle, out, report)
    elif source_format == inception.FORMAT:
        inception.to_ours(source, allow_pickle, out, report)
    elif target_format == OURS:
        arrays, published_config = autoencoder.open_published(source, allow_pickle)
        autoencoder.to_ours(arrays, source_format, published_config, values["scale"], out, report)
    else:
        autoencoder.to_published(source, target_format, out, report)


def _files_of(source: Path, source_format: str) -> Path:
    """What was read of the source: of a run one checkpoint."""
    if source_format != OURS or (source / autoencoder_files.CONFIG_FILE).is_file():
        return source
    return Path(checkpoint_folders.find(source, flags.FLAGS["train_step"].value))


def _published_to_ours(
    open_file: Callable[[], Published], out: Path, config: ConfigDict | None, report: Report
) -> None:
    published = open_file()
    if config is None:
        config = _inferred_config(published, report)
    else:
        _say_other_settings(published, config, report)
    del published
    transformer.to_ours(
        open_file,
        build.model(config),
        config_to_json(config),
        _abstract_state(config),
        config.train.global_batch_size,
        out,
        report,
    )


def _inferred_config(published: Published, report: Report) -> ConfigDict:
    if not _DEFAULT_CONFIG.is_file():
        raise UserError(f"there is no {_DEFAULT_CONFIG} to start from; pass --config.")
    fields = published_file.infer_fields(published)
    listed = ", ".join(f"{_GROUPS.sub('', key)} {value}" for key, value in fields.items())
    report.say(f"The config follows from the file: {listed}; --config gives another.")
    return load_config(f"{_DEFAULT_CONFIG}:xl", fields)


def _say_other_settings(published: Published, config: ConfigDict, report: Report) -> None:
    flat = config.to_dict()
    for key, value in published.fields.items():
        group, name = key.split(".")
        if flat[group][name] != value:
            report.say(
                f"The file was trained with {key}={value}, the config has {flat[group][name]}."
            )


def _ours_to_published(
    source: Path, train_step: int | None, weights_only: bool, out: Path, report: Report
) -> None:
    config = config_from_json(checkpoints.read_config(source, train_step))
    settings = None if weights_only else build.optimizer_settings(config)
    params = _abstract_state(config).params
    transformer.to_published(source, train_step, build.model(config), params, settings, out, report)


def _ours_to_ours(
    source: Path, train_step: int | None, config: ConfigDict, out: Path, report: Report
) -> None:
    before = checkpoints.read_config(source, train_step)
    new_run.check_same_architecture(before, config)
    old = config_from_json(before)
    new_run.write(
        source,
        train_step,
        (build.model(old), _abstract_state(old).params),
        (build.model(config), _abstract_state(config)),
        config,
        out,
        report,
    )


def _abstract_state(config: ConfigDict) -> TrainState:
    mesh = sharding.make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    optimizer = make_optimizer(build.optimizer_settings(config))
    init = build.init_state(build.model(config), optimizer)
    return sharding.abstract_sharded(init, mesh, jax.random.key(0))


def define_flags() -> None:
    """Defines the program's flags."""
    define_config_flag(required=False)
    flags.DEFINE_string("from", OURS, f"Format of the source: {', '.join(FORMATS)}.")
    flags.DEFINE_string("to", OURS, "Format of the result: the same.")
    flags.DEFINE_string("source", None, "The file or folder to convert.", required=True)
    flags.DEFINE_string("out", None, "The file or folder to make.", required=True)
    flags.DEFINE_integer("train_step", None, "Which checkpoint of a run; the latest by default.")
    flags.DEFINE_float("scale", None, "Of an autoencoder's latents, if not the format's.")
    flags.DEFINE_bool("weights_only", False, "Leave out the optimizer's state.")
    flags.DEFINE_bool(
        "allow_pickle", False, "Read files that may run code that is in them: only if you trust it."
    )


if __name__ == "__main__":
    define_flags()
    program.run(main)
