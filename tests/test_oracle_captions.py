"""BLEU and CIDEr-D against the field's packages, on the same words.

Their tokenizers are passed by: sacrebleu's is switched off, and that of COCO's evaluation, which
pycocoevalcap runs in Java, is given what `caption_words` makes.
"""

import numpy as np
import pytest
from test_caption_scores import WORDS, random_captions

from cfjax.evaluation.caption_scores import bleu, caption_words, cider_d

sacrebleu = pytest.importorskip("sacrebleu")
coco_bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
coco_cider = pytest.importorskip("pycocoevalcap.cider.cider")

pytestmark = pytest.mark.oracle


def for_coco(captions, references):
    """Dictionaries by image of what it calls ground truths and results."""
    return (
        {
            i: [" ".join(caption_words(text)) for text in texts]
            for i, texts in enumerate(references)
        },
        {i: [" ".join(caption_words(text))] for i, text in enumerate(captions)},
    )


SETS = pytest.mark.parametrize(("num_images", "seed"), [(2, 1), (40, 0), (300, 3)])


@SETS
@pytest.mark.parametrize("max_order", [1, 4])
def test_bleu_of_coco(num_images, seed, max_order):
    """It adds 1e-9 to counts of n-grams, which are 6 or more here: 1e-9."""
    captions, references = random_captions(num_images, seed)
    scores, _ = coco_bleu.Bleu(max_order).compute_score(*for_coco(captions, references), verbose=0)
    found = bleu(captions, references, max_order)
    assert found > 0.05
    assert found == pytest.approx(scores[-1], rel=1e-9)


@SETS
def test_bleu_of_sacrebleu(num_images, seed):
    """In float64: 1e-12."""
    captions, references = random_captions(num_images, seed)
    most = max(map(len, references))
    transposed = [[it[k] if k < len(it) else None for it in references] for k in range(most)]
    scored = sacrebleu.corpus_bleu(
        captions, transposed, tokenize="none", smooth_method="none", force=True
    )
    assert bleu(captions, references, split=str.split) == pytest.approx(
        scored.score / 100, rel=1e-12
    )


@SETS
def test_cider_d_of_coco(num_images, seed):
    """In float64, with sums in another order: 1e-10, of each caption."""
    captions, references = random_captions(num_images, seed)
    expected, expected_scores = coco_cider.Cider().compute_score(*for_coco(captions, references))
    mean, scores = cider_d(captions, references)
    assert mean == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-10, atol=1e-14)
    assert mean > 0.5


def test_captions_with_punctuation():
    """Those of COCO's kind, each against a shuffled one too: 1e-9."""
    captions = list(WORDS)[:-1]
    references = [[text.upper(), captions[i - 1]] for i, text in enumerate(captions)]
    for_them = for_coco(captions, references)
    expected, _ = coco_cider.Cider().compute_score(*for_them)
    assert cider_d(captions, references)[0] == pytest.approx(expected, rel=1e-9)
    scores, _ = coco_bleu.Bleu(4).compute_score(*for_them, verbose=0)
    assert bleu(captions, references) == pytest.approx(scores[-1], rel=1e-9)
