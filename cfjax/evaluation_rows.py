"""The rows of an evaluation: images that are made or read, their features, and their scores."""

import collections
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging

from cfjax import evaluation_inputs, evaluation_sweep
from cfjax.data.image_files import write_png, write_whole
from cfjax.data.image_sets import ImageSet
from cfjax.diffusion.solvers import Solver
from cfjax.document_sampler import DocumentSampler
from cfjax.evaluation.extractors import Extractor
from cfjax.evaluation.feature_blocks import FeatureBlocks
from cfjax.evaluation.references import Reference
from cfjax.evaluation.scores import Protocol, Score, score
from cfjax.evaluation_captions import Captions
from cfjax.generation_request import Request, labels_of, recipe_of
from cfjax.sample import Part, stream_with_progress
from cfjax.sampler import Sampler
from cfjax.sampling_flags import load_overrides, sampling_overrides
from cfjax.visualization import image_grid

FOLDER = "features"
_IN_GRID, _GRID_COLUMNS = 100, 10


class Row(NamedTuple):
    """What becomes a row of the report.

    Attributes:
      name: of the row.
      recipe: what fixes the images, as JSON values.
      labels: int `[N]`, the class of each image, or None.
      count: N.
      read: yields batches uint8 `[n, H, W, C]` from image `first` on.
    """

    name: str
    recipe: Mapping[str, Any]
    labels: np.ndarray | None
    count: int
    read: Callable[[int], Iterator[np.ndarray]]


def score_rows(
    rows: Sequence[Row],
    extractor: Extractor | None,
    reference: Reference | None,
    protocol: Protocol,
    out: Path,
) -> list[Score]:
    """Scores rows one after the other, what is done being kept in `<out>/features`.

    All processes call it; the first returns the scores, the others none.

    Args:
      rows: at least one.
      extractor: of features; on the first process, and where it is collective on all.
      reference: on the first process, with what to compare.
      protocol: what to score.
      out: folder, where a grid of each row's first samples goes too.
    """
    if jax.process_index() == 0:
        features = reference.features
        for row in rows:
            protocol.check_counts(row.count, None if features is None else len(features))
    scores = []
    for row in rows:
        slug = re.sub(r"[^\w.]+", "_", row.name)
        kept = blocks = None
        num_done = 0
        if jax.process_index() == 0:
            kept = _Kept(out / FOLDER / f"{slug}.json", row, extractor, reference, protocol)
            num_done = row.count
            if kept.score is None:
                blocks = FeatureBlocks(out / FOLDER / slug, kept.recipe)
                num_done = blocks.num_done
        first = evaluation_inputs.same_on_all(num_done)
        if first < row.count:
            grid = out / f"samples_{slug}.png" if blocks is not None and first == 0 else None
            images = _with_grid(row.read(first), grid)
            features = evaluation_inputs.features_of(extractor, images, first)
            collections.deque(map(blocks.append, features) if blocks else features, maxlen=0)
        if kept is not None:
            if kept.score is None:
                kept.write(score(row.name, blocks, row.labels, reference, protocol))
                blocks.remove()
            scores.append(kept.score)
    return scores


class _Kept:
    """The score of a row in a file, so that an evaluation that was killed does not make it again."""

    def __init__(self, path, row, extractor, reference, protocol):
        self.recipe = {**row.recipe, "extractor": extractor.description, "count": row.count}
        self.score = None
        self._path = path
        self._key = json.loads(
            json.dumps([self.recipe, reference.name, dataclasses.asdict(protocol)])
        )
        if path.exists():
            found = json.loads(path.read_text())
            if found["key"] == self._key:
                self.score = Score(**found["score"])

    def write(self, made: Score) -> None:
        self.score = made
        document = {"key": self._key, "score": dataclasses.asdict(made)}
        write_whole(self._path, lambda file: file.write(json.dumps(document).encode()))
        logging.info("%s: FID-%d %.2f", made.name, made.num_samples, made.values["fid"])


def _with_grid(batches: Iterator[np.ndarray], path: Path | None) -> Iterator[np.ndarray]:
    """The batches, the first of which become a picture too."""
    if path is not None:
        first = next(batches)
        write_png(path, image_grid(first[:_IN_GRID], _GRID_COLUMNS))
        batches = itertools.chain([first], batches)
    yield from batches


def of_images(images: ImageSet, checksum: str, batch_size: int) -> Row:
    """The row of images that are there."""

    def read(first: int) -> Iterator[np.ndarray]:
        return evaluation_inputs.read_with_progress(images, first, batch_size)

    return Row(Path(images.name).name, {"samples": checksum}, images.labels, images.count, read)


def of_checkpoint(
    swept: Mapping[str, Sequence[Any]],
    samplers: Mapping[str, Sampler],
    captions: Captions | None = None,
) -> list[Row]:
    """A row a point of a sweep; the flags say what is not swept.

    Args:
      swept: from `evaluation_sweep.parse`.
      samplers: the model by the name of its weights.
      captions: that a model of documents draws; others draw all classes.

    Raises:
      UserError: a value out of range.
    """
    values = flags.FLAGS.flag_values_dict()
    rows = []
    for point in evaluation_sweep.points(swept):
        sampler = samplers[point.get(evaluation_sweep.WEIGHTS, "ema")]
        options = evaluation_sweep.sampling_options(point)
        settings = sampler.settings(sampling_overrides() | options)
        count = values["num_samples"]
        labels = None if captions else labels_of((), count, sampler.model.num_classes)
        request = Request(
            checkpoint=values["checkpoint"],
            train_step=values["train_step"],
            autoencoder=values["autoencoder"],
            guide=values["guide"],
            sampling=sampling_overrides() | load_overrides() | options,
            split_sizes=(),
            seed=values["seed"],
            classes=(),
            num_samples=count,
        )
        recipe = recipe_of("cfjax.evaluate", request, sampler, settings)
        if captions is None:
            part = Part(labels, settings)
            read = functools.partial(
                _generated, sampler, part, values["seed"], values["batch_size"]
            )
        else:
            recipe |= {"captions": captions.describe(count)}
            read = functools.partial(
                _drawn, sampler, captions, count, sampling_overrides() | options
            )
        rows.append(Row(evaluation_sweep.name_of(point), recipe, labels, count, read))
    return rows


def _generated(
    sampler: Sampler, part: Part, seed: int, batch_size: int, first: int
) -> Iterator[np.ndarray]:
    made = stream_with_progress(sampler, [part], seed, batch_size, first)
    return (images for images, _ in made)


def _drawn(
    sampler: DocumentSampler,
    captions: Captions,
    count: int,
    options: Mapping[str, Any],
    first: int,
) -> Iterator[np.ndarray]:
    """Images after captions."""
    values = flags.FLAGS.flag_values_dict()
    with evaluation_inputs.progress("captions to images", count, first) as bar:
        while first < count:
            # Ends of batches are multiples, so that what is made at a time belongs to one of them.
            end = min(count, (first // values["batch_size"] + 1) * values["batch_size"])
            prompts = [[text] for text in captions.at(first, end)]
            images = sampler.generate(
                prompt=prompts, seed=values["seed"], first_index=first, **options
            )
            bar.update(len(images))
            yield images
            first = end


def sampler_details(sampler: Sampler, swept: Mapping[str, Sequence[Any]]) -> str:
    """How images are made at the first point of a sweep, and what is swept."""
    point = evaluation_sweep.points(swept)[0]
    overrides = sampling_overrides() | evaluation_sweep.sampling_options(point)
    chosen, resolved = sampler.settings(overrides), dict(sampler.config.sampling) | overrides
    details = (
        f"{resolved['denoising_steps']} denoising steps of {chosen.solver.name} for each AR step"
        f" ({_solver_details(chosen.solver)}), timestep spacing {resolved['timestep_spacing']}, split"
        f" {resolved['split']}, token order {chosen.token_order}"
    )
    others = [name for name, values in swept.items() if len(values) > 1]
    return f"{details}; swept: {', '.join(others)}" if others else details


def guidance_details(
    sampler: Sampler, swept: Mapping[str, Sequence[Any]], guide: str | None
) -> str:
    """How the first point of a sweep is guided."""
    point = evaluation_sweep.points(swept)[0]
    overrides = sampling_overrides() | evaluation_sweep.sampling_options(point)
    guidance = sampler.settings(overrides).guidance
    return (
        f"{guidance.scale:g} in {guidance.interval}, {guidance.schedule} over AR steps, power"
        f" {guidance.power:g} over t, by {guide or 'the null class'}"
    )


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
