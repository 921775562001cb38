"""Configs: from a file and overrides, checked in one place, and to JSON and back."""

import difflib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from cfjax.errors import UserError

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
_ILLEGAL_VALUE = re.compile(r"flag --config\.([^=]+)=(.*?): ")
# Fields that older checkpoints don't have, by group, with what a config without them means.
_ADDED_FIELDS = {"model": {"position_scale": 1.0}}


def define_config_flag(required: bool = True) -> flags.FlagHolder:
    """Defines the flag `--config FILE[:VARIANT]` with overrides `--config.KEY=VALUE`.

    The holder's `value` is the locked `ConfigDict`. `program.run` parses it by `parse_flags`.
    """
    holder = config_flags.DEFINE_config_file(
        "config", None, "Config file and variant, such as configs/imagenet256.py:xl."
    )
    if required:
        flags.mark_flag_as_required("config")
    return holder


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses a command line; a dash in the name of a flag is an underscore: `--batch-size=8`.

    Returns:
      The program's name and what is not a flag.

    Raises:
      UserError: a flag, a config file, a variant, a config key or a value that is not understood.
    """
    argv = [_with_underscores(argument) for argument in argv]
    config = None
    if "config" in flag_values:
        path = _argument(argv, "config")
        if path is not None:
            config = _load_file(path)
            _check_keys(config, (match[1] for match in map(_OVERRIDE.match, argv) if match))
    return _parse(flag_values, argv, config)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def load_config(path: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> ConfigDict:
    """Loads a config as a program would, without flags.

    Args:
      path: the file, with a variant after a colon where it has them: `configs/mnist.py`,
        `configs/imagenet256.py:xl`.
      overrides: values by dotted key, `{"model.width": 96}`, or as on a command line,
        `["model.width=96"]`.

    Returns:
      A locked `ConfigDict`.

    Raises:
      UserError: a file, a variant, a key or a value that is not understood.
    """
    config = _load_file(path)
    if isinstance(overrides, Mapping):
        _check_keys(config, overrides)
        for key, value in overrides.items():
            *parents, last = key.split(".")
            node = config
            for parent in parents:
                node = node[parent]
            try:
                node[last] = value
            except TypeError as error:
                raise UserError(_wrong_type(config, key, value)) from error
        return config
    argv = ["", *(f"--config.{override}" for override in overrides)]
    _check_keys(config, (override.split("=", 1)[0] for override in overrides))
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
    _parse(flag_values, argv, config)
    return config


def config_to_json(config: ConfigDict) -> str:
    """The config as indented JSON; tuples become arrays."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def config_from_json(text: str) -> ConfigDict:
    """The locked config that `config_to_json` wrote; arrays become tuples.

    That of an older checkpoint gets the fields that were added since, with what was meant without.

    Raises:
      UserError: `text` is not a JSON object.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"the config is not JSON ({error}); write it by a program again."
        ) from error
    if not isinstance(document, dict):
        raise UserError(f"the config must be a JSON object, got {text[:40]!r}.")
    for group, fields in _ADDED_FIELDS.items():
        if isinstance(document.get(group), dict):
            document[group] = fields | document[group]
    config = ConfigDict(_lists_to_tuples(document))
    config.lock()
    return config


def changed_keys(before: str, now: ConfigDict) -> list[str]:
    """What differs between an earlier config, as JSON, and one of now, as "key: old -> new"."""
    old, new = (_flat(config) for config in (config_from_json(before), now))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(config: ConfigDict) -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": inner for name, inner in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(child) for key, child in value.items()}
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value


def _argument(argv: Sequence[str], name: str) -> str | None:
    """The last value of a flag on a command line, given as `--name value` or `--name=value`."""
    value = None
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if argument in (f"--{name}", f"-{name}"):
            value = following
        elif argument.startswith((f"--{name}=", f"-{name}=")):
            value = argument.split("=", 1)[1]
    return value


def _load_file(path_and_variant: str) -> ConfigDict:
    path, colon, variant = path_and_variant.partition(":")
    if not Path(path).is_file():
        there = [str(other) for other in sorted(Path(path).parent.glob("*.py"))]
        nearest = difflib.get_close_matches(path, there, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "pass the path of one."
        raise UserError(f"there is no config file {path!r}; {hint}")
    # Configs import each other as `configs.NAME`, from whatever folder the program is run.
    above = str(Path(path).resolve().parent.parent)
    if above not in sys.path:
        sys.path.append(above)
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None:
        raise UserError(f"the config {path!r} is not a Python file; pass one of configs/.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"the config file {path!r} has no function get_config; pass another.")
    arguments = (variant,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        mend = f"has no variants; pass {path!r}" if colon else f"needs one; pass '{path}:VARIANT'"
        raise UserError(f"the config {path_and_variant!r} {mend}.") from error
    config = module.get_config(*arguments)
    config.lock()
    return config


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """All dotted keys, of groups too."""
    for key in config:
        yield prefix + key
        if isinstance(config[key], ConfigDict):
            yield from _keys(config[key], f"{prefix}{key}.")


def _check_keys(config: ConfigDict, keys: Iterator[str] | Mapping[str, Any]) -> None:
    known = list(_keys(config))
    for key in keys:
        if key not in known:
            (nearest,) = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UserError(f"unknown config key {key!r}; did you mean {nearest!r}?")


def _wrong_type(config: ConfigDict, key: str, value: Any) -> str:
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    expected = node.get_type(last).__name__
    return (
        f"config key {key!r} takes a value of type {expected}, like {node[last]!r}; got {value!r}."
    )


def _parse(
    flag_values: flags.FlagValues, argv: Sequence[str], config: ConfigDict | None
) -> list[str]:
    try:
        return flag_values(argv)
    except flags.Error as error:
        message = " ".join(str(error).split())
        illegal = _ILLEGAL_VALUE.match(message)
        if illegal and config is not None:
            message = _wrong_type(config, illegal[1], illegal[2])
        raise UserError(message) from error
