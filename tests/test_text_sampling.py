"""How text tokens are chosen: against NumPy, by frequency; beam search against all texts there are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_documents as made
import tiny

from cfjax import document_sampling
from cfjax.beam_search import search_text
from cfjax.document_sampling import NO_TOKEN, Writing
from cfjax.errors import UserError
from cfjax.rng import per_example_keys, stream_key
from cfjax.text_sampling import TextSampling, choose_token, keep_most_probable

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 12)).astype(np.float32)


def kept_probabilities(logits, temperature, top_k, top_p):
    """Of one row, float64, by the definitions."""
    probabilities = np.exp(np.float64(logits) / temperature)
    order = np.argsort(-probabilities)
    if top_k:
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    total = 0.0
    for index in order:
        if total >= top_p:
            probabilities[index] = 0
        total += probabilities[index]
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.7, 4, 1.0), (1.0, 0, 0.6), (1.3, 5, 0.7), (1.0, 50, 0.01)],
)
def test_tokens_are_drawn_as_often_as_they_are_probable(temperature, top_k, top_p):
    settings = TextSampling(8, temperature, top_k, top_p)
    count = 20_000
    keys = jax.random.split(jax.random.key(1), count)
    for logits in LOGITS[:2]:
        rows = jnp.broadcast_to(logits, (count, len(logits)))
        drawn = np.bincount(
            jax.jit(choose_token, static_argnums=0)(settings, rows, keys), minlength=12
        )
        expected = kept_probabilities(logits, temperature, top_k, top_p)
        assert (drawn[expected == 0] == 0).all()
        # Five standard deviations of a share at most.
        np.testing.assert_allclose(drawn / count, expected, atol=5 * 0.5 / count**0.5)


def test_most_probable():
    greedy = choose_token(TextSampling(8, 0.0), LOGITS, jax.random.split(jax.random.key(0), 5))
    assert greedy.tolist() == LOGITS.argmax(-1).tolist()
    kept = np.asarray(keep_most_probable(jnp.asarray(LOGITS), 3, 1.0))
    assert ((kept > -1e29).sum(-1) == 3).all()
    for top_k, top_p in ((0, 0.5), (4, 0.8)):
        kept = np.asarray(keep_most_probable(jnp.asarray(LOGITS), top_k, top_p))
        expected = [kept_probabilities(row, 1.0, top_k, top_p) > 0 for row in LOGITS]
        np.testing.assert_array_equal(kept > -1e29, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 0}, "must be at least 1"),
        ({"num_beams": 0}, "must be at least 1"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"guidance_scale": 0.9}, "guidance_scale of text is 0.9, but must be at least 1"),
        ({"top_p": 0.0}, r"must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"must be in \(0, 1\]"),
        ({"num_beams": 2, "temperature": 1.0}, "beam search draws nothing"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        TextSampling(**{"max_length": 8} | options)


# Of few letters, so that all texts can be scored.
LETTERS = 3
VOCABULARY = type(made.VOCABULARY)(LETTERS)
MODEL = made.model(vocabulary_size=VOCABULARY.size)
MAX_LENGTH = 3


@functools.cache
def params():
    return jax.tree.map(jnp.asarray, tiny.random_params(MODEL))


def begun(prompts):
    """The state after prompts of ids, each after `end_of_text`."""
    networks = (MODEL, params(), None, None)
    state = document_sampling.begin(*networks, len(prompts), 1, 24)
    ids = jnp.array([[VOCABULARY.end_of_text, *prompt] for prompt in prompts], jnp.int32)
    never = jnp.zeros(len(ids), bool)
    return document_sampling.push_text(*networks, state, ids, jnp.ones(ids.shape, bool), never)


PROMPTS = ((0, 1), (2, 2), (1, 0))


@functools.cache
def all_texts():
    """Every text that can be, with its end if it is not full: `{prompt: [(ids, log-probability)]}`."""
    ends = (VOCABULARY.end_of_text, VOCABULARY.begin_of_image)
    whole = [
        (*letters, *end)
        for length in range(MAX_LENGTH + 1)
        for letters in itertools.product(range(LETTERS), repeat=length)
        for end in ([()] if length == MAX_LENGTH else [(it,) for it in ends])
    ]
    padded = np.array([(*text, *[0] * (MAX_LENGTH - len(text))) for text in whole])
    scored = {}
    for prompt in PROMPTS:
        head = [VOCABULARY.end_of_text, *prompt]
        ids = jnp.array([[*head, *text] for text in padded], jnp.int32)
        cache = MODEL.apply({"params": params()}, len(ids), 24, method=MODEL.empty_document_cache)
        _, logits = MODEL.apply(
            {"params": params()}, cache, ids, jnp.ones(ids.shape, bool), method=MODEL.push_text
        )
        logits = np.array(logits, np.float64)
        logits[..., VOCABULARY.end_of_image] = -np.inf
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scored[prompt] = [
            (text, sum(log_p[row, len(head) - 1 + i, it] for i, it in enumerate(text)))
            for row, text in enumerate(whole)
        ]
    return scored


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beam_search_finds_the_best_of_all_texts(length_penalty):
    """With as many beams as there are texts nothing is lost; all are found in their order."""
    num_texts = len(all_texts()[PROMPTS[0]])
    settings = TextSampling(MAX_LENGTH, num_beams=num_texts, length_penalty=length_penalty)
    beams = jax.device_get(search_text(MODEL, params(), begun(PROMPTS), settings, VOCABULARY))
    for row, prompt in enumerate(PROMPTS):
        ordered = sorted(
            all_texts()[prompt], key=lambda it: -it[1] / max(len(it[0]), 1) ** length_penalty
        )
        for beam, (text, log_probability) in enumerate(ordered[:10]):
            letters = [it for it in text if it < LETTERS]
            tokens = beams.tokens[row, beam]
            assert tokens[tokens != NO_TOKEN].tolist() == letters
            # float32 sums of a few logits.
            np.testing.assert_allclose(
                beams.log_probability[row, beam], log_probability, rtol=1e-4, atol=1e-4
            )
            assert beams.length[row, beam] == len(text)


@functools.cache
def log_probabilities(head):
    """Of what follows `head` and then each text that can be; all that ends a text is one."""
    texts = list(itertools.product(range(LETTERS), repeat=MAX_LENGTH))
    ids = jnp.array([[VOCABULARY.end_of_text, *head, *text] for text in texts], jnp.int32)
    cache = MODEL.apply({"params": params()}, len(ids), 24, method=MODEL.empty_document_cache)
    _, logits = MODEL.apply(
        {"params": params()}, cache, ids, jnp.ones(ids.shape, bool), method=MODEL.push_text
    )
    p = np.exp(np.array(logits[:, len(head) :], np.float64))
    p = np.concatenate(
        [
            p[..., :LETTERS],
            p[..., [VOCABULARY.end_of_text, VOCABULARY.begin_of_image]].sum(-1, keepdims=True),
        ],
        axis=-1,
    )
    return texts, np.log(p / p.sum(-1, keepdims=True))


def test_guided_beams_find_the_best_of_all_texts():
    scale, num_texts = 2.0, sum(LETTERS**length for length in range(MAX_LENGTH + 1))
    networks = (MODEL, params(), None, None)
    state = document_sampling.begin(*networks, len(PROMPTS), 2, 24)
    ids = [[[VOCABULARY.end_of_text, *it], [VOCABULARY.end_of_text, 0, 0]] for it in PROMPTS]
    is_real = jnp.array([[True] * 3, [True, False, False]] * len(PROMPTS))
    state = document_sampling.push_text(
        *(*networks, state, jnp.array(ids, jnp.int32).reshape(-1, 3), is_real),
        jnp.zeros(len(is_real), bool),
    )
    settings = TextSampling(MAX_LENGTH, num_beams=num_texts, guidance_scale=scale)
    beams = jax.device_get(search_text(MODEL, params(), state, settings, VOCABULARY))
    texts, alone = log_probabilities(())
    for row, prompt in enumerate(PROMPTS):
        _, of_prompt = log_probabilities(prompt)
        guided = alone + scale * (of_prompt - alone)
        guided -= np.log(np.exp(guided).sum(-1, keepdims=True))
        scored = {}
        for text, places in zip(texts, guided, strict=True):
            for length in range(MAX_LENGTH + 1):
                total = sum(places[i, text[i]] for i in range(length))
                has_end = length < MAX_LENGTH
                total += places[length, -1] if has_end else 0
                scored[text[:length]] = total / (length + has_end)
        ordered = sorted(scored, key=scored.get, reverse=True)
        for beam, text in enumerate(ordered[:10]):
            tokens = beams.tokens[row, beam]
            assert tuple(tokens[tokens != NO_TOKEN].tolist()) == text
            score = beams.log_probability[row, beam] / beams.length[row, beam]
            np.testing.assert_allclose(score, scored[text], rtol=1e-4, atol=1e-4)


def test_beams_of_any_number_hold_texts_that_are_and_one_is_greedy():
    of_prompts = all_texts()
    for num_beams in (1, 2, 4):
        settings = TextSampling(MAX_LENGTH, num_beams=num_beams)
        beams = jax.device_get(search_text(MODEL, params(), begun(PROMPTS), settings, VOCABULARY))
        for row, prompt in enumerate(PROMPTS):
            scores = beams.log_probability[row] / np.maximum(beams.length[row], 1)
            assert (np.diff(scores) <= 0).all()
            best = max(score / len(text) for text, score in of_prompts[prompt])
            assert scores[0] <= best + 1e-4
        if num_beams == 1:
            settings = TextSampling(MAX_LENGTH)
            keys = per_example_keys(stream_key(0, "sample"), jnp.arange(3, dtype=jnp.uint32))
            writing = Writing(jnp.zeros(3, bool), jnp.int32(0))
            _, _, tokens = document_sampling.generate_text(
                *(MODEL, params(), None, None, begun(PROMPTS), settings, VOCABULARY),
                *(MAX_LENGTH, writing, keys),
            )
            np.testing.assert_array_equal(beams.tokens[:, 0], tokens)
