"""Trains a KL autoencoder: `python -m cfjax.train_autoencoder --config FILE --workdir DIR`.

It resumes, saves and ends as `cfjax.train` does. When the last train step is done, the workdir has

| file | content |
|---|---|
| `autoencoder/` | the averaged parameters, as `cfjax.autoencoder_files` reads them, with `scale` one |
| | over the latents' standard deviation; `training.json` says what was measured |
| `reconstructions.png` | held-out images above their reconstructions |

Images and latents are measured by the averaged parameters: the PSNR of held-out images against their
reconstructions from the likeliest latents, and the standard deviation of latents drawn for training
images, of at most 10,000 images each.
"""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax import (
    autoencoder_results,
    build,
    build_data,
    lpips_files,
    preemption,
    processes,
    program,
    sharding,
    train_loop,
)
from cfjax.autoencoder_objective import AutoencoderObjective
from cfjax.autoencoder_results import Measures
from cfjax.autoencoder_train_step import AutoencoderTrainStep, compile_train_step
from cfjax.build_data import DTYPES
from cfjax.config_loading import define_config_flag
from cfjax.errors import UserError, check_choice
from cfjax.models.autoencoder_kl import AutoencoderKL
from cfjax.models.lpips import Lpips
from cfjax.optimizer import make_optimizer
from cfjax.paths import absolute
from cfjax.rng import stream_key
from cfjax.train_loop import TrainStep
from cfjax.train_state import TrainState

AUTOENCODER_FOLDER = "autoencoder"
RECONSTRUCTIONS_FILE = "reconstructions.png"


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains to the end, resuming from the workdir's last checkpoint, and writes the autoencoder.

    Args:
      config: see `configs/default_autoencoder.py`.
      workdir: of the run; on several hosts, on storage that all share.

    Returns:
      The final state.

    Raises:
      UserError: bad input, or a loss that is no longer finite.
      Preempted: the process has been told to end, and the state is saved.
    """
    build.check_counts(config)
    settings = train_step_settings(config)
    module, batch_size = settings.module, config.train.global_batch_size
    mesh = sharding.make_mesh()
    sharding.check_batch_divides(batch_size, mesh)
    lpips_params = _lpips_params(config)
    source, held_out = (build_data.images(config, split) for split in ("train", "held_out"))
    shown = autoencoder_results.shown_images(held_out)
    abstract_state = sharding.abstract_sharded(settings.init, mesh, stream_key(config.seed, "init"))
    image_shape = (batch_size, *source.image_shape)

    def picture(state):
        return autoencoder_results.reconstructions(module, state.ema_params, shown)

    rows = config.data.size // module.downsampling
    training = train_loop.Training(
        mesh=mesh,
        source=source,
        init=functools.partial(sharding.born_sharded, settings.init, mesh),
        abstract_state=abstract_state,
        compile=lambda _: _train_steps(settings, mesh, abstract_state, image_shape, lpips_params),
        description=f"{rows}x{rows} latents of {module.latent_channels} channels",
        picture=picture,
        picture_name="reconstructions",
    )
    state = train_loop.run(training, config, workdir)
    with sharding.activate(mesh):
        measures = autoencoder_results.measure(
            module, state.ema_params, source, held_out, config.seed, batch_size
        )
        reconstructions = picture(state)
    if jax.process_index() == 0:
        place = absolute(workdir)
        autoencoder_results.write_picture(place / RECONSTRUCTIONS_FILE, reconstructions)
        _write(config, module, state, measures, place / AUTOENCODER_FOLDER)
    processes.wait_for_all("the autoencoder")
    return state


def _write(
    config: ConfigDict,
    module: AutoencoderKL,
    state: TrainState,
    measures: Measures,
    folder: PathLike,
) -> None:
    """Writes the averaged parameters with the scale that was measured, and says so."""
    scaled = module.clone(scale=1 / measures.latent_std)
    report = measures._asdict() | {
        "train_step": int(state.train_step),
        "config": config.to_dict(),
    }
    checksum = autoencoder_results.write_folder(folder, scaled, state.ema_params, report)
    logging.info(
        "Held-out PSNR %.2f dB over %d images; latents of %d training images have a standard deviation"
        " of %.4f, so that the scale is %.4f.",
        measures.psnr,
        measures.num_held_out,
        measures.num_training,
        measures.latent_std,
        scaled.scale,
    )
    logging.info("The autoencoder is in %s, its weights' sha256 %s.", folder, checksum)


def train_step_settings(config: ConfigDict) -> AutoencoderTrainStep:
    """What is fixed for a run.

    Raises:
      UserError: fields that don't fit each other or the images.
    """
    loss = config.loss
    return AutoencoderTrainStep(
        module=autoencoder(config),
        objective=AutoencoderObjective(
            reconstruction=loss.reconstruction,
            kl_weight=loss.kl_weight,
            perceptual_weight=loss.perceptual_weight,
        ),
        optimizer=make_optimizer(build.optimizer_settings(config)),
        ema_decay=config.optimizer.ema_decay,
        seed=config.seed,
    )


def autoencoder(config: ConfigDict) -> AutoencoderKL:
    """The autoencoder for the images of `config.data`, with a scale of 1.

    Raises:
      UserError: its fields don't fit each other or the images.
    """
    shape, data = config.autoencoder, config.data
    check_choice("dtype", shape.dtype, DTYPES)
    if data.name == "latents":
        raise UserError(
            "data.name is 'latents', but an autoencoder is trained on images; name their source."
        )
    fields = {**shape, "dtype": DTYPES[shape.dtype]}
    module = AutoencoderKL(**fields, scale=1.0, image_channels=data.channels)
    if not module.channel_multipliers:
        raise UserError("autoencoder.channel_multipliers is empty; give one a level.")
    if data.size % module.downsampling:
        raise UserError(
            f"data.size {data.size} is not a multiple of {module.downsampling}, by which"
            f" {len(module.channel_multipliers)} levels make images smaller; change it or"
            " autoencoder.channel_multipliers."
        )
    for multiplier in module.channel_multipliers:
        if multiplier * module.channels % module.num_groups:
            raise UserError(
                f"autoencoder.num_groups {module.num_groups} does not divide a level's"
                f" {multiplier * module.channels} channels; choose a divisor."
            )
    return module


def _lpips_params(config: ConfigDict) -> Any:
    """The parameters of LPIPS, or None when it has no weight."""
    weight, path = config.loss.perceptual_weight, config.loss.perceptual_path
    if not weight:
        return None
    if not path:
        raise UserError(
            f"loss.perceptual_weight is {weight}, but loss.perceptual_path is empty; set it to a"
            " folder that cfjax.convert --from=lpips wrote, or the weight to 0."
        )
    if config.data.size < Lpips().least_size:
        raise UserError(
            f"data.size {config.data.size} is too small for LPIPS, which needs {Lpips().least_size};"
            " set loss.perceptual_weight to 0."
        )
    return lpips_files.load(path)


def _train_steps(
    settings: AutoencoderTrainStep,
    mesh: Mesh,
    abstract_state: TrainState,
    image_shape: tuple[int, int, int, int],
    lpips_params: Any,
) -> Iterator[TrainStep]:
    """Compiles the train step."""
    began = time.monotonic()
    compiled = compile_train_step(settings, mesh, abstract_state, image_shape, lpips_params)
    logging.info("Compiled the train step in %.0f s.", time.monotonic() - began)
    return itertools.repeat(compiled)


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
