"""Checkpoints to models that generate: `cfjax.load`."""

from os import PathLike, fspath
from typing import Any

import jax
from ml_collections import ConfigDict

from cfjax import (
    build,
    build_data,
    build_documents,
    checkpoint_weights,
    checkpoints,
    mesh_autoencoder,
    sharding,
)
from cfjax.config_loading import config_from_json
from cfjax.document_sampler import DocumentSampler
from cfjax.errors import UserError, check_choice
from cfjax.guided_network import Network
from cfjax.sampler import Sampler, override_sampling

WEIGHTS = ("ema", "params")


def load(
    directory: str | PathLike,
    train_step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    autoencoder: str | PathLike | None = None,
    guide: str | PathLike | None = None,
    weights: str = "ema",
    tokenizer: str | PathLike | None = None,
    **overrides: Any,
) -> Sampler:
    """The model of a checkpoint.

    Args:
      directory: a run's workdir, its `checkpoints/` folder, or one checkpoint.
      train_step: which checkpoint, by default the latest.
      mesh: from `sharding.make_mesh`; by default each device has a copy of the parameters.
      autoencoder: folder of the one that decodes latents, by default `config.autoencoder.path`.
      guide: a checkpoint of a weaker model, smaller or of fewer train steps, that guides in place of
        the null class (autoguidance, arXiv 2406.02507).
      weights: "ema", or "params" for the parameters as they were trained, without averaging.
      tokenizer: of a model of documents whose tokenizer's file lies elsewhere now, its path; by
        default `config.text.tokenizer`.
      **overrides: fields of `config.sampling`, such as `dtype="bfloat16"`, as defaults of `generate`.

    Raises:
      UserError: there is no such checkpoint, it is corrupt, its config lacks a field, the mesh does
        not divide the model, or an autoencoder, guide or tokenizer is missing, another one, or not
        needed.
    """
    check_choice("weights", weights, WEIGHTS)
    mesh = sharding.make_mesh() if mesh is None else mesh
    config = _read_config(directory, train_step, tokenizer)
    override_sampling(config, overrides)
    if autoencoder is not None:
        if not build_data.sees_latents(config):
            raise UserError(
                f"the model in {directory} generates pixels; don't pass an autoencoder."
            )
        config.autoencoder.path = fspath(autoencoder)
    if build_data.sees_latents(config) and not config.autoencoder.path:
        raise UserError(
            f"the model in {directory} generates latents, and its config names no autoencoder;"
            " pass one that decodes them: --autoencoder=FOLDER, or cfjax.load(autoencoder=...)."
        )
    decoder = build_data.autoencoder(config)
    weaker_config = None
    if guide is not None:
        weaker_config = _read_config(guide, None)
        weaker_config.sampling.dtype = config.sampling.dtype
        _check_guide(directory, config, guide, weaker_config)
    network = _restore(directory, train_step, config, mesh, weights)
    of_kind = DocumentSampler if build_documents.has_text(config) else Sampler
    return of_kind(
        config=config,
        model=network.model,
        params=network.params,
        mesh=mesh,
        autoencoder=decoder and mesh_autoencoder.put(decoder, mesh),
        guide=weaker_config and _restore(guide, None, weaker_config, mesh, "ema"),
    )


def _read_config(
    directory: str | PathLike, train_step: int | None, tokenizer: str | PathLike | None = None
) -> ConfigDict:
    config = config_from_json(checkpoints.read_config(directory, train_step))
    if tokenizer is not None:
        if not build_documents.has_text(config):
            raise UserError(f"the model in {directory} has no text head; don't pass a tokenizer.")
        config.text.tokenizer = fspath(tokenizer)
    try:
        build.sampling_model(config)
        # Who guides, and how strongly, may be overridden: it is checked when that is known.
        build.sampling_settings(config, is_autoguided=True)
        build_data.sees_latents(config)
    except AttributeError as error:
        raise UserError(
            f"the config of the checkpoint in {directory} lacks the field {error.args[0]}, as another"
            " version of cfjax saved it; add the field to its config/config.json."
        ) from error
    return config


def _restore(
    directory: str | PathLike,
    train_step: int | None,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    weights: str,
) -> Network:
    model = build.sampling_model(config)
    build.check_mesh_divides_model(config, mesh)
    abstract = sharding.abstract_sharded(build.init_sampling_params(model), mesh, jax.random.key(0))
    if weights == "ema":
        return Network(model, checkpoints.restore_ema(directory, abstract, train_step))
    arrays = dict(checkpoint_weights.arrays_by_path(directory, "params", abstract, train_step))

    def place(path, leaf):
        array = arrays[jax.tree_util.keystr(path, simple=True, separator="/")].astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, array.__getitem__)

    return Network(model, jax.tree_util.tree_map_with_path(place, abstract))


def _check_guide(
    directory: str | PathLike, config: ConfigDict, guide: str | PathLike, weaker: ConfigDict
) -> None:
    """Refuses a guide that sees other tokens, noise or classes, or predicts something else."""
    fields = (
        *("data.size", "data.channels", "data.num_classes", "model.patch_size"),
        *("diffusion.noise_schedule", "diffusion.num_timesteps", "diffusion.prediction_type"),
    )
    for field in fields:
        room, name = field.split(".")
        if config[room][name] != weaker[room][name]:
            raise UserError(
                f"the guide in {guide} has {field}={weaker[room][name]}, but the model in"
                f" {directory} {config[room][name]}; pass one that agrees."
            )
