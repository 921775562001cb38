"""The loop of every training program: resume, train, log, save, and end in time when told to.

The workdir holds `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax import build, checkpoints, preemption, processes, program, sharding
from cfjax.config_loading import changed_keys, config_to_json
from cfjax.data.loader import TrainLoader
from cfjax.data.sources import Source
from cfjax.errors import UserError
from cfjax.metric_log import MetricLog
from cfjax.optimizer import learning_rate_schedule
from cfjax.rng import stream_key
from cfjax.train_progress import TrainProgress
from cfjax.train_state import TrainState
from cfjax.train_step import Totals

# A compiled train step, which donates the state.
TrainStep = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Totals]]


@dataclasses.dataclass(frozen=True)
class Training:
    """What one program trains unlike the others; `run` reads every field.

    Attributes:
      mesh: over whose devices it runs.
      source: of the examples.
      init: a key to the state before the first train step, on the devices.
      abstract_state: that state as `ShapeDtypeStruct`s with shardings.
      compile: how many train steps were taken before, to the compiled train step of each that
        follows. Compiles before it returns; not called when there is nothing left to train. The
        totals of a train step have "loss" and "gradient_norm".
      description: of an example, for the log: "49 tokens a sequence".
      picture: a state to a uint8 picture `[height, width, 1 or 3]` for TensorBoard.
      picture_name: under which it is shown.
      scores: a state to scores by name, where `config.evaluation` asks for them; else None.
      is_best_by_score: `train.keep_best_metric` is one of those.
    """

    mesh: Mesh
    source: Source
    init: Callable[[jax.Array], TrainState]
    abstract_state: TrainState
    compile: Callable[[int], Iterator[TrainStep]]
    description: str
    picture: Callable[[TrainState], np.ndarray]
    picture_name: str
    scores: Callable[[TrainState], dict[str, float]] | None = None
    is_best_by_score: bool = False


def run(training: Training, config: ConfigDict, workdir: str) -> TrainState:
    """Trains to the end, resuming from the workdir's last checkpoint.

    Args:
      training: what is trained.
      config: `seed`, `data`, `optimizer` and `train` are read, all is saved; see
        `configs/default.py`.
      workdir: of the run; on several hosts, on storage that all share.

    Returns:
      The final state.

    Raises:
      UserError: bad input, or a loss that is no longer finite.
      Preempted: the process has been told to end, and the state is saved.
    """
    mesh = training.mesh
    program.check_workdir_writable(workdir)
    restored = checkpoints.restore_newest(workdir, training.abstract_state)
    if restored is None:
        state = training.init(stream_key(config.seed, "init"))
        examples_seen = 0
    else:
        state, examples_seen = restored
        for change in changed_keys(checkpoints.read_config(workdir), config):
            if change.startswith("text.checksum:"):
                raise UserError(
                    f"the run in {workdir} was begun with another tokenizer ({change}); pass that one as"
                    " text.tokenizer, or another workdir."
                )
            logging.warning("The config differs from the checkpoint's: %s.", change)
    logging.info(
        "\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False)
    )
    batch_size, num_train_steps = config.train.global_batch_size, config.train.num_train_steps
    logging.info(
        "%d training images; a batch of %d, %s; mesh %s of %s; %s.",
        len(training.source),
        batch_size,
        training.description,
        ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        mesh.devices.flat[0].device_kind,
        "from scratch" if restored is None else f"resuming after train step {state.train_step}",
    )

    first = int(state.train_step)
    train_steps = training.compile(first) if first < num_train_steps else iter(())
    processes.wait_for_all("the first train step")
    loader = TrainLoader(
        training.source,
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
            learning_rate_schedule(build.optimizer_settings(config)),
            first=first,
            last=num_train_steps,
            log_every=config.train.log_every,
            batch_size=batch_size,
            followed="" if training.is_best_by_score else config.train.keep_best_metric,
        )
        for number in range(first + 1, num_train_steps + 1):
            batch = sharding.assemble_global_batch(next(loader), mesh)
            state, totals = next(train_steps)(state, batch)
            progress.add(number, totals)
            is_last = number == num_train_steps
            is_preempted = preemption.is_due(number - first)
            is_regular = number % config.train.checkpoint_every == 0
            scores = {}
            if training.scores is not None and number % config.evaluation.every == 0:
                progress.check_finite()
                scores = training.scores(state)
                log.write(number, {f"evaluation/{name}": it for name, it in scores.items()})
            if is_last or is_preempted or is_regular:
                progress.check_finite()  # a state that is not finite is never saved
                log.flush()
                metric = progress.take_followed() if is_regular else None
                if training.is_best_by_score:
                    metric = scores.get(config.train.keep_best_metric)
                writer.save(state, config_to_json(config), number * batch_size, metric)
            if config.train.sample_every and (is_last or number % config.train.sample_every == 0):
                log.image(number, training.picture_name, training.picture(state))
            if is_preempted:
                break
    if state.train_step < num_train_steps:
        raise preemption.Preempted(
            f"Told to end: train step {state.train_step} of {num_train_steps} is saved in {workdir};"
            " run again to go on."
        )
    logging.info("Train step %d of %d is saved in %s.", state.train_step, num_train_steps, workdir)
    return state
