"""What a model of documents can do, scored: a table a task, by the set that it was trained on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cfjax.data.captioned_records import CaptionedRecords
from cfjax.data.embedded import MnistSource
from cfjax.data.progressions import NUM_TELLING, RULES, ProgressionsSource
from cfjax.data.scene_captions import parse_caption, phrasings
from cfjax.data.scenes import ScenesSource
from cfjax.data.transforms import TransformsSource
from cfjax.errors import UserError
from cfjax.evaluation.caption_scores import bleu, cider_d
from cfjax.evaluation.classifier import ClassifierTraining, load_or_train
from cfjax.evaluation.scene_judge import JUDGE_TRAINING, judge_accuracy, load_scene_judge
from cfjax.evaluation.scene_scores import score_captions, score_images
from cfjax.evaluation.sequence_scores import (
    judged_classes,
    score_progressions,
    score_transforms,
)
from cfjax.evaluation_captions import pairs_of_images
from cfjax.generated_documents import Generator
from cfjax.visualization import save_accuracy_by_position

SCENE_JUDGE_TRAINING = JUDGE_TRAINING
DIGIT_JUDGE_TRAINING = ClassifierTraining()
_NUM_GROUPS, _GROUPS_SEED = 50, 0  # of the jackknife
# Scores of captions that papers print times 100.
HUNDREDFOLD = ("BLEU-4", "CIDEr-D")

Scored = Mapping[str, float | None]


class Number(NamedTuple):
    """A score, and its standard error or None."""

    value: float
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """A table of the report.

    Attributes:
      title: of the table.
      numbers: by name, shares in 0...1 but for those in HUNDREDFOLD; in BLEU's range and CIDEr's.
    """

    title: str
    numbers: Mapping[str, Number]


@dataclasses.dataclass(frozen=True)
class Scores:
    """All tables of a set, and who judged.

    Attributes:
      sections: the tables.
      judge: what says what is right, and how right it is itself.
      by_position: of progressions, the share that is right of each generated image; else none.
    """

    sections: Sequence[Section]
    judge: str
    by_position: Sequence[float] = ()


def standard_errors(score: Callable[[np.ndarray], Scored], count: int) -> dict[str, float | None]:
    """Standard errors of scores of `count` documents, by the jackknife that leaves out groups.

    Efron and Tibshirani 1993, section 11.5, with 50 groups, or one a document if there are fewer. A
    document is left out as a whole, as what it has right and wrong is not independent.

    Args:
      score: indices of documents to scores by name; None for one that they don't have.
      count: how many documents there are.

    Returns:
      By name; None where there is only one document, or a score is missing.
    """
    num_groups = min(_NUM_GROUPS, count)
    # Drawn, as sets may have a period.
    groups = np.random.default_rng(_GROUPS_SEED).permutation(count) % num_groups
    if num_groups < 2:
        return dict.fromkeys(score(np.arange(count)))
    left = [score(np.flatnonzero(groups != group)) for group in range(num_groups)]
    errors = {}
    for name in left[0]:
        values = [scores.get(name) for scores in left]
        errors[name] = None if None in values else float(np.std(values) * (num_groups - 1) ** 0.5)
    return errors


def of_scenes(
    generator: Generator, source: ScenesSource, documents: str, count: int, out: Path
) -> Scores | None:
    """Captions to images and images to captions; see `evaluation.scene_scores`.

    All processes call it, and the first scores.

    Args:
      generator: of images and texts.
      source: the scenes, at the size of the model's images.
      documents: what fixes them; see `Generator.images`.
      count: how many of each.
      out: folder of the judge.

    Raises:
      UserError: a set too small.
    """
    _check_count(count, len(source), "scenes")
    images = generator.images(
        *("captions to images", documents, lambda rows: [[source.captions[row]] for row in rows]),
        count,
    )
    texts = generator.texts(
        *("images to captions", documents, lambda rows: [[it] for it in source.images_at(rows)]),
        count,
    )
    if images is None or texts is None:
        return None
    judge = load_scene_judge(
        out / "judge", source.image_shape[0], source.grid_size, SCENE_JUDGE_TRAINING
    )
    readings = judge.read(images[:, 0])
    scenes = [source.scene_at(row) for row in range(count)]
    descriptions = [parse_caption(caption) for caption in source.captions[:count]]

    def of_images(rows: np.ndarray) -> Scored:
        return _named(score_images(*_at(rows, descriptions, readings)), leave_out=("parsed",))

    def of_texts(rows: np.ndarray) -> Scored:
        return _named(score_captions(*_at(rows, texts, scenes)))

    accuracy = judge_accuracy(judge, source)
    of_judge = {name: Number(value) for name, value in _named(accuracy).items()}
    similarity = _caption_numbers(texts, [phrasings(scene) for scene in scenes])
    return Scores(
        [
            Section("captions to images", _numbers(of_images, count)),
            Section("images to captions", {**_numbers(of_texts, count), **similarity}),
            Section(f"the judge on {len(source)} real images", of_judge),
        ],
        judge=f"a classifier of cells, checksum {judge.classifier.checksum}, right on"
        f" {judge.classifier.held_out_accuracy:.1%} of the held-out digits; colours by their direction"
        " in RGB; captions by the grammar",
    )


def of_progressions(
    generator: Generator,
    source: ProgressionsSource,
    documents: str,
    count: int,
    length: int,
    out: Path,
) -> Scores | None:
    """The next image after three, and sequences continued to `length` images.

    All processes call it, and the first scores and plots `<out>/accuracy_by_position.png`.

    Args:
      generator, source, documents, count, out: see `of_scenes`.
      length: images of a sequence, the three included.

    Raises:
      UserError: a set too small, or no image to generate.
    """
    _check_count(count, len(source), "sequences")
    if length <= NUM_TELLING:
        raise UserError(f"--length is {length}; set it to {NUM_TELLING + 1} or more.")
    generated = generator.images(
        *("progressions", documents),
        lambda rows: [list(images[:NUM_TELLING]) for images in source.sequences_at(rows)],
        *(count, length - NUM_TELLING),
    )
    if generated is None:
        return None
    digits = [MnistSource(split) for split in ("train", "held_out")]
    classifier = load_or_train(out / "judge", *digits, DIGIT_JUDGE_TRAINING)
    given = source.classes_at(np.arange(count))[:, :NUM_TELLING]
    judged = judged_classes(classifier, generated)
    trained = min(source.sequence_length - NUM_TELLING, judged.shape[1])

    def next_class(rows: np.ndarray) -> Scored:
        first = score_progressions(given[rows], judged[rows, :1])
        return {"right class": first.next_class} | first.by_rule

    def continued(rows: np.ndarray) -> Scored:
        scores = score_progressions(given[rows], judged[rows])
        shares = {"right classes": scores.images, "whole sequences": scores.sequences}
        ends = {
            f"image {place}": scores.by_position[place - NUM_TELLING - 1]
            for place in sorted({NUM_TELLING + trained, length})
        }
        return shares | ends | scores.by_rule

    rules = source.rules_at(np.arange(count))
    curves = {"all rules": score_progressions(given, judged).by_position}
    for rule in np.unique(rules):
        of_rule = rules == rule
        curves[RULES[rule].name] = score_progressions(given[of_rule], judged[of_rule]).by_position
    save_accuracy_by_position(
        out / "accuracy_by_position.png", curves, NUM_TELLING + 1, source.sequence_length
    )
    return Scores(
        [
            Section(f"the image after {NUM_TELLING}", _numbers(next_class, count)),
            Section(
                f"continued to {length} images, trained with {source.sequence_length}",
                _numbers(continued, count),
            ),
            Section(
                "the judge on held-out digits",
                {"right classes": Number(classifier.held_out_accuracy)},
            ),
        ],
        judge=f"a classifier of the digits, checksum {classifier.checksum}",
        by_position=curves["all rules"],
    )


def of_transforms(
    generator: Generator, source: TransformsSource, documents: str, count: int
) -> Scores | None:
    """Answers to queries after examples; the arguments are those of `of_scenes`."""
    _check_count(count, len(source), "sequences")
    answers = generator.images(
        *("transforms", documents),
        lambda rows: [list(images[:-1]) for images in source.sequences_at(rows)],
        count,
    )
    if answers is None:
        return None
    indices = np.arange(count)
    queries, transforms = source.queries_at(indices), source.transforms_at(indices)

    def of_answers(rows: np.ndarray) -> Scored:
        scores = score_transforms(queries[rows], answers[rows, 0], transforms[rows])
        return {"right": scores.answers, "nearest": scores.nearest} | scores.by_transform

    return Scores(
        [Section(f"answers after {source.num_examples} examples", _numbers(of_answers, count))],
        judge="the squared error to the query by every transform; right is the nearest, if it explains"
        " half of the variance",
    )


def of_captions(
    generator: Generator, source: CaptionedRecords, documents: str, count: int
) -> Scores | None:
    """Captions of images against all captions of each; the arguments are those of `of_scenes`."""
    pairs = pairs_of_images(source)
    _check_count(count, len(pairs), "images")
    texts = generator.texts(
        *("images to captions", documents),
        lambda rows: [[it] for it in source.images_at([pairs[row][0] for row in rows])],
        count,
    )
    if texts is None:
        return None
    references = [[source.captions[pair] for pair in of_image] for of_image in pairs[:count]]
    return Scores(
        [Section("images to captions", _caption_numbers(texts, references))],
        judge="all captions of each image, as words by the rules of COCO's captioning evaluation",
    )


def _numbers(score: Callable[[np.ndarray], Scored], count: int) -> dict[str, Number]:
    """The scores of all documents that there are, with their standard errors."""
    values, errors = score(np.arange(count)), standard_errors(score, count)
    return {
        name: Number(value, errors.get(name)) for name, value in values.items() if value is not None
    }


def _caption_numbers(texts: list[str], references: list[list[str]]) -> dict[str, Number]:
    scores = {"BLEU-4": Number(bleu(texts, references))}
    if len(texts) > 1:
        scores["CIDEr-D"] = Number(cider_d(texts, references)[0])
    return scores


def _named(scores, leave_out=()) -> dict[str, float | None]:
    """The shares of scores, as a table names them."""
    return {
        name.replace("_", " "): value
        for name, value in dataclasses.asdict(scores).items()
        if name not in ("num_scenes", *leave_out)
    }


def _at(rows: np.ndarray, *lists: Sequence) -> list[list]:
    return [[values[row] for row in rows] for values in lists]


def _check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise UserError(f"--num_samples is {count}, but the split has {most} {what}; lower it.")
