"""Scores during training: samples of the EMA weights, scored every n train steps.

Neither the state nor any random number of the training is touched: the run ends with the bits that
it would have had.
"""

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax import build, evaluation_inputs, sharding
from cfjax.data.image_sets import of_source
from cfjax.errors import UserError
from cfjax.evaluation.report import FEW_SAMPLES
from cfjax.evaluation.scores import Protocol, score
from cfjax.evaluation_inputs import Sources
from cfjax.generation_request import labels_of
from cfjax.mesh_autoencoder import MeshAutoencoder
from cfjax.models.causal_fusion import in_compute_dtype
from cfjax.sampler import Sampler

METRICS = ("fid",)  # those that `train.keep_best_metric` may name
_FOLDER = "evaluation"


def check(config: ConfigDict) -> None:
    """Refuses fields of `config.evaluation` that do not fit, before anything is computed.

    Raises:
      UserError: too few samples, or scores that no checkpoint would have.
    """
    evaluation, train = config.evaluation, config.train
    if evaluation.every < 0 or (evaluation.every and evaluation.num_samples < 2):
        raise UserError(
            f"evaluation.every is {evaluation.every} and evaluation.num_samples"
            f" {evaluation.num_samples}, but must be at least 0 and 2."
        )
    if train.keep_best_metric in METRICS:
        if not evaluation.every:
            raise UserError(
                f"train.keep_best_metric is {train.keep_best_metric}, but nothing is evaluated; set"
                " evaluation.every."
            )
        if evaluation.every % train.checkpoint_every:
            raise UserError(
                f"evaluation.every {evaluation.every} must be a multiple of train.checkpoint_every"
                f" {train.checkpoint_every}, as the best checkpoint is kept by"
                f" {train.keep_best_metric}."
            )


def scorer(
    config: ConfigDict,
    mesh: Mesh,
    autoencoder: MeshAutoencoder | None,
    sources: Sources,
    workdir: str,
) -> Callable[[Any], dict[str, float]]:
    """EMA parameters to scores by name, such as "fid"; all processes call it and have the same.

    Args:
      config: of the run.
      mesh: of the training.
      autoencoder: that decodes latents; None for pixels.
      sources: the real images, training and held-out.
      workdir: of the run; the classifier is kept in it.

    Raises:
      UserError: weights or a reference that are missing or are others.
    """
    evaluation = config.evaluation
    if evaluation.inception_weights:
        extractor = evaluation_inputs.inception(
            evaluation.inception_weights, mesh, config.sampling.images_per_device
        )
    else:
        folder = Path(workdir) / _FOLDER / "classifier"
        extractor = evaluation_inputs.classifier(folder, sources, config.data.name)
    batch_size = 256
    if evaluation.reference:
        reference = evaluation_inputs.reference_of_file(
            evaluation.reference, extractor, batch_size, None
        )
    else:
        images = of_source(sources[0], config.data.name)
        reference = evaluation_inputs.reference_of_images(
            images, f"{images.count} training images", extractor, batch_size, None
        )
    if evaluation.num_samples < FEW_SAMPLES:
        logging.info(
            "FID-%d during training is biased upwards: compare it with the same N alone.",
            evaluation.num_samples,
        )
    model = build.sampling_model(config)
    abstract = sharding.abstract_sharded(build.init_sampling_params(model), mesh, jax.random.key(0))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    cast = jax.jit(functools.partial(in_compute_dtype, dtype=model.dtype), out_shardings=shardings)
    labels = labels_of((), evaluation.num_samples, config.data.num_classes)
    protocol = Protocol(metrics=("fid",))

    def scores(ema_params: Any) -> dict[str, float]:
        sampler = Sampler(config, model, cast(ema_params), mesh, autoencoder)
        batches = sampler.stream(labels, sampler.settings({}), config.seed, batch_size=batch_size)
        blocks = evaluation_inputs.features_of(extractor, batches, 0)
        if jax.process_index() == 0:
            values = score("", blocks, labels, reference, protocol).values
        else:
            values = {}
            collections.deque(blocks, maxlen=0)  # takes part in making them
        return _of_first_process(values)

    return scores


def _of_first_process(values: dict[str, float]) -> dict[str, float]:
    names = ("fid", "class_agreement")
    numbers = np.array([values.get(name, np.nan) for name in names], np.float32)
    if jax.process_count() > 1:
        numbers = np.asarray(multihost_utils.broadcast_one_to_all(numbers))
    return {
        name: float(number) for name, number in zip(names, numbers, strict=True) if number == number
    }
