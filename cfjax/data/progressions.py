"""Progressions: sequences of digits whose classes follow a rule, to be continued in context."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from cfjax.data.embedded import MnistSource
from cfjax.data.embedded_draws import (
    EMBEDDED_SPLITS,
    below,
    check_count,
    indexed_words,
    rows_by_class,
)
from cfjax.errors import check_choice

DEFAULT_NUM_SEQUENCES = {"train": 20_000, "held_out": 2_000}
# How many classes tell the rule.
NUM_TELLING = 3
_RULE, _START, _OTHER, _IMAGES = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Rule:
    """How classes go on, all modulo 10.

    Attributes:
      name: of the rule.
      step: what is added each time; None for a, b, a, b, ... with a and b distinct.
    """

    name: str
    step: int | None


RULES = (
    Rule("plus one", 1),
    Rule("plus two", 2),
    Rule("minus one", -1),
    Rule("alternation", None),
    Rule("copy", 0),
)


def rule_of(classes: np.ndarray) -> np.ndarray:
    """The rule that the first three classes tell.

    At most one fits: the two differences between three classes are equal for a rule with a step,
    and opposite for an alternation; both is so for 0, which is a copy, and for 5, which is no
    rule's step and so an alternation.

    Args:
      classes: int `[..., k]` of k >= 3.

    Returns:
      int32 `[...]`, an index in RULES; -1 if they follow no rule.
    """
    first, second, third = np.moveaxis(np.asarray(classes)[..., :NUM_TELLING], -1, 0)
    rules = np.full(first.shape, -1, np.int32)
    for index, rule in enumerate(RULES):
        if rule.step is None:
            fits = (first == third) & (first != second)
        else:
            fits = ((second - first) % 10 == rule.step % 10) & (
                (third - second) % 10 == rule.step % 10
            )
        rules[fits] = index
    return rules


def continue_classes(classes: np.ndarray, length: int) -> np.ndarray:
    """The first three classes continued by the rule that they tell.

    Args:
      classes: int `[..., k]` of k >= 3.
      length: of the whole sequence, the given classes included.

    Returns:
      int32 `[..., length]`; -1 throughout where they follow no rule.
    """
    classes = np.asarray(classes)
    rules = rule_of(classes)
    return np.where(
        (rules >= 0)[..., None],
        follow(np.maximum(rules, 0), classes[..., 0], classes[..., 1], length),
        np.int32(-1),
    )


def follow(rules: np.ndarray, start: np.ndarray, other: np.ndarray, length: int) -> np.ndarray:
    """Classes int32 `[..., length]` by rules and their starts, int `[...]`.

    Args:
      rules: indices in RULES.
      start: the first class.
      other: the second class of an alternation; not used by the other rules.
      length: how many classes.
    """
    positions = np.arange(length)
    steps = np.array([0 if rule.step is None else rule.step for rule in RULES])[rules]
    alternates = np.array([rule.step is None for rule in RULES])[rules]
    stepped = (np.asarray(start)[..., None] + steps[..., None] * positions) % 10
    alternating = np.where(
        positions % 2 == 0, np.asarray(start)[..., None], np.asarray(other)[..., None]
    )
    return np.where(alternates[..., None], alternating, stepped).astype(np.int32)


class ProgressionsSource:
    """Sequences of grey 28x28 digits; see `cfjax.data.document_sources.ImageSequences`.

    The rule and the first class of each sequence are uniform, and the image of each class is any
    of its split's. A sequence depends on its split, its index and the length alone.

    Attributes:
      image_shape: (28, 28, 1).
      sequence_length: images a sequence.
      fingerprint: a hash of the digits and of all sequences.
    """

    left_out = ()
    image_shape = MnistSource.image_shape

    def __init__(self, split: str, sequence_length: int = 10, num_sequences: int | None = None):
        """Draws all sequences.

        Args:
          split: "train" or "held_out", of the digits too.
          sequence_length: 4 or more, since three classes tell the rule.
          num_sequences: how many; as DEFAULT_NUM_SEQUENCES says without.

        Raises:
          UserError: an unknown split, or too small a number.
        """
        check_choice("split", split, EMBEDDED_SPLITS)
        check_count("sequence_length", sequence_length, NUM_TELLING + 1)
        num_sequences = DEFAULT_NUM_SEQUENCES[split] if num_sequences is None else num_sequences
        check_count("num_sequences", num_sequences, 1)
        self.sequence_length = sequence_length
        digits = MnistSource(split)
        words = indexed_words("progressions", split, num_sequences, _IMAGES + sequence_length)
        self._rules = below(words[:, _RULE], len(RULES)).astype(np.int32)
        start = below(words[:, _START], 10)
        other = (start + 1 + below(words[:, _OTHER], 9)) % 10
        self._classes = follow(self._rules, start, other, sequence_length)
        members = np.stack(rows_by_class(digits.labels))  # as many of each class
        self._rows = members[self._classes, below(words[:, _IMAGES:], members.shape[1])]
        self._images = digits.examples_at(np.arange(len(digits)))["image"]
        digest = hashlib.sha256(digits.fingerprint.encode() + self._classes.tobytes())
        digest.update(self._rows.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rules)

    def sequences_at(self, indices: Sequence[int]) -> np.ndarray:
        """New images uint8 `[n, sequence_length, 28, 28, 1]`."""
        return self._images[self._rows[np.asarray(indices)]]

    def classes_at(self, indices: Sequence[int]) -> np.ndarray:
        """The class of each image, int32 `[n, sequence_length]`."""
        return self._classes[np.asarray(indices)]

    def rules_at(self, indices: Sequence[int]) -> np.ndarray:
        """The rule of each sequence, int32 `[n]`, indices in RULES."""
        return self._rules[np.asarray(indices)]
