"""The nearest change of a config that makes it fit, for `cfjax.preflight`.

Every try is a compilation of a minute or more, so an estimate says which are worth one.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from cfjax import build, sharding
from cfjax.errors import UserError
from cfjax.preflight_report import sample_report, train_report
from cfjax.tpu_topology import Chip

Mend = dict[str, Any]  # values by dotted key of a config


def train_mend(
    config: ConfigDict, devices: Sequence[jax.Device], chip: Chip, num_slices: int
) -> Mend | None:
    """The first of `train_candidates` whose train step fits; None if none does."""
    for changes in train_candidates(config, len(devices) // num_slices):
        changed = with_changes(config, changes)
        try:
            mesh = build.mesh(changed, devices)
            estimate = estimated_bytes(changed, mesh)
        except UserError:
            continue  # a mesh or microbatches that don't divide the batch
        if estimate > chip.hbm_limit:
            continue
        logging.info("Trying %s.", ", ".join(f"{key}={value}" for key, value in changes.items()))
        report = train_report(
            changed, mesh, chip, all_buckets=False, assumed_mfu=1.0, examples_per_epoch=1
        )
        if report["fits"]:
            return changes
    return None


def train_candidates(config: ConfigDict, devices_of_slice: int) -> Iterator[Mend]:
    """Changes that save memory, from the nearest to the farthest.

    A little recomputation first ("dots": 2% more arithmetic); then more parts of the state, which
    cost communication; then all recomputation (23%); then microbatches, each of which gathers the
    weights and sums the gradients anew; then all of these together.
    """
    policy, fsdp = config.model.remat_policy, config.mesh.fsdp
    microbatches = config.train.num_microbatches
    of_device = max(1, config.train.global_batch_size // devices_of_slice)
    more_microbatches = [
        microbatches * 2**i for i in range(1, 1 + math.floor(math.log2(of_device)))
    ]
    largest_fsdp = devices_of_slice // max(1, config.mesh.tensor)
    more_fsdp = [fsdp * 2**i for i in range(1, 20) if 0 < fsdp * 2**i <= largest_fsdp]
    if policy == "none":
        yield {"model.remat_policy": "dots"}
    yield from ({"mesh.fsdp": size} for size in more_fsdp)
    if policy != "full":
        yield {"model.remat_policy": "full"}
    yield from ({"train.num_microbatches": count} for count in more_microbatches)
    together = {}
    if policy != "full":
        together["model.remat_policy"] = "full"
    if more_fsdp:
        together["mesh.fsdp"] = more_fsdp[-1]
    if len(together) == 2:
        yield dict(together)
    if together:
        yield from ({**together, "train.num_microbatches": count} for count in more_microbatches)


def sample_mend(
    config: ConfigDict, devices: Sequence[jax.Device], chip: Chip, batch_size: int
) -> int | None:
    """The largest half, quarter, ... of a batch whose sampler fits; None if none does."""
    mesh = sharding.make_mesh(devices=devices)
    while batch_size > mesh.size:
        batch_size = max(batch_size // 2, mesh.size)
        logging.info("Trying a batch of %d.", batch_size)
        if sample_report(config, mesh, chip, batch_size=batch_size, assumed_mfu=1.0)["fits"]:
            return batch_size
    return None


def with_changes(config: ConfigDict, changes: Mend) -> ConfigDict:
    """A copy of a config with some values changed."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    return changed


def estimated_bytes(config: ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """Of a train step on one chip, from below: state, gradients, what layers keep.

    Left out is what the layer at work needs and what the compiler adds.

    Raises:
      UserError: as `build.train_program`.
    """
    program = build.train_program(config, mesh)
    state = _bytes_of_device(program.abstract_state)
    gradients = _bytes_of_device(program.abstract_state.params)
    jaxpr = program.trace(program.clean_lengths[-1]).jaxpr.jaxpr
    return state + gradients + kept_bytes(jaxpr, config.model.depth) // mesh.size


def _bytes_of_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def kept_bytes(jaxpr: Any, depth: int) -> int:
    """What a loop over `depth` layers keeps for the backward pass, at most, over all devices."""
    most = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == depth:
            stacked = equation.outvars[equation.params["num_carry"] :]
            total = sum(math.prod(it.aval.shape) * it.aval.dtype.itemsize for it in stacked)
            most = max(most, total)
        for inner in jaxprs_in_params(equation.params):
            most = max(most, kept_bytes(inner, depth))
    return most
