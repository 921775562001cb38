"""Scores of captions against references: corpus BLEU and CIDEr-D, as captioning papers report them.

Papers print both times 100. They compare words, which `caption_words` makes of a text; a score depends
on that too.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from cfjax.errors import UserError

_SAME = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
_CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_PAIRS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
_TOKEN = re.compile(
    r"""
    (?:[^\W\d_]\.){2,}                          # u.s.
    | \b(?:mr|mrs|ms|dr|st|jr|sr|vs)\.
    | [?!]{2,}                                  # kept, unlike one
    | n't\b | '(?:s|re|ve|ll|d|m)\b
    | PART (?: [-/] PART )*                     # t-shirt, 3.5-inch, and/or
    | [^\s\w]
    """.replace("PART", r"(?:\d+(?:[.,:]\d+)+\w* | \w+(?:'\w+)*)"),
    re.VERBOSE,
)
_BRACKETS = {
    **{"(": "-lrb-", "[": "-lsb-", "{": "-lcb-"},
    **{")": "-rrb-", "]": "-rsb-", "}": "-rcb-"},
}
_REMOVED = frozenset("'`\".?!,:-;")


def caption_words(text: str) -> list[str]:
    """The words of a caption, as the captioning evaluation of COCO makes them, nearly.

    That is the Penn Treebank's way in lower case, with punctuation removed afterwards: "A man's
    t-shirt isn't red." is `a man 's t-shirt is n't red`. Like there, brackets stay, as `-lrb-` and so
    on. Stanford's tokenizer, which it runs, knows more abbreviations, and addresses of the web.

    Args:
      text: a caption.
    """
    text = _CLITICS.sub(r" \1", text.lower().translate(_SAME))
    text = _PAIRS.sub(lambda match: " ".join(it for it in match.groups() if it), text)
    tokens = (_BRACKETS.get(token, token) for token in _TOKEN.findall(text))
    return [token for token in tokens if token not in _REMOVED]


def bleu(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    max_order: int = 4,
    split: Callable[[str], list[str]] = caption_words,
) -> float:
    """Corpus BLEU in 0...1, without smoothing; Papineni et al. 2002, section 2.3.

    Counts of all captions are summed before the ratios are taken. The brevity penalty takes, of each
    caption's references, the one whose length is closest, and of two the shorter one.

    Args:
      captions: `N` texts.
      references: of each of them one text or more.
      max_order: n-grams have 1...max_order words.
      split: a text to words.

    Raises:
      UserError: there are no captions, or not as many lists of references, or one is empty.
    """
    _check(captions, references)
    matched, total = np.zeros(max_order, np.int64), np.zeros(max_order, np.int64)
    length = closest = 0
    for caption, texts in zip(captions, references, strict=True):
        words, of_references = split(caption), [split(text) for text in texts]
        length += len(words)
        closest += min((abs(len(it) - len(words)), len(it)) for it in of_references)[1]
        for order in range(max_order):
            counts = _ngrams(words, order + 1)
            most: Counter[tuple[str, ...]] = Counter()
            for it in of_references:
                most |= _ngrams(it, order + 1)
            matched[order] += (counts & most).total()
            total[order] += counts.total()
    if not matched.all():
        return 0.0
    precision = math.exp(np.log(matched / total).mean())
    return precision * min(1.0, math.exp(1 - closest / length))


def cider_d(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    max_order: int = 4,
    sigma: float = 6.0,
    split: Callable[[str], list[str]] = caption_words,
) -> tuple[float, np.ndarray]:
    """CIDEr-D in 0...10; Vedantam et al. 2015 (arXiv 1411.5726), equations 1 to 3 and 7.

    N-grams weigh by the log of the number of images over that of the images in whose references they
    occur, so that a score depends on all references given. As in the published code, a count
    is not divided by those of the caption, and words are not stemmed.

    Args:
      captions: `N` texts, one an image.
      references: of each image one text or more; `N` is at least 2, as with one all weights are 0.
      max_order: n-grams have 1...max_order words, and their scores are averaged.
      sigma: of the Gaussian penalty on the difference of lengths, in words.
      split: a text to words.

    Returns:
      The mean, and the score of each caption, float64 `[N]`.

    Raises:
      UserError: there are fewer than two captions, or not as many lists of references, or one is
        empty.
    """
    _check(captions, references)
    if len(captions) < 2:
        raise UserError(
            "CIDEr-D of 1 caption is not defined; give the captions of 2 images or more."
        )
    orders = range(1, max_order + 1)
    of_references = [[split(text) for text in texts] for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in of_references:
        frequency.update(
            {ngram for it in texts for order in orders for ngram in _ngrams(it, order)}
        )
    log_images = math.log(len(captions))

    def vectors(words: Sequence[str]) -> list[dict[tuple[str, ...], float]]:
        return [
            {
                ngram: count * (log_images - math.log(max(1, frequency[ngram])))
                for ngram, count in _ngrams(words, order).items()
            }
            for order in orders
        ]

    scores = np.empty(len(captions))
    for row, (caption, texts) in enumerate(zip(captions, of_references, strict=True)):
        words = split(caption)
        own = vectors(words)
        similarities = [
            math.exp(-((len(words) - len(it)) ** 2) / (2 * sigma**2))
            * np.mean([_clipped_cosine(a, b) for a, b in zip(own, vectors(it), strict=True)])
            for it in texts
        ]
        scores[row] = 10.0 * np.mean(similarities)
    return float(scores.mean()), scores


def _clipped_cosine(
    caption: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]
) -> float:
    norms = math.hypot(*caption.values()) * math.hypot(*reference.values())
    if not norms:
        return 0.0
    common = caption.keys() & reference.keys()
    return math.fsum(min(caption[it], reference[it]) * reference[it] for it in common) / norms


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[first:] for first in range(order)), strict=False))


def _check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not captions or len(captions) != len(references):
        raise UserError(
            f"{len(captions)} captions can't be compared with {len(references)} lists of references;"
            " give one list for each, and at least one."
        )
    for number, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise UserError(
                f"the references of caption {number} are {texts!r}; give a list of one text or more."
            )
