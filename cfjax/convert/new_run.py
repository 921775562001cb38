"""A run's weights as the start of another run, whose images may have another size."""

from collections.abc import Iterator
from os import PathLike
from typing import Any

import flax.traverse_util
import numpy as np
from ml_collections import ConfigDict

from cfjax import checkpoint_weights, program
from cfjax.config_loading import changed_keys, config_to_json
from cfjax.convert import position_table
from cfjax.convert.report import Report
from cfjax.errors import UserError
from cfjax.models.causal_fusion import CausalFusion
from cfjax.train_state import TrainState

_TABLE = "token_positions"
# What a model is; its other fields only say how it is computed.
_ARCHITECTURE = (
    *("model.width", "model.depth", "model.num_heads", "model.mlp_ratio", "model.patch_size"),
    *("model.num_condition_tokens", "model.condition_repeats", "model.position_embedding"),
    *("data.channels", "data.num_classes"),
)


def check_same_architecture(before: str, config: ConfigDict) -> None:
    """Refuses a config whose model differs in more than its grid from that of a config as JSON.

    Raises:
      UserError: it does; all differences are listed.
    """
    changes = [
        change for change in changed_keys(before, config) if change.split(":")[0] in _ARCHITECTURE
    ]
    if changes:
        raise UserError(
            f"the new run's model differs in more than data.size: {', '.join(changes)}; take these"
            " from the config of the source."
        )


def write(
    source: str | PathLike,
    train_step: int | None,
    before: tuple[CausalFusion, Any],
    after: tuple[CausalFusion, TrainState],
    config: ConfigDict,
    workdir: str | PathLike,
    report: Report,
) -> None:
    """Writes a checkpoint of train step 0 with the weights of another run.

    Args:
      source: the other run's workdir.
      train_step: of its checkpoint, by default the latest.
      before: its model and its parameters, as `ShapeDtypeStruct`s on one device.
      after: the model of the new run, and its state as such.
      config: of the new run.
      workdir: a new folder.
      report: is filled.

    Raises:
      UserError: there is no such checkpoint, or it is corrupt.
    """
    (old_model, old_params), (model, abstract_state) = before, after
    flat = flax.traverse_util.flatten_dict(abstract_state.params, sep="/")
    report.map_names(
        {path: leaf.shape for path, leaf in flat.items()}, {path: path for path in flat}
    )
    if model.grid != old_model.grid:
        is_learned = model.position_embedding == "learned"
        report.say(position_table.remark(old_model.grid, model.grid, is_learned))
    report.say("The new run starts at train step 0 with a fresh optimizer state.")
    parts = {
        name: checkpoint_weights.arrays_by_path(source, name, old_params, train_step)
        for name in ("ema", "params")
    }

    def make(name: str) -> Iterator[tuple[str, np.ndarray]]:
        for path, array in parts[name]:
            if path == _TABLE and model.grid != old_model.grid:
                array = position_table.interpolate(array, old_model.grid, model.grid)
            yield path, array

    program.check_workdir_writable(workdir)
    checkpoint_weights.write(
        workdir,
        config_to_json(config),
        abstract_state,
        {name: lambda name=name: make(name) for name in parts},
    )
