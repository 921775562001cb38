"""The reports of `cfjax.preflight`: of a config's train step, and of its sampler."""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax import build, clean_lengths, sampler, sampling, sharding
from cfjax.build_documents import has_text, slots
from cfjax.compiled_report import program_report
from cfjax.errors import UserError
from cfjax.flops import sampling_flops
from cfjax.tpu_topology import Chip


def train_report(
    config: ConfigDict,
    mesh: Mesh,
    chip: Chip,
    *,
    all_buckets: bool,
    assumed_mfu: float,
    examples_per_epoch: int,
) -> dict[str, Any]:
    """Compiles the train step over `mesh`, one program for each number of clean tokens.

    Args:
      config: see `configs/default.py`.
      mesh: of described devices, each a `chip`.
      chip: its limits.
      all_buckets: compile all programs instead of the one with the most clean tokens.
      assumed_mfu: share of the chips' peak that the model's FLOPs are assumed to reach.
      examples_per_epoch: images of what counts as an epoch.

    Returns:
      Plain values for JSON. Of documents, "row" is what a row has room for, and the rates are those of
      full rows.

    Raises:
      UserError: a config that can't be trained.
    """
    program = build.train_program(config, mesh)
    lengths = program.clean_lengths
    probabilities = clean_lengths.clean_length_probabilities(
        build.factorization(config), program.settings.model.num_tokens
    )
    shares = clean_lengths.length_probabilities(probabilities, lengths).tolist()
    model_flops = [3 * build.training_forward_flops(config, length) for length in lengths]
    programs = [
        {
            "num_clean": lengths[i],
            "share_of_train_steps": shares[i],
            **program_report(
                program.trace(lengths[i]),
                functools.partial(program.compile, lengths[i]),
                chip,
                mesh.size,
                model_flops[i],
            ),
        }
        for i in range(0 if all_buckets else len(lengths) - 1, len(lengths))
    ]
    expected_flops = sum(p * flops for p, flops in zip(shares, model_flops, strict=True))
    seconds = expected_flops / (assumed_mfu * mesh.size * chip.peak_flops)
    images_per_second = config.train.global_batch_size / seconds
    of_documents = {}
    if has_text(config):
        room = slots(config)
        images_per_second *= room.num_images
        of_documents["row"] = {"text_tokens": room.num_text, "images": room.num_images}
    return {
        "what": "train",
        "fits": all(it["fits"] for it in programs),
        "num_parameters": num_parameters(program.abstract_state.params),
        "batch_size": config.train.global_batch_size,
        **of_documents,
        "programs": programs,
        "assumption": {
            "mfu": assumed_mfu,
            "seconds_per_train_step": seconds,
            "images_per_second": images_per_second,
            "epochs_per_day": images_per_second * 86_400 / examples_per_epoch,
        },
    }


def sample_report(
    config: ConfigDict, mesh: Mesh, chip: Chip, *, batch_size: int, assumed_mfu: float
) -> dict[str, Any]:
    """Compiles the sampler of `config.sampling` for a batch over `mesh`.

    Args:
      config: see `configs/default.py`.
      mesh: of described devices, each a `chip`; the batch is rounded up to a multiple of them.
      chip: its limits.
      batch_size: images at a time over all chips.
      assumed_mfu: share of the chips' peak that the model's FLOPs are assumed to reach.

    Returns:
      Plain values for JSON.

    Raises:
      UserError: a config that can't be sampled, or a model of documents.
    """
    if has_text(config):
        raise UserError(
            "--what=sample knows the sampler of single images alone, and text.tokenizer makes this a"
            " model of documents; use --what=train."
        )
    batch_size = -(-batch_size // mesh.size) * mesh.size
    model = build.sampling_model(config)
    settings = build.sampling_settings(config)
    model_flops = batch_size * sampling_flops(
        model, settings.split_sizes, settings.num_passes, settings.num_rows
    )
    traced = sampler.trace_generation(config, mesh, batch_size)

    def compile_program():
        with sharding.activate(mesh):
            return traced.lower().compile()

    report = program_report(traced, compile_program, chip, mesh.size, model_flops)
    rows = batch_size // mesh.size * settings.num_rows
    capacity = model.condition_length + sampling.num_pushed_tokens(model, settings)
    kv_cache = jax.eval_shape(lambda: model.empty_cache(rows, capacity))
    report["memory"]["kv_cache"] = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kv_cache[:2]
    )
    seconds = model_flops / (assumed_mfu * mesh.size * chip.peak_flops)
    params = jax.eval_shape(build.init_params(model), jax.random.key(0))
    return {
        "what": "sample",
        "fits": report["fits"],
        "num_parameters": num_parameters(params),
        "batch_size": batch_size,
        "programs": [report],
        "assumption": {
            "mfu": assumed_mfu,
            "seconds_per_batch": seconds,
            "images_per_second": batch_size / seconds,
        },
    }


def num_parameters(params: Any) -> int:
    """Of a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
