"""Scores a model or samples: `python -m cfjax.evaluate --checkpoint runs/mnist --out scores`.

With `--checkpoint` images are generated, `--num_samples` for each number of AR steps; with
`--samples FILE_OR_FOLDER --config CONFIG` they are read. The features are those of a small
classifier trained on the real training images and kept in `<out>/classifier`; the report, as JSON
with its protocol, is `<out>/scores.json`. Of several processes all generate and the first scores.
"""

import collections
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

import cfjax
from cfjax import build_data, processes, program
from cfjax.checkpoint_folders import find
from cfjax.config_loading import define_config_flag
from cfjax.data.image_files import read_images
from cfjax.data.sources import Source, all_images, open_dataset, parse_dataset
from cfjax.diffusion.solvers import Solver
from cfjax.errors import UserError
from cfjax.evaluation.classifier import load_or_train
from cfjax.evaluation.report import Report, floor_distance, score
from cfjax.evaluation.statistics import FeatureStatistics
from cfjax.generation_request import labels_of
from cfjax.models.autoencoder_kl import AutoencoderKL
from cfjax.sample import Part, stream_with_progress
from cfjax.sampling_flags import (
    define_device_flags,
    define_sampling_flags,
    integers,
    load_sampler,
    sampling_overrides,
)

# Name of a row, batches of images uint8 [n, H, W, C] with labels [n] or None.
Samples = tuple[str, Iterator[tuple[np.ndarray, np.ndarray | None]]]


def evaluate(
    dataset: str,
    sources: tuple[Source, Source],
    samples: Iterator[Samples],
    out: Path,
    protocol: dict[str, Any],
) -> Report | None:
    """Scores samples against real training images and saves the report.

    The first process does; the others, which all samples reach too, take part in making them and
    return None.

    Args:
      dataset: name of the real images.
      sources: the real images, training and held-out.
      samples: one row of the report each.
      out: folder of the report and the classifier.
      protocol: what is known of the samples, to stand beside the scores.
    """
    if jax.process_index() != 0:
        processes.wait_for_all("the classifier")
        for _, batches in samples:
            collections.deque(batches, maxlen=0)
        return None
    train, held_out = sources
    classifier = load_or_train(out / "classifier", train, held_out)
    real, _ = classifier.features(all_images(train)[0])
    reference, floor = FeatureStatistics.of(real), floor_distance(real)
    processes.wait_for_all("the classifier")
    scores = []
    for name, batches in samples:
        scored = ((*classifier.features(images), labels) for images, labels in batches)
        scores.append(score(name, scored, reference))
    report = Report(
        extractor=f"{dataset}-classifier",
        scores=scores,
        floor=floor,
        held_out_accuracy=classifier.held_out_accuracy,
        num_features=real.shape[1],
        protocol={
            "reference": f"{len(train)} training images of {dataset}",
            "real images": f"a random half of the reference against the other, {len(train) // 2} each;"
            f" accuracy on {len(held_out)} held-out images",
            "feature extractor": f"classifier of sha256 {classifier.checksum}",
            **protocol,
            "versions": f"cfjax {cfjax.__version__}, jax {jax.__version__}, numpy {np.__version__}",
        },
    )
    report.save(out / "scores.json")
    return report


def _of_checkpoint(values: dict[str, Any], out: Path) -> Report | None:
    sampler = load_sampler()
    overrides = sampling_overrides()
    ar_steps = integers("ar_steps", values["ar_steps"])
    if not ar_steps:
        raise UserError("--ar_steps names no number of AR steps; pass some, such as 1,7.")
    if values["config"] is not None:
        raise UserError("--checkpoint has its own config; drop --config.")
    settings = {s: sampler.settings(overrides | {"num_ar_steps": s}) for s in ar_steps}
    labels = labels_of((), values["num_samples"], sampler.model.num_classes)
    decoder = sampler.autoencoder and sampler.autoencoder.module
    sources = _sources(sampler.config, values["dataset"], decoder)
    program.check_workdir_writable(out)
    seed, batch_size = values["seed"], values["batch_size"]

    def samples() -> Iterator[Samples]:
        for num_ar_steps, of_row in settings.items():
            batches = stream_with_progress(sampler, [Part(labels, of_row)], seed, batch_size)
            yield f"S = {num_ar_steps}", batches

    train_step = find(values["checkpoint"], values["train_step"]).name
    chosen = settings[ar_steps[0]]
    guidance, resolved = chosen.guidance, sampler.config.sampling.copy_and_resolve_references()
    resolved.update(overrides)
    steps = resolved.denoising_steps
    protocol = {
        "checkpoint": f"{values['checkpoint']}, train step {train_step}, EMA",
        "sampler": f"{steps} denoising steps of {chosen.solver.name} for each AR step"
        f" ({_solver_details(chosen.solver)}), timestep spacing {resolved.timestep_spacing}, split"
        f" {resolved.split}, token order {chosen.token_order}",
        "guidance": f"{guidance.scale:g} in {guidance.interval}, {guidance.schedule} over AR steps,"
        f" power {guidance.power:g} over t, by {values['guide'] or 'the null class'}",
        "rounding": "uint8, truncated",
        "seed": seed,
    }
    return evaluate(_dataset_name(sampler.config), sources, samples(), out, protocol)


def _solver_details(solver: Solver) -> str:
    details = {"ddim": [f"eta {solver.eta:g}"], "ddpm": [f"variance {solver.variance}"]}
    details = details.get(solver.name, [])
    if solver.needs_noise:
        details.append(f"temperature {solver.temperature:g}")
    if solver.clip_x_start:
        details.append("x_0 clipped")
    if solver.dynamic_threshold:
        details.append(f"x_0 thresholded at {solver.dynamic_threshold:g}")
    return ", ".join(details) or "x_0 as predicted"


def _dataset_name(config: ConfigDict) -> str:
    dataset = flags.FLAGS["dataset"].value
    return config.data.name if dataset is None else parse_dataset(dataset).name


def _sources(
    config: ConfigDict, dataset: str | None, module: AutoencoderKL | None
) -> tuple[Source, Source]:
    """The real images, training and held-out: those of the config, or of `--dataset`."""
    size, channels = config.data.size, config.data.channels
    if module is not None:
        size, channels = size * module.downsampling, module.image_channels
    if dataset is None:
        if config.data.name == "latents":
            raise UserError(
                f"the data in {config.data.path} are latents; name the images that were encoded,"
                " such as --dataset=mnist."
            )
        train, held_out = (
            build_data.images(config, split, size, channels) for split in ("train", "held_out")
        )
        return train, held_out
    train, held_out = (
        open_dataset(
            dataset,
            split,
            size=size,
            channels=channels,
            num_classes=config.data.num_classes,
            on_corrupt=config.data.on_corrupt,
        )
        for split in ("train", "held_out")
    )
    return train, held_out


def _of_samples(values: dict[str, Any], out: Path) -> Report | None:
    if values["config"] is None:
        raise UserError(
            "--samples needs --config too, which names the real images to compare with."
        )
    config = values["config"]
    images, labels = read_images(values["samples"])
    if len(images) < 2:
        raise UserError(f"{values['samples']} holds 1 image; a covariance needs at least 2.")
    autoencoder = build_data.autoencoder(config)
    sources = _sources(config, values["dataset"], autoencoder and autoencoder.module)
    if images.shape[1:] != sources[0].image_shape:
        raise UserError(
            f"the samples are {images.shape[1:]}, but the images of {_dataset_name(config)} are"
            f" {sources[0].image_shape}; pass samples of that size."
        )
    if labels is not None and not ((labels >= 0) & (labels < config.data.num_classes)).all():
        raise UserError(
            f"{values['samples']} has labels outside the classes 0 to"
            f" {config.data.num_classes - 1} of {_dataset_name(config)}; leave 'labels' out or mend it."
        )
    program.check_workdir_writable(out)
    row = (Path(values["samples"]).name, iter([(images, labels)]))
    name = _dataset_name(config)
    return evaluate(name, sources, iter([row]), out, {"samples": values["samples"]})


def main(_: Sequence[str]) -> None:
    """Runs the program."""
    program.initialize_distributed()
    values = flags.FLAGS.flag_values_dict()
    if (values["checkpoint"] is None) == (values["samples"] is None):
        raise UserError("pass either --checkpoint or --samples.")
    out = Path(values["out"])
    report = (_of_checkpoint if values["samples"] is None else _of_samples)(values, out)
    if report is not None:
        sys.stdout.write(report.table() + "\n")
        logging.info("The report is in %s.", out / "scores.json")


def define_flags() -> None:
    """Defines the program's flags."""
    define_sampling_flags(checkpoint_is_required=False, one_number_of_ar_steps=False)
    define_device_flags()
    flags.DEFINE_string("samples", None, "Instead of a checkpoint: a .npz or a folder of images.")
    define_config_flag(required=False)
    flags.DEFINE_string(
        "dataset", None, "Real images, if not those of the config: see cfjax.encode."
    )
    flags.DEFINE_string("out", None, "Folder of the report and the classifier.", required=True)
    flags.DEFINE_integer("num_samples", 1000, "For each number of AR steps.", lower_bound=2)
    flags.DEFINE_list("ar_steps", ["1"], "Numbers of AR steps: a row of the report each.")


if __name__ == "__main__":
    define_flags()
    program.run(main)
