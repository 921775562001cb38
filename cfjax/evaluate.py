"""Scores a model or samples: `python -m cfjax.evaluate --checkpoint runs/mnist --out scores`.

With `--checkpoint` images are generated, `--num_samples` for each number of AR steps or each point
of `--sweep`; with `--samples` they are read: a `.npz` with `arr_0`, saved statistics, or a folder.
They are compared with the training images of the config or of `--dataset`, or with `--reference`: a
`.npz` of the ADM suite, what `cfjax.reference_stats` saved, or a folder.

Of a model of documents, images are drawn from the captions of `--caption_split`, those of its images in
turn, over and over, and compared with these images.

With `--inception_weights` features are those of the ADM suite; else of a small classifier, trained on
the real images and kept in `<out>/classifier`. `<out>` gets `scores.json`, `scores.csv`, a grid of
samples a row, and a plot of a sweep. Run again, a killed evaluation goes on where it was.
"""

import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

import cfjax
from cfjax import (
    build_data,
    build_documents,
    evaluation_captions,
    evaluation_inputs,
    evaluation_rows,
    evaluation_sweep,
    program,
)
from cfjax.checkpoint_folders import find
from cfjax.config_loading import define_config_flag
from cfjax.data.image_sets import ImageSet, of_source, open_images
from cfjax.data.sources import Source, open_dataset, parse_dataset
from cfjax.errors import UserError
from cfjax.evaluation import references
from cfjax.evaluation.extractors import Extractor
from cfjax.evaluation.references import Reference
from cfjax.evaluation.report import Report, floor_distance
from cfjax.evaluation.scores import Protocol, Score, score_statistics
from cfjax.evaluation_rows import Row
from cfjax.models.autoencoder_kl import AutoencoderKL
from cfjax.sampling_flags import (
    define_device_flags,
    define_sampling_flags,
    load_sampler,
    mesh_from_flags,
)


def _of_checkpoint(values: dict[str, Any], out: Path) -> Report | None:
    if values["config"] is not None:
        raise UserError("--checkpoint has its own config; drop --config.")
    if not values["ar_steps"]:
        raise UserError("--ar_steps names no number of AR steps; pass some, such as 1,7.")
    sampler = load_sampler()
    texts = list(values["sweep"])
    if flags.FLAGS["ar_steps"].present or not any(it.startswith("num_ar_steps=") for it in texts):
        texts.insert(0, f"num_ar_steps={','.join(values['ar_steps'])}")
    swept = evaluation_sweep.parse(texts, sampler.config.sampling)
    samplers = {"ema": sampler}
    if "params" in swept.get(evaluation_sweep.WEIGHTS, ()):
        samplers["params"] = load_sampler("params")
    captions = None
    if build_documents.has_text(sampler.config):
        size, _, channels = sampler.image_shape
        captions = evaluation_captions.open_captions(
            sampler.config, values["caption_split"], size, channels
        )
    rows = evaluation_rows.of_checkpoint(swept, samplers, captions)
    points = evaluation_sweep.points(swept)
    decoder = sampler.autoencoder and sampler.autoencoder.module
    train_step = find(values["checkpoint"], values["train_step"]).name
    protocol = {
        "checkpoint": f"{values['checkpoint']}, train step {train_step}"
        + (", EMA" if len(samplers) == 1 else ""),
        "sampler": evaluation_rows.sampler_details(sampler, swept),
        "guidance": evaluation_rows.guidance_details(
            sampler, swept, values["guide"] or (captions and "no caption")
        ),
        **({"captions": captions.describe(values["num_samples"])} if captions else {}),
        "rounding": "uint8, truncated",
        "seed": values["seed"],
        "recipes": [row.recipe for row in rows],
    }
    report = _report(rows, sampler.config, decoder, sampler.image_shape, protocol, values, out)
    if report is not None and len(points) > 1:
        evaluation_sweep.plot(out / "sweep.png", report, swept, points)
    return report


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
        if build_documents.has_text(config):
            split = flags.FLAGS["caption_split"].value
            images = evaluation_captions.open_captions(config, split, size, channels).images
            return images, images
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
    if values["config"] is None and values["reference"] is None:
        raise UserError(
            "--samples needs --config too, which names the real images to compare with, or"
            " --reference."
        )
    if values["sweep"]:
        raise UserError("--sweep generates samples; it goes with --checkpoint.")
    path, config = values["samples"], values["config"]
    if _is_statistics(path):
        return _of_statistics(values, out)
    images = open_images(path)
    if images.count < 2:
        raise UserError(f"{path} holds 1 image; a covariance needs at least 2.")
    decoder = None
    if config is not None:
        autoencoder = build_data.autoencoder(config)
        decoder = autoencoder and autoencoder.module
        if not build_documents.has_text(config):
            _check_labels(images, config.data.num_classes)
    row = evaluation_rows.of_images(
        images, evaluation_inputs.checksum_of(path), values["batch_size"]
    )
    protocol = {"samples": f"{path}, {images.count} images"}
    return _report([row], config, decoder, images.image_shape, protocol, values, out)


def _check_labels(images: ImageSet, num_classes: int) -> None:
    labels = images.labels
    if labels is not None and not ((labels >= 0) & (labels < num_classes)).all():
        raise UserError(
            f"{images.name} has labels outside the classes 0 to {num_classes - 1}; leave 'labels' out"
            " or mend it."
        )


def _is_statistics(path: str) -> bool:
    return Path(path).suffix == ".npz" and Path(path).is_file() and references.is_statistics(path)


def _of_statistics(values: dict[str, Any], out: Path) -> Report | None:
    """Scores of saved statistics; no image is looked at."""
    if values["inception_weights"] is None or values["reference"] is None:
        raise UserError(
            f"{values['samples']} has statistics alone; pass --inception_weights, of which they are,"
            " and --reference."
        )
    program.check_workdir_writable(out)
    extractor = evaluation_inputs.inception_from_flags(mesh_from_flags())
    samples = references.load(values["samples"], extractor)
    reference = evaluation_inputs.reference_of_file(
        values["reference"], extractor, values["batch_size"], None
    )
    if jax.process_index() != 0:
        return None
    protocol = _protocol(values, extractor)
    row = score_statistics(Path(values["samples"]).name, samples, reference, protocol)
    return _finished([row], extractor, reference, protocol, {"samples": samples.name}, out)


def _report(
    rows: Sequence[Row],
    config: ConfigDict | None,
    decoder: AutoencoderKL | None,
    image_shape: tuple[int, ...],
    about_samples: dict[str, Any],
    values: dict[str, Any],
    out: Path,
) -> Report | None:
    """Scores rows of images of one shape and writes the report; the first process returns it."""
    _protocol(values, None)  # refused now rather than later
    reference_path, weights = values["reference"], values["inception_weights"]
    if reference_path is not None and values["dataset"] is not None:
        raise UserError("pass either --reference or --dataset.")
    sources = None
    is_of_documents = config is not None and build_documents.has_text(config)
    if is_of_documents and weights is None:
        raise UserError(
            "documents have no classes, of which a classifier could be trained for features; pass"
            " --inception_weights."
        )
    if config is not None and (reference_path is None or weights is None):
        sources = _sources(config, values["dataset"], decoder)
        if image_shape != sources[0].image_shape:
            raise UserError(
                f"the samples are {tuple(image_shape)}, but the images of {_dataset_name(config)} are"
                f" {sources[0].image_shape}; pass samples of that size."
            )
    if weights is None and sources is None:
        raise UserError(
            "without Inception's weights features are those of a classifier of real images; pass"
            " --inception_weights, or --config, which names the images."
        )
    program.check_workdir_writable(out)
    if weights is not None:
        extractor = evaluation_inputs.inception_from_flags(mesh_from_flags())
    else:
        extractor = evaluation_inputs.classifier(out / "classifier", sources, _dataset_name(config))
    state, batch_size = out / "reference.partial.npz", values["batch_size"]
    if reference_path is not None:
        reference = evaluation_inputs.reference_of_file(
            reference_path, extractor, batch_size, state
        )
    else:
        dataset = _dataset_name(config)
        images = of_source(sources[0], dataset)
        which = "training"
        if is_of_documents and values["dataset"] is None:
            which = f"{values['caption_split']} captioned"
        name = f"{images.count} {which} images of {dataset}, fingerprint {sources[0].fingerprint}"
        reference = evaluation_inputs.reference_of_images(
            images, name, extractor, batch_size, state
        )
    if reference is not None and reference.image_shape is not None:
        _check_resolution(image_shape, reference)
    protocol = _protocol(values, extractor)
    scores = evaluation_rows.score_rows(rows, extractor, reference, protocol, out)
    if jax.process_index() != 0:
        return None
    return _finished(scores, extractor, reference, protocol, about_samples, out)


def _check_resolution(image_shape: tuple[int, ...], reference: Reference) -> None:
    if tuple(image_shape[:2]) != tuple(reference.image_shape[:2]):
        raise UserError(
            f"the samples are {image_shape[0]}x{image_shape[1]}, but the reference {reference.name} is"
            f" of {reference.image_shape[0]}x{reference.image_shape[1]}; pass one of their size."
        )


def _protocol(values: Mapping[str, Any], extractor: Extractor | None) -> Protocol:
    """What to score; on a process without an extractor, which does not, that matters little."""
    default = extractor.default_metrics if extractor is not None else ()
    return Protocol(
        metrics=tuple(values["metrics"]) or default,
        may_leave_out=not values["metrics"],
        pr_arithmetic=values["pr_arithmetic"],
        bootstrap=values["bootstrap"],
        fid_infinity=values["fid_infinity"],
        seed=values["seed"],
    )


def _finished(
    scores: list[Score],
    extractor: Extractor,
    reference: Reference,
    protocol: Protocol,
    about_samples: dict[str, Any],
    out: Path,
) -> Report:
    has_features = reference.features is not None and len(reference.features) >= 4
    report = Report(
        extractor=extractor.name,
        scores=scores,
        num_features=extractor.num_features,
        protocol={
            "reference": reference.name,
            "feature extractor": extractor.description,
            **about_samples,
            "scores": dataclasses.asdict(protocol),
            "versions": f"cfjax {cfjax.__version__}, jax {jax.__version__}, numpy {np.__version__}",
        },
        floor=floor_distance(reference.features) if has_features else None,
        held_out_accuracy=getattr(extractor, "held_out_accuracy", None),
        extractor_warning=extractor.warning,
    )
    report.save(out / "scores.json")
    report.save_csv(out / "scores.csv")
    shutil.rmtree(out / evaluation_rows.FOLDER, ignore_errors=True)
    return report


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
    flags.DEFINE_string(
        "samples", None, "Instead of a checkpoint: a .npz of images or statistics, or a folder."
    )
    define_config_flag(required=False)
    flags.DEFINE_string(
        "dataset", None, "Real images, if not those of the config: see cfjax.encode."
    )
    flags.DEFINE_string(
        "reference", None, "Or a .npz of statistics or images, or a folder of images."
    )
    evaluation_inputs.define_inception_flags(required=False)
    flags.DEFINE_string("out", None, "Folder of the report.", required=True)
    flags.DEFINE_integer("num_samples", 1000, "For each row of the report.", lower_bound=2)
    flags.DEFINE_string(
        "caption_split", "held_out", "Of a model of documents: whose captions it draws."
    )
    flags.DEFINE_list("ar_steps", ["1"], "Numbers of AR steps: a row of the report each.")
    flags.DEFINE_multi_string(
        "sweep", [], "An option and its values: guidance_scale=1.0,1.5. Several are combined."
    )
    flags.DEFINE_list(
        "metrics",
        [],
        "Of fid, sfid, is, pr, kid; by default all but kid, and with a classifier fid.",
    )
    flags.DEFINE_string("pr_arithmetic", "adm", "Of precision and recall: adm or float32.")
    flags.DEFINE_integer("bootstrap", 0, "Resamples for the distance's interval.", lower_bound=0)
    flags.DEFINE_bool("fid_infinity", False, "Extrapolate to infinitely many samples too.")


if __name__ == "__main__":
    define_flags()
    program.run(main)
