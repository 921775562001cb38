"""The Inception score, with the splits of ADM's evaluation."""

import dataclasses

import numpy as np

from cfjax.errors import UserError

ADM_SPLIT_SIZE = 5000


@dataclasses.dataclass(frozen=True)
class InceptionScore:
    """A score and how it was split.

    Attributes:
      mean: over the splits.
      std: of the splits about that mean (divided by their number).
      split_size: samples in a split; the last may have fewer.
    """

    mean: float
    std: float
    split_size: int


def inception_score(logits: np.ndarray, split_size: int = ADM_SPLIT_SIZE) -> InceptionScore:
    """exp of the mean KL(p(y|x) || p(y)) in each split, averaged (Salimans et al. 2016, section 4).

    As in ADM's evaluation the splits follow each other in the order of the samples, which is not
    shuffled, and the rest that fills no split is one of its own. There the softmax is in float32;
    here all is in float64, which agrees with it to 1e-6.

    Args:
      logits: `[N, classes]`; ADM's are those of 1,008 classes without the bias of the last layer.
      split_size: samples in a split.

    Raises:
      UserError: there are no samples, a logit is not finite, or `split_size` is below 1.
    """
    if split_size < 1:
        raise UserError(f"split_size={split_size} holds no sample; give 1 or more.")
    if not len(logits):
        raise UserError("an Inception score needs a sample, got 0; score more samples.")
    starts = range(0, len(logits), split_size)
    scores = [_score(logits[start : start + split_size]) for start in starts]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), split_size)


def _score(logits: np.ndarray) -> float:
    if not np.isfinite(logits).all():
        raise UserError("a logit is not finite; check the images and the extractor's weights.")
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, keepdims=True)
    probabilities = exponentials / totals
    negative_entropy = np.einsum("nc,nc->n", probabilities, shifted) - np.log(totals[:, 0])
    marginal = probabilities.mean(axis=0)
    likely = marginal[marginal > 0]  # p log p is 0 at p = 0
    return float(np.exp(negative_entropy.mean() - likely @ np.log(likely)))
