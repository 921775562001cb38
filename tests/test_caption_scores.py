"""BLEU and CIDEr-D against published examples, definitions and what must hold for any captions."""

import math
from collections import Counter

import numpy as np
import pytest

from cfjax.errors import UserError
from cfjax.evaluation.caption_scores import bleu, caption_words, cider_d

# Of Stanford's PTBTokenizer 3.4.1 with -lowerCase and COCO's list of punctuation removed.
WORDS = {
    "A man's dog isn't sitting; it's running, don't you think?": (
        "a man 's dog is n't sitting it 's running do n't you think"
    ),
    'Two people (a man and a woman) are playing "Frisbee" in the park...': (
        "two people -lrb- a man and a woman -rrb- are playing frisbee in the park"
    ),
    "A black-and-white cat -- sleeping on a t-shirt.": (
        "a black-and-white cat sleeping on a t-shirt"
    ),
    "Mr. Smith's 3.5-inch phone costs $5,000.50 & 20% more.": (
        "mr. smith 's 3.5-inch phone costs $ 5,000.50 & 20 % more"
    ),
    "The boys' bikes can't fit in the car/truck.": "the boys bikes ca n't fit in the car/truck",
    "I'm sure they've seen what we'll do, he'd said.": (
        "i 'm sure they 've seen what we 'll do he 'd said"
    ),
    "A sign reading 'STOP' at 5:30 p.m. in the U.S.": (
        "a sign reading stop at 5:30 p.m. in the u.s."
    ),
    "cannot gonna wanna a café with naïve décor": ("can not gon na wan na a café with naïve décor"),
    "It’s a “curly” quote – with en dash — and em dash…": (
        "it 's a curly quote with en dash and em dash"
    ),
    "A cat's.The dog": "a cat 's the dog",
    "half 1/2 cup 10:45": "half 1/2 cup 10:45",
    '"a plate w/ food, fries and/or salad"': "a plate w / food fries and/or salad",
    "A red, green & blue kite!!! in the sky": "a red green & blue kite !!! in the sky",
    "a # 1 sign, 50% off! [brackets] {braces}": (
        "a # 1 sign 50 % off -lsb- brackets -rsb- -lcb- braces -rcb-"
    ),
    "five o'clock": "five o'clock",
    "  ...  ": "",
}


@pytest.mark.parametrize("text", WORDS)
def test_words_are_those_of_the_penn_treebank_in_lower_case(text):
    assert caption_words(text) == WORDS[text].split()


# The example of Papineni et al. 2002, section 1, as NLTK's documentation scores it.
GUIDE = [
    "It is a guide to action which ensures that the military always obeys the commands of the party",
    "he read the book because he was interested in world history",
]
GUIDE_REFERENCES = [
    [
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the"
        " command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ],
    ["he was interested in world history because he read the book"],
]


def test_bleu_of_the_papers_example():
    """As published, in float64: 1e-12."""
    published = {1: 0.5045666840058485, 2: 0.5920778868801042}
    for count, expected in published.items():
        found = bleu(GUIDE[:count], GUIDE_REFERENCES[:count], split=str.split)
        assert found == pytest.approx(expected, rel=1e-12)


def test_precision_is_clipped_by_the_reference_with_the_most():
    """Papineni et al. 2002, section 2.1, example 2: 2/7."""
    references = [["the cat is on the mat", "there is a cat on the mat"]]
    assert bleu(["the the the the the the the"], references, 1) == pytest.approx(2 / 7, rel=1e-12)


def test_brevity_is_of_the_closest_reference_and_of_two_the_shorter():
    references = [["a b c d e f g h", "a b c d", "a b c d e f g h i j k l m"]]
    assert bleu(["a b c d e f"], references) == 1.0  # 4 and 8 are as close
    assert bleu(["a b c d e f g"], references) == pytest.approx(math.exp(1 - 8 / 7), rel=1e-12)
    assert bleu(["a b c d e f g h i"], references) == 1.0


def test_no_common_ngram_is_zero():
    assert bleu(["a b c"], [["a b c"]]) == 0.0  # no four words
    assert bleu(["a b c d e"], [["a b c x d e"]]) == 0.0
    assert bleu([""], [["a"]]) == 0.0


# Of the README of aac-metrics 0.4.6, which takes them from COCO's evaluation.
AUDIO = ["a man is speaking", "rain falls"]
AUDIO_REFERENCES = [
    [
        "a man speaks.",
        "someone speaks.",
        "a man is speaking while a bird is chirping in the background",
    ],
    ["rain is falling hard on a surface"],
]


def test_scores_of_a_published_example():
    """To the four digits that are printed: 5e-5."""
    mean, scores = cider_d(AUDIO, AUDIO_REFERENCES)
    assert mean == pytest.approx(0.9614, abs=5e-5)
    np.testing.assert_allclose(scores, [1.3641, 0.5587], atol=5e-5)
    assert bleu(AUDIO, AUDIO_REFERENCES, 1) == pytest.approx(0.4278, abs=5e-5)


VOCABULARY = ["a", "the", *(f"{noun}{number}" for noun in ("dog", "ball") for number in range(5))]


def random_captions(num_images, seed=0):
    """Captions with repeated words, and one to five references each."""
    rng = np.random.default_rng(seed)

    def sentence():
        length = rng.integers(1, 14)
        return " ".join(rng.choice(VOCABULARY, length, p=[0.2, 0.2, *[0.06] * 10]))

    references = [[sentence() for _ in range(rng.integers(1, 6))] for _ in range(num_images)]
    captions = [" ".join([*texts[0].split()[:6], *sentence().split()[:3]]) for texts in references]
    return captions, references


def cider_by_arrays(captions, references):
    """Equations 1 to 3 and 7 of arXiv 1411.5726, with a dense vector over all n-grams."""
    total = np.zeros(len(captions))
    for order in (1, 2, 3, 4):

        def ngrams(text, order=order):
            words = text.split()
            return [" ".join(words[i : i + order]) for i in range(len(words) - order + 1)]

        everything = sorted(
            {g for texts in [captions, *references] for t in texts for g in ngrams(t)}
        )
        place = {ngram: i for i, ngram in enumerate(everything)}

        def vector(text, place=place, ngrams=ngrams):
            counts = Counter(ngrams(text))
            dense = np.zeros(len(place))
            dense[[place[it] for it in counts]] = list(counts.values())
            return dense

        occurs = np.array([sum(vector(text) for text in texts) > 0 for texts in references])
        weight = np.log(len(captions) / np.maximum(occurs.sum(0), 1))
        for row, (caption, texts) in enumerate(zip(captions, references, strict=True)):
            c = vector(caption) * weight
            for text in texts:
                s = vector(text) * weight
                norm = np.linalg.norm(c) * np.linalg.norm(s)
                if norm:
                    penalty = np.exp(-((len(caption.split()) - len(text.split())) ** 2) / 72)
                    total[row] += penalty * (np.minimum(c, s) @ s) / norm / len(texts)
    return 10 * total / 4


def test_cider_is_that_of_the_equations():
    """In float64, with sums in another order: 1e-10."""
    captions, references = random_captions(40)
    mean, scores = cider_d(captions, references)
    np.testing.assert_allclose(scores, cider_by_arrays(captions, references), rtol=1e-10)
    assert mean == pytest.approx(scores.mean(), rel=1e-12)
    assert 0.1 < mean < 10


def test_a_caption_that_is_its_only_reference_scores_ten():
    captions = ["a cat sits on a mat", "two dogs run along the beach", "a cat sits on a mat, there"]
    mean, scores = cider_d(captions, [[text] for text in captions])
    np.testing.assert_allclose(scores, 10, rtol=1e-12)
    assert bleu(captions, [[text] for text in captions]) == 1.0
    assert cider_d(["", "x"], [["a"], ["b"]])[0] == 0.0
    assert mean == pytest.approx(10, rel=1e-12)


def test_words_that_all_images_have_weigh_nothing():
    references = [["the cat"], ["the dog"], ["the sea"]]
    _, scores = cider_d(["the", "a dog", "sea"], references, max_order=1)
    np.testing.assert_allclose(scores[0], 0.0, atol=1e-12)
    assert scores[1] > 0 and scores[2] > scores[1]


def test_longer_captions_are_penalised():
    references = [["a cat on a mat"], ["dogs on the beach"]]
    scores = [
        cider_d(["cat" + " cat" * extra, "dogs"], references, max_order=1)[1][0]
        for extra in (3, 9, 15)
    ]
    # Of 4, 10 and 16 words the reference has one, and 5 words.
    penalty = np.exp(-(np.array([1, 5, 11]) ** 2) / 72)
    np.testing.assert_allclose(scores / scores[0], penalty / penalty[0] * [1, 4 / 10, 4 / 16])


def test_what_can_not_be_scored_is_refused():
    for score in (bleu, cider_d):
        with pytest.raises(UserError, match=r"^0 captions can't be compared with 0 lists"):
            score([], [])
        with pytest.raises(UserError, match=r"^2 captions can't be compared with 1 lists"):
            score(["a", "b"], [["a"]])
        for bad in ("a text", []):
            with pytest.raises(
                UserError, match=r"^the references of caption 1 are .*; give a list"
            ):
                score(["a", "b"], [["a"], bad])
    with pytest.raises(UserError, match=r"^CIDEr-D of 1 caption is not defined"):
        cider_d(["a"], [["a"]])
