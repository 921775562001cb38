"""How right generated images are that continue a progression or answer a transform's query."""

import dataclasses

import numpy as np

from cfjax.data.progressions import RULES, continue_classes, rule_of
from cfjax.data.transforms import TRANSFORM_NAMES, all_transforms
from cfjax.errors import UserError
from cfjax.evaluation.classifier import TrainedClassifier

# An answer may differ from the true one by this share of what a flat image differs by.
MAX_UNEXPLAINED = 0.5
_BATCH = 100  # all transforms of so many queries at a time


@dataclasses.dataclass(frozen=True)
class ProgressionScores:
    """Shares of generated images whose class is the rule's.

    Attributes:
      num_sequences: how many sequences.
      next_class: of the first generated image of each.
      by_position: of each generated image, the first first.
      images: of all generated images together.
      sequences: of sequences with every generated image right.
      by_rule: of the images of each rule's sequences, by the rule's name; rules that occur.
    """

    num_sequences: int
    next_class: float
    by_position: tuple[float, ...]
    images: float
    sequences: float
    by_rule: dict[str, float]


@dataclasses.dataclass(frozen=True)
class TransformScores:
    """Shares of right answers, as `right_answers` says.

    Attributes:
      num_sequences: how many queries.
      answers: of all.
      nearest: of all, those nearest to the true answer, however far from it.
      by_transform: the share of right answers of each transform, by its name; those that occur.
    """

    num_sequences: int
    answers: float
    nearest: float
    by_transform: dict[str, float]


def judged_classes(classifier: TrainedClassifier, sequences: np.ndarray) -> np.ndarray:
    """Classes int32 `[n, k]` of images uint8 `[n, k, H, W, C]`, by a classifier of such images."""
    images = sequences.reshape(-1, *sequences.shape[2:])
    return classifier.features(images)[1].reshape(sequences.shape[:2])


def score_progressions(given: np.ndarray, judged: np.ndarray) -> ProgressionScores:
    """Scores continuations of progressions.

    Args:
      given: true classes of the images that were given, int `[n, g]` with g >= 3, which tell the
        rule.
      judged: classes that a judge saw in the generated images that follow, int `[n, m]`.

    Raises:
      UserError: no sequences, fewer than three given classes, or classes that follow no rule.
    """
    given, judged = np.asarray(given), np.asarray(judged)
    if not judged.size or len(given) != len(judged) or given.shape[1] < 3:
        raise UserError(
            f"given classes of shape {given.shape} and judged ones of {judged.shape} can't be"
            " scored; pass [n, 3 or more] and [n, 1 or more] of the same n."
        )
    num_given = given.shape[1]
    truth = continue_classes(given, num_given + judged.shape[1])
    astray = np.flatnonzero((truth[:, :num_given] != given).any(1))
    if len(astray):
        raise UserError(
            f"the given classes {given[astray[0]].tolist()} follow no rule; pass those of a"
            " progression."
        )
    right = truth[:, num_given:] == judged
    rules = rule_of(given)
    return ProgressionScores(
        num_sequences=len(given),
        next_class=float(right[:, 0].mean()),
        by_position=tuple(right.mean(0).tolist()),
        images=float(right.mean()),
        sequences=float(right.all(1).mean()),
        by_rule={RULES[rule].name: float(right[rules == rule].mean()) for rule in np.unique(rules)},
    )


def right_answers(
    queries: np.ndarray, answers: np.ndarray, transforms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which generated answers are right: bool `[n]`, and which are nearest, bool `[n]`.

    An answer is nearest if of the query itself and all its transforms none has a smaller mean
    squared error to the answer than the true one. An equal error is no smaller one: where two
    transforms of a query are the same image, either is right; where they are nearly the same, as
    a zero and its mirror image, the nearer one decides. An answer is right if it is nearest, and
    its error is at most MAX_UNEXPLAINED of the true answer's variance over its pixels, by channel:
    the error of the best image of one flat colour, which is no answer.

    Args:
      queries: images uint8 `[n, H, W, 3]`.
      answers: generated images uint8 `[n, H, W, 3]`.
      transforms: the true ones, int `[n]`, indices in TRANSFORM_NAMES.
    """
    right, nearest = np.zeros(len(queries), bool), np.zeros(len(queries), bool)
    for begin in range(0, len(queries), _BATCH):
        rows = slice(begin, begin + _BATCH)
        candidates = np.concatenate(
            [all_transforms(queries[rows]), queries[rows][:, None]], axis=1
        ).astype(np.float32)
        true = transforms[rows, None]
        errors = np.square(candidates - answers[rows][:, None]).mean((2, 3, 4))
        error = np.take_along_axis(errors, true, axis=1)[:, 0]
        true_answers = candidates[np.arange(len(true)), true[:, 0]]
        nearest[rows] = error <= errors.min(1)
        right[rows] = nearest[rows] & (error <= MAX_UNEXPLAINED * true_answers.var((1, 2)).mean(-1))
    return right, nearest


def score_transforms(
    queries: np.ndarray, answers: np.ndarray, transforms: np.ndarray
) -> TransformScores:
    """Scores generated answers; the arguments are those of `right_answers`.

    Raises:
      UserError: there are none, or shapes that differ.
    """
    if not len(queries) or queries.shape != answers.shape or len(queries) != len(transforms):
        raise UserError(
            f"queries of shape {queries.shape}, answers of {answers.shape} and"
            f" {len(transforms)} transforms can't be scored; pass as many of each, of one shape."
        )
    right, nearest = right_answers(queries, answers, transforms)
    return TransformScores(
        num_sequences=len(queries),
        answers=float(right.mean()),
        nearest=float(nearest.mean()),
        by_transform={
            TRANSFORM_NAMES[transform]: float(right[transforms == transform].mean())
            for transform in np.unique(transforms)
        },
    )
