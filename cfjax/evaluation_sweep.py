"""Several places on the factorization plane in one evaluation: `--sweep=guidance_scale=1.0,1.5`."""

import itertools
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ml_collections import ConfigDict

from cfjax.errors import UserError, check_choice
from cfjax.evaluation.report import Report
from cfjax.model_loading import WEIGHTS as OF_WEIGHTS
from cfjax.sampler import OF_MODEL
from cfjax.visualization import save_curves

WEIGHTS = "weights"  # swept besides the fields of config.sampling
_SHOWN = ("fid", "sfid", "inception_score", "precision", "recall", "class_agreement")


def parse(texts: Sequence[str], sampling: ConfigDict) -> dict[str, tuple[Any, ...]]:
    """The values of each option that is swept.

    Args:
      texts: such as "guidance_scale=1.0,1.25"; values have no commas in them.
      sampling: `config.sampling`, which gives the types.

    Raises:
      UserError: an unknown option, a value of another type, or an option that is there twice.
    """
    swept: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        if not listed:
            raise UserError(f"--sweep={text} must name an option and values: guidance_scale=1,1.5.")
        known = [it for it in sampling if it not in OF_MODEL and it != "guidance_interval"]
        check_choice("option of --sweep", name, [*known, WEIGHTS])
        if name in swept:
            raise UserError(f"--sweep has {name} twice; give all of its values in one.")
        of_type = str if name == WEIGHTS else type(sampling[name])
        try:
            values = [_parse(value, of_type) for value in listed.split(",")]
        except ValueError:
            raise UserError(
                f"--sweep={text} has a value that is not of type {of_type.__name__}."
            ) from None
        if name == WEIGHTS:
            for value in values:
                check_choice("weights", value, OF_WEIGHTS)
        swept[name] = tuple(values)
    return swept


def _parse(text: str, of_type: type) -> Any:
    if of_type is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return of_type(text)


def points(swept: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations, the last option changing fastest."""
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def sampling_options(point: Mapping[str, Any]) -> dict[str, Any]:
    """Of a point, the fields of `config.sampling`."""
    return {name: value for name, value in point.items() if name != WEIGHTS}


def name_of(point: Mapping[str, Any]) -> str:
    """Of a row: "S = 7", or "S = 7, guidance_scale = 1.5"."""
    parts = [
        f"{'S' if name == 'num_ar_steps' else name} = {value}" for name, value in point.items()
    ]
    return ", ".join(parts) or "samples"


def plot(
    path: str | PathLike,
    report: Report,
    swept: Mapping[str, Sequence[Any]],
    rows: Sequence[Mapping],
) -> None:
    """A panel a score over the first option with several numbers; a curve for each other point.

    Args:
      path: of the PNG.
      report: of the sweep.
      swept: from `parse`.
      rows: the point of each row.
    """
    along = next((name for name, values in swept.items() if _are_numbers(values)), None)
    if along is None:
        return
    num_samples = report.scores[0].num_samples
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for value in _SHOWN:
        curves: dict[str, list[tuple[float, float]]] = {}
        for point, row in zip(rows, report.scores, strict=True):
            others = {
                name: it for name, it in point.items() if name != along and len(swept[name]) > 1
            }
            if value in row.values:
                curves.setdefault(name_of(others), []).append((point[along], row.values[value]))
        if curves:
            panels[report.label(value, num_samples)] = curves
    save_curves(path, panels, along, is_logarithmic=False)


def _are_numbers(values: Sequence[Any]) -> bool:
    return len(values) > 1 and all(isinstance(it, int | float) for it in values)
