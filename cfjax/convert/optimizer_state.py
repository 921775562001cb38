"""The optimizer's part of published checkpoints: `torch.optim.AdamW`'s state to ours and back.

PyTorch numbers the parameters as `model.parameters()` gives them, which is the order of the names in
the state dict. A frozen position table has a number there, but no state.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cfjax.convert import torch_files
from cfjax.convert.causal_fusion import POSITION_TABLE
from cfjax.convert.torch_files import StateDict, TensorEntry
from cfjax.errors import UserError
from cfjax.optimizer import OptimizerSettings

# The published names of Adam's moments, and ours.
MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}
_STEP = "step"


class AdamState(NamedTuple):
    """What `opt` of a published file says.

    Attributes:
      train_step: how many updates were made.
      moments: "exp_avg" and "exp_avg_sq", each by the names of the parameters that were trained.
      fields: config fields by dotted key.
    """

    train_step: int
    moments: Mapping[str, StateDict]
    fields: Mapping[str, float]


def from_published(opt: Any, shapes: Mapping[str, tuple[int, ...]]) -> AdamState:
    """The state dict of the optimizer that trained these weights.

    Args:
      opt: of `torch.optim.AdamW` over all parameters, or over all but the position table.
      shapes: of the weights by name, in the order of the state dict.

    Raises:
      UserError: it is of another optimizer or does not fit the weights.
    """
    group, state = _group_and_state(opt)
    names, indices = list(shapes), group["params"]
    if len(indices) == len(names) - 1 and POSITION_TABLE in names:
        names.remove(POSITION_TABLE)
    if len(indices) != len(names):
        _refuse(f"is of {len(indices)} parameters but there are {len(shapes)}")
    if strange := state.keys() - set(indices):
        _refuse(f"has a state of parameter {min(strange, key=str)}, which it does not list")
    entries = {n: state[i] for n, i in zip(names, indices, strict=True) if i in state}
    for name in names:
        if name not in entries and name != POSITION_TABLE:
            _refuse(f"has no state of {name}")
    for name, entry in entries.items():
        _check_entry(name, entry, shapes[name])
    counts = {_count(name, entry[_STEP]) for name, entry in entries.items()}
    if len(counts) != 1 or not min(counts).is_integer():
        _refuse(
            f"counts {', '.join(f'{count:g}' for count in sorted(counts))} updates, not one number"
        )
    moments = {
        moment: StateDict({name: entry[moment] for name, entry in entries.items()})
        for moment in MOMENTS
    }
    return AdamState(int(counts.pop()), moments, _fields(group))


def _group_and_state(opt: Any) -> tuple[Mapping[str, Any], Mapping[Any, Any]]:
    parts = opt if isinstance(opt, Mapping) else {}
    groups, state = parts.get("param_groups"), parts.get("state")
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        _refuse("is no state dict of an optimizer")
    if len(groups) != 1:
        _refuse(f"has {len(groups)} groups of parameters, not one")
    for name in ("params", "lr", "betas", "eps", "weight_decay"):
        if name not in groups[0]:
            _refuse(f"has no {name}, as AdamW's has")
    return groups[0], state


def _check_entry(name: str, entry: Any, shape: tuple[int, ...]) -> None:
    expected = {_STEP, *MOMENTS}
    there = set(entry) if isinstance(entry, Mapping) else set()
    if there != expected:
        listed = ", ".join(sorted(map(str, there))) or "nothing"
        _refuse(f"has {listed} of {name}, not {', '.join(sorted(expected))}")
    moments = {moment: entry[moment] for moment in MOMENTS}
    if not torch_files.is_state_dict(moments):
        _refuse(f"has moments of {name} that are no tensors")
    for moment, other in StateDict(moments).shapes().items():
        if other != shape:
            _refuse(f"has {moment} of {name} as {other} but the weight is {shape}")


def _count(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        _refuse(f"has a {_STEP} of {name} that is no number")


def _fields(group: Mapping[str, Any]) -> dict[str, float]:
    b1, b2 = group["betas"]
    values = {
        "learning_rate": group.get(
            "initial_lr", group["lr"]
        ),  # the former where there is a warm-up
        "b1": b1,
        "b2": b2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }
    return {f"optimizer.{name}": float(value) for name, value in values.items()}


def _refuse(what: str) -> NoReturn:
    raise UserError(
        f"opt of the published file {what}; pass --weights_only to leave it out, or take a file of"
        " CausalFusion's training."
    )


def to_published(
    shapes: Mapping[str, tuple[int, ...]],
    is_table_trained: bool,
    settings: OptimizerSettings,
    train_step: int,
) -> dict[str, Any]:
    """What the published training goes on from besides weights, for `torch_files.write`.

    The values of its `TensorEntry`s are the moments under (moment, name), and `counts`.

    Args:
      shapes: of the published weights by name, in the order of their model's parameters.
      is_table_trained: whether the position table is, too.
      settings: the optimizer's.
      train_step: how many updates it has made.
    """
    torch = torch_files.import_torch()
    optimizer = torch.optim.AdamW(
        [torch.zeros(1)],
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    # A partial, whose state is empty, as the published code's schedule is one.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(float)).state_dict()
    (group,) = optimizer.state_dict()["param_groups"]
    rate = settings.learning_rate * min(1.0, train_step / max(1, settings.warmup_steps))
    state = {
        index: {_STEP: TensorEntry((_STEP, name), ())}
        | {moment: TensorEntry((moment, name), tuple(shape)) for moment in MOMENTS}
        for index, (name, shape) in enumerate(shapes.items())
        if is_table_trained or name != POSITION_TABLE
    }
    group = group | {
        "lr": rate,
        "initial_lr": settings.learning_rate,
        "params": list(range(len(shapes))),
    }
    return {
        "opt": {"state": state, "param_groups": [group]},
        "scheduler": scheduler
        | {"last_epoch": train_step, "_step_count": train_step + 1, "_last_lr": [rate]},
        "train_steps": train_step,
        "start_epoch": 0,
    }


def remarks(settings: OptimizerSettings) -> list[str]:
    """What `to_published` cannot carry over, in sentences."""
    said = [
        "start_epoch is 0, as a run does not know how many images an epoch has; the published"
        " training counts its epochs from there."
    ]
    if settings.schedule != "constant":
        said.append(
            "The learning rate goes on constant, as the published training has no"
            f" {settings.schedule} schedule."
        )
    return said


def counts(opt: Mapping[str, Any], train_step: int) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """Keys and values of the counts in `opt` of `to_published`, each of which is a tensor of its own."""
    for entry in opt["state"].values():
        yield entry[_STEP].key, np.full((), train_step, np.float32)
