"""Published checkpoints of CausalFusion to ours and back, with little in memory at a time."""

import collections
import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import flax.traverse_util

from cfjax import checkpoint_folders, checkpoint_weights, program
from cfjax.convert import causal_fusion, optimizer_state, position_table, torch_files
from cfjax.convert.causal_fusion import POSITION_TABLE
from cfjax.convert.optimizer_state import AdamState
from cfjax.convert.published_file import SECTIONS, Published
from cfjax.convert.report import Report, check_names_and_shapes
from cfjax.errors import UserError
from cfjax.models.causal_fusion import CausalFusion
from cfjax.optimizer import OptimizerSettings
from cfjax.train_state import TrainState


def to_ours(
    open_file: Callable[[], Published],
    model: CausalFusion,
    config_json: str,
    abstract_state: TrainState,
    global_batch_size: int,
    workdir: str | PathLike,
    report: Report,
) -> None:
    """Writes a checkpoint of the published weights, with the optimizer's state if it comes along.

    Args:
      open_file: makes what `open_published` returns; called once for each part, so that the pages
        of a file that is mapped are let go between.
      model: of our side.
      config_json: the config that makes it.
      abstract_state: of a run of this config, as `ShapeDtypeStruct`s on one device.
      global_batch_size: of the run.
      workdir: a new folder.
      report: is filled.

    Raises:
      UserError: weights are missing, extra or misshapen; they are listed.
    """
    expected = causal_fusion.published_shapes(abstract_state.params, model.grid)
    flat = flax.traverse_util.flatten_dict(abstract_state.params, sep="/")
    is_learned = model.position_embedding == "learned"
    published = open_file()
    report.leave_out(dict.fromkeys(published.others, "they are not weights"))
    if published.sections["model"] is published.sections["ema"]:
        report.say("Parameters and their average are the same, as the file has one of the two.")
    before = _check_weights(published, model, expected)
    adam = published.adam
    parts = [*published.sections.values(), *(adam.moments.values() if adam else ())]
    report.say_casts(dtype for part in parts for dtype in part.dtypes().values())
    if before != model.grid:
        report.say(position_table.remark(before, model.grid, is_learned))
    if adam and before != model.grid:
        report.leave_out({"opt": "it belongs to the position table of the other grid"})
        adam = None
    if adam:
        _check_trained(model, adam)
        report.say(f"The optimizer's state of train step {adam.train_step} comes along.")
    report.map_names(expected, _ours(abstract_state.params))
    train_step, moments = (adam.train_step, optimizer_state.MOMENTS) if adam else (0, {})
    del published, adam, parts

    def make(name):
        def arrays():
            published = open_file()
            part = (published.adam.moments if name in moments else published.sections)[name]
            if before != model.grid and is_learned:
                table = position_table.interpolate(part[POSITION_TABLE][0], before, model.grid)
                part = collections.ChainMap({POSITION_TABLE: table[None]}, part)
            return causal_fusion.leaves_from_published(part, flat)

        return arrays

    program.check_workdir_writable(workdir)
    checkpoint_weights.write(
        workdir,
        config_json,
        abstract_state,
        {ours: make(name) for name, ours in (SECTIONS | moments).items()},
        train_step,
        train_step * global_batch_size,
    )


def _check_weights(
    published: Published, model: CausalFusion, expected: Mapping[str, tuple[int, ...]]
) -> tuple[int, int]:
    """The grid of the published weights, which must fit the model but for that."""
    grids = set()
    for state_dict in published.sections.values():
        shapes = state_dict.shapes()
        table, grid = shapes.get(POSITION_TABLE), model.grid
        if position_table.is_of_other_grid(table, expected[POSITION_TABLE]):
            shapes[POSITION_TABLE] = expected[POSITION_TABLE]
            grid = (math.isqrt(table[1]),) * 2
        check_names_and_shapes(shapes, expected, causal_fusion.MEND)
        if model.position_embedding != "learned":
            causal_fusion.check_frozen_positions(state_dict[POSITION_TABLE], grid)
        grids.add(grid)
    if len(grids) > 1:
        found = " and ".join(f"{rows}x{columns}" for rows, columns in sorted(grids))
        raise UserError(
            f"model and ema of the published file have {POSITION_TABLE} for {found} tokens; pass a"
            " file in which both are of one grid."
        )
    return grids.pop()


def _check_trained(model: CausalFusion, adam: AdamState) -> None:
    is_learned = model.position_embedding == "learned"
    is_trained = all(POSITION_TABLE in moments for moments in adam.moments.values())
    if is_learned != is_trained:
        has = "a" if is_trained else "no"
        raise UserError(
            f"opt of the published file has {has} state of {POSITION_TABLE} but"
            f" model.position_embedding is {model.position_embedding}; take the other kind of table"
            " or pass --weights_only."
        )


def to_published(
    workdir: str | PathLike,
    train_step: int | None,
    model: CausalFusion,
    abstract_params: Any,
    settings: OptimizerSettings | None,
    out: Path,
    report: Report,
) -> None:
    """Writes a `.pt` that the published code loads, and trains on if the optimizer's state is there.

    Args:
      workdir: of our run.
      train_step: of the checkpoint, by default the latest.
      model: of our run.
      abstract_params: its parameters, as `ShapeDtypeStruct`s on one device.
      settings: the optimizer's, whose state is written too if there is one; None leaves it out.
      out: the file.
      report: is filled.

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
    is_learned = model.position_embedding == "learned"
    document = {section: torch_files.entries(section, shapes) for section in ("model", "ema")}
    parts, counts = SECTIONS, ()
    if settings and checkpoint_weights.has_optimizer_state(workdir, train_step):
        taken = int(checkpoint_folders.find(workdir, train_step).name)
        optimizer = optimizer_state.to_published(shapes, is_learned, settings, taken)
        counts = optimizer_state.counts(optimizer["opt"], taken)
        document |= optimizer
        parts = SECTIONS | optimizer_state.MOMENTS
        report.say(f"The optimizer's state of train step {taken} comes along.")
        for remark in optimizer_state.remarks(settings):
            report.say(remark)
    leaves = {
        part: checkpoint_weights.arrays_by_path(workdir, ours, abstract_params, train_step)
        for part, ours in parts.items()
    }

    def arrays():
        for part in parts:
            for path, value in leaves[part]:
                for name, array in causal_fusion.leaf_to_published(path, value, shapes):
                    yield (part, name), array
            if part in SECTIONS and not is_learned:
                table = POSITION_TABLE
                yield (part, table), causal_fusion.frozen_positions(shapes[table], model.grid)
        yield from counts

    program.check_workdir_writable(out.parent)
    torch_files.write(out, document, arrays())
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
