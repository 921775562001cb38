"""Trains a model: `python -m cfjax.train --config configs/mnist.py --workdir runs/mnist`.

The same command resumes; after a kill the run ends with the very bits it would have had. The
workdir holds `checkpoints/`, `metrics.jsonl` and `tensorboard/`, and on TPUs `compilation_cache/`.

SIGTERM, the notice of a preemption, saves after the train step at hand, on all processes after the
same one, and exits with code 75: "start me again". When the newest checkpoint is damaged, the run
goes on from the one before it, says so, and keeps the damaged one as `<train step>.damaged`.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from clu import parameter_overview
from ml_collections import ConfigDict

from cfjax import build, checkpoints, clean_lengths, preemption, processes, program, sharding
from cfjax.config_loading import changed_keys, config_to_json, define_config_flag
from cfjax.data.images import to_uint8
from cfjax.data.loader import TrainLoader
from cfjax.metric_log import MetricLog
from cfjax.models.patches import unpatchify
from cfjax.optimizer import learning_rate_schedule
from cfjax.rng import per_example_keys, stream_key
from cfjax.sampling import generate
from cfjax.train_progress import TrainProgress
from cfjax.train_state import TrainState
from cfjax.train_step import TrainProgram
from cfjax.visualization import image_grid


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains to the end, resuming from the workdir's last checkpoint.

    Args:
      config: see `configs/default.py`.
      workdir: of the run; on several hosts, on storage that all share.

    Returns:
      The final state.

    Raises:
      UserError: bad input, or a loss that is no longer finite.
      Preempted: the process has been told to end, and the state is saved.
    """
    build.check_counts(config)
    mesh = build.mesh(config)
    settings = build.optimizer_settings(config)
    train_program = build.train_program(config, mesh)
    abstract_state = train_program.abstract_state
    build.sampling_settings(config)  # refused now rather than after training
    source = build.source(config, "train")
    program.check_workdir_writable(workdir)

    restored = checkpoints.restore_newest(workdir, abstract_state)
    if restored is None:
        init = build.init_state(train_program.settings.model, train_program.settings.optimizer)
        state = sharding.born_sharded(
            init, mesh, stream_key(config.seed, "init"), min_size=config.mesh.min_split_size
        )
        examples_seen = 0
    else:
        state, examples_seen = restored
        for change in changed_keys(checkpoints.read_config(workdir), config):
            logging.warning("The config differs from the checkpoint's: %s.", change)
    logging.info(
        "\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False)
    )
    logging.info(
        "%d training images; a batch of %d, %d tokens a sequence; mesh %s of %s; %s.",
        len(source),
        config.train.global_batch_size,
        build.sequence_length(config),
        ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        mesh.devices.flat[0].device_kind,
        "from scratch" if restored is None else f"resuming after train step {state.train_step}",
    )

    if config.model.attention == "splash" and mesh.devices.flat[0].platform != "tpu":
        logging.warning(
            "Splash attention is made for TPUs and is interpreted here, very slowly; add"
            " --config.model.attention=fused."
        )
    batch_size, num_train_steps = config.train.global_batch_size, config.train.num_train_steps
    first = int(state.train_step)
    train_steps = _compiled(train_program) if first < num_train_steps else {}
    processes.wait_for_all("the first train step")
    lengths = clean_lengths.clean_lengths(
        train_program.settings.objective.factorization,
        train_program.settings.model.num_tokens,
        train_program.clean_lengths,
        config.seed,
        first,
    )
    loader = TrainLoader(
        source,
        seed=config.seed,
        rows=sharding.batch_rows(batch_size, mesh),
        global_batch_size=batch_size,
        examples_seen=examples_seen,
        horizontal_flip=config.data.horizontal_flip,
        num_threads=config.data.num_threads,
    )
    writer = checkpoints.CheckpointWriter(
        workdir,
        config.train.keep_checkpoints,
        config.train.keep_every,
        config.train.keep_best_metric,
    )
    with loader, writer, MetricLog(workdir, first) as log, sharding.activate(mesh):
        progress = TrainProgress(
            log,
            learning_rate_schedule(settings),
            first=first,
            last=num_train_steps,
            log_every=config.train.log_every,
            batch_size=batch_size,
            followed=config.train.keep_best_metric,
        )
        for number in range(first + 1, num_train_steps + 1):
            batch = sharding.assemble_global_batch(next(loader), mesh)
            state, totals = train_steps[next(lengths)](state, batch)
            progress.add(number, totals)
            is_last = number == num_train_steps
            is_preempted = preemption.is_due(number - first)
            is_regular = number % config.train.checkpoint_every == 0
            if is_last or is_preempted or is_regular:
                progress.check_finite()  # a state that is not finite is never saved
                log.flush()
                metric = progress.take_followed() if is_regular else None
                writer.save(state, config_to_json(config), number * batch_size, metric)
            if config.train.sample_every and (is_last or number % config.train.sample_every == 0):
                log.image(number, "samples", _sample_grid(config, state.ema_params))
            if is_preempted:
                break
    if state.train_step < num_train_steps:
        raise preemption.Preempted(
            f"Told to end: train step {state.train_step} of {num_train_steps} is saved in {workdir};"
            " run again to go on."
        )
    logging.info("Train step %d of %d is saved in %s.", state.train_step, num_train_steps, workdir)
    return state


def _compiled(train_program: TrainProgram) -> dict[int, jax.stages.Compiled]:
    """The train step for each number of clean tokens."""
    compiled = {}
    for num_clean in train_program.clean_lengths:
        began = time.monotonic()
        compiled[num_clean] = train_program.compile(num_clean)
        logging.info(
            "Compiled the train step with %d clean tokens in %.0f s.",
            num_clean,
            time.monotonic() - began,
        )
    return compiled


def _sample_grid(config: ConfigDict, params: Any) -> np.ndarray:
    """uint8 picture of one sample a class, of at most 10 classes."""
    model = build.sampling_model(config)
    labels = np.arange(min(10, config.data.num_classes))
    settings, schedule = build.sampling_settings(config)
    keys = per_example_keys(stream_key(config.seed, "samples"), jnp.arange(len(labels)))
    tokens = generate(model, params, schedule, settings, jnp.asarray(labels), keys)
    images = unpatchify(jax.device_get(tokens), config.model.patch_size, model.grid)
    return image_grid(to_uint8(np.asarray(images)), num_columns=len(labels))


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
