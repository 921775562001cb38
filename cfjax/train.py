"""Trains a model: `python -m cfjax.train --config configs/mnist.py --workdir runs/mnist`.

The same command resumes; after a kill the run ends with the very bits it would have had. The
workdir holds `checkpoints/`, `metrics.jsonl` and `tensorboard/`, and on TPUs `compilation_cache/`.

SIGTERM, the notice of a preemption, saves after the train step at hand, on all processes after the
same one, and exits with code 75: "start me again". When the newest checkpoint is damaged, the run
goes on from the one before it, says so, and keeps the damaged one as `<train step>.damaged`.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax import (
    build,
    build_data,
    build_documents,
    clean_lengths,
    mesh_autoencoder,
    preemption,
    program,
    sharding,
    train_evaluation,
    train_loop,
    train_pictures,
)
from cfjax.autoencoder_files import Autoencoder
from cfjax.config_loading import define_config_flag
from cfjax.data.document_rows import PackedDocuments
from cfjax.data.sources import SPLITS
from cfjax.errors import UserError
from cfjax.mesh_autoencoder import MeshAutoencoder
from cfjax.train_loop import TrainStep
from cfjax.train_state import TrainState
from cfjax.train_step import TrainProgram


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains to the end, resuming from the workdir's last checkpoint.

    Args:
      config: see `configs/default.py`; of documents, its `text.checksum` is set.
      workdir: of the run; on several hosts, on storage that all share.

    Returns:
      The final state.

    Raises:
      UserError: bad input, or a loss that is no longer finite.
      Preempted: the process has been told to end, and the state is saved.
    """
    build.check_counts(config)
    mesh = build.mesh(config)
    train_program = build.train_program(config, mesh)
    build.sampling_settings(config)  # refused now rather than after training
    train_evaluation.check(config)
    loaded = build_data.autoencoder(config)
    if build_documents.has_text(config):
        config.text.checksum = build_documents.tokenizer(config).checksum
        source = build_documents.documents(config, "train", loaded)
    else:
        source = build_data.source(config, "train", loaded)
    autoencoder = _on_mesh(loaded, config, mesh)
    if config.model.attention == "splash" and mesh.devices.flat[0].platform != "tpu":
        logging.warning(
            "Splash attention is made for TPUs and is interpreted here, very slowly; add"
            " --config.model.attention=fused."
        )

    def picture(state):
        if isinstance(source, PackedDocuments):
            return train_pictures.of_documents(config, state.ema_params, mesh, autoencoder, source)
        return train_pictures.of_classes(config, state.ema_params, autoencoder)

    settings = train_program.settings
    init = build.init_state(settings.model, settings.optimizer)
    training = train_loop.Training(
        mesh=mesh,
        source=source,
        init=lambda key: sharding.born_sharded(
            init, mesh, key, min_size=config.mesh.min_split_size
        ),
        abstract_state=train_program.abstract_state,
        compile=lambda first: _train_steps(train_program, first, autoencoder),
        description=f"{build.sequence_length(config)} tokens a sequence",
        picture=picture,
        picture_name="samples",
        scores=_scores(config, mesh, autoencoder, loaded, workdir),
        is_best_by_score=config.train.keep_best_metric in train_evaluation.METRICS,
    )
    return train_loop.run(training, config, workdir)


def _on_mesh(loaded: Autoencoder | None, config: ConfigDict, mesh: Mesh) -> MeshAutoencoder | None:
    """What encodes images in training or decodes samples, if anything has to."""
    is_decoded = config.train.sample_every or config.evaluation.every
    if loaded is None or (config.data.name == "latents" and not is_decoded):
        return None
    return mesh_autoencoder.put(loaded, mesh)


def _scores(
    config: ConfigDict,
    mesh: Mesh,
    autoencoder: MeshAutoencoder | None,
    loaded: Autoencoder | None,
    workdir: str,
) -> Callable[[TrainState], dict[str, float]] | None:
    """What scores a state, if anything does."""
    if not config.evaluation.every:
        return None
    if build_documents.has_text(config):
        raise UserError(
            "evaluation.every is for models of classes; set it to 0, and score documents afterwards"
            " with cfjax.evaluate_documents."
        )
    sources = None
    if not (config.evaluation.inception_weights and config.evaluation.reference):
        if config.data.name == "latents":
            raise UserError(
                "the data are latents; name what to compare with: evaluation.inception_weights and"
                " evaluation.reference."
            )
        sources = tuple(build_data.source(config, split, loaded) for split in SPLITS)
    of_ema = train_evaluation.scorer(config, mesh, autoencoder, sources, workdir)
    return lambda state: of_ema(state.ema_params)


def _train_steps(
    train_program: TrainProgram, first: int, autoencoder: MeshAutoencoder | None
) -> Iterator[TrainStep]:
    """Compiles the train step for each number of clean tokens; which one runs when."""
    compiled = {}
    for num_clean in train_program.clean_lengths:
        began = time.monotonic()
        compiled[num_clean] = train_program.compile(num_clean)
        logging.info(
            "Compiled the train step with %d clean tokens in %.0f s.",
            num_clean,
            time.monotonic() - began,
        )
    settings = train_program.settings
    if len(train_program.clean_lengths) == 1:
        return itertools.repeat(_encoding(compiled[train_program.clean_lengths[0]], autoencoder))
    lengths = clean_lengths.clean_lengths(
        settings.objective.factorization,
        settings.model.num_tokens,
        train_program.clean_lengths,
        settings.seed,
        first,
    )
    return (_encoding(compiled[num_clean], autoencoder) for num_clean in lengths)


def _encoding(train_step: TrainStep, autoencoder: MeshAutoencoder | None) -> TrainStep:
    """A train step that encodes the images of its batch, where it has any, and takes moments."""

    def encode_and_train(state, batch):
        if autoencoder is not None and "image" in batch:
            images = batch["image"]
            lead = images.shape[:-3]  # rows, and of documents images
            moments = autoencoder.encode(images.reshape(-1, *images.shape[-3:]))
            encoded = {"moments": moments.reshape(*lead, *moments.shape[1:])}
            batch = encoded | {name: it for name, it in batch.items() if name != "image"}
        return train_step(state, batch)

    return encode_and_train


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    preemption.listen()
    program.initialize_distributed()
    program.keep_compiled(flags.FLAGS["workdir"].value)
    train(flags.FLAGS["config"].value, flags.FLAGS["workdir"].value)


if __name__ == "__main__":
    define_config_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    program.define_distributed_flags()
    program.run(main)
