"""Generation in documents: against model calls by hand, independence, rolling caches, refusals.

Longer than most files: all tests share one tiny sampler and its calls by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_documents

from cfjax import build, document_sampling, sampling, sharding
from cfjax.data.images import to_uint8
from cfjax.document_parts import as_documents
from cfjax.document_sampler import DocumentSampler
from cfjax.document_stream import DocumentStream, StreamOptions
from cfjax.documents import ClassSegment, ImageSegment, TextSegment
from cfjax.errors import UserError
from cfjax.guided_network import Network
from cfjax.models.patches import unpatchify
from cfjax.rng import per_example_keys, stream_key
from cfjax.sampler import Sampler

SIZE = (16, 16, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, *SIZE)).astype(np.uint8)
PROMPTS = [
    ["a red three"],
    [IMAGES[0]],
    ["five", IMAGES[1]],
    [],
    ["a blue seven left of a green one"],
    [IMAGES[2], "that is", IMAGES[3]],
    [IMAGES[4]],
    ["a"],
]


@functools.cache
def sampler(num_devices=1, **overrides):
    """Two documents a device at a time; parameters are random."""
    config = tiny_documents.config(**{"sampling__images_per_device": 2} | overrides)
    model = build.sampling_model(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.tree.map(lambda x: jax.device_put(x, replicated), tiny.random_params(model))
    return DocumentSampler(config, model, params, mesh)


@pytest.fixture
def token_ids(monkeypatch):
    """Texts come as lists of ids: not all are the bytes of a text."""
    monkeypatch.setattr(
        DocumentStream,
        "_decoded",
        lambda self, tokens: [row[row != document_sampling.NO_TOKEN].tolist() for row in tokens],
    )


def applied(method, *args):
    of = sampler()
    return of.model.apply({"params": of.params}, *args, method=method)


def cache_after(*parts):
    """The cache of one document by hand, of ids and images, and the logits after the last ids."""
    of = sampler()
    cache, logits = applied("empty_document_cache", 1, 200), None
    for part in parts:
        if isinstance(part, list):
            ids = jnp.array([part], jnp.int32)
            cache, logits = applied("push_text", cache, ids, jnp.ones(ids.shape, bool))
            continue
        tokens = jnp.asarray(of.to_tokens(part[None]))
        embedded = applied("clean_image_tokens", tokens, jnp.arange(4)[None])
        cache = applied("extend", cache, embedded).after_segment(1)
    return cache, logits


END, BEGIN_IMAGE, END_IMAGE = 256, 257, 258
BY_HAND = [
    (["red"], [[END, *b"red", BEGIN_IMAGE]]),
    ([], [[END, BEGIN_IMAGE]]),
    ([IMAGES[0]], [[END, BEGIN_IMAGE], IMAGES[0], [END_IMAGE, BEGIN_IMAGE]]),
    (["a", IMAGES[0]], [[END, *b"a", BEGIN_IMAGE], IMAGES[0], [END_IMAGE, BEGIN_IMAGE]]),
    ([IMAGES[0], "a"], [[END, BEGIN_IMAGE], IMAGES[0], [END_IMAGE, *b"a", BEGIN_IMAGE]]),
]
UNGUIDED, GUIDED = 1.0, 2.5
IMAGES_BY_HAND = [
    *((*BY_HAND[index], scale) for index, scale in [(0, UNGUIDED), (0, GUIDED), (4, GUIDED)]),
    *(pytest.param(*it, UNGUIDED, marks=pytest.mark.long) for it in BY_HAND[1:]),
    *(pytest.param(*it, GUIDED, marks=pytest.mark.long) for it in BY_HAND[1:4]),
]


@pytest.mark.parametrize(("prompt", "by_hand", "scale"), IMAGES_BY_HAND)
def test_an_image_is_the_guided_prediction_by_hand(prompt, by_hand, scale):
    """After one denoising step it is the predicted x_0; what guides has the empty prompt."""
    of, index = sampler(), 3
    overrides = {"denoising_steps": 1, "clip_x_start": False, "guidance_scale": scale}
    settings = of.settings(overrides)
    keys = per_example_keys(stream_key(5, "sample"), jnp.array([index], jnp.uint32))
    order, noise, _ = sampling.draw_noise(of.model, settings, keys)
    t = jnp.asarray(settings.schedules[0].timestep_map)

    def predicted(cache):
        x_t = jnp.take_along_axis(noise, order[..., None], axis=1)
        prediction = applied("denoise", cache, x_t, t, order)
        return np.take_along_axis(prediction, np.argsort(order, axis=1)[..., None], axis=1)

    stronger, weaker = (predicted(cache_after(*it)[0]) for it in (by_hand, BY_HAND[1][1]))
    tokens = weaker + scale * (stronger - weaker)
    expected = to_uint8(np.asarray(unpatchify(tokens, 8, of.model.grid)))
    found = of.generate(prompt=prompt, seed=5, first_index=index, **overrides)
    # Sums in another order move a pixel over the edge between two grey levels, seldom.
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02
    assert ((found > 0) & (found < 255)).mean() > 0.3


TEXTS_BY_HAND = [
    (["red"], [[END, *b"red"]]),
    ([IMAGES[0]], [[END, BEGIN_IMAGE], IMAGES[0], [END_IMAGE]]),
    (["a", IMAGES[1]], [[END, *b"a", BEGIN_IMAGE], IMAGES[1], [END_IMAGE]]),
    ([], [[END]]),
]


@pytest.mark.parametrize(("prompt", "by_hand"), TEXTS_BY_HAND)
def test_greedy_text_is_the_most_probable_by_hand(token_ids, prompt, by_hand):
    """All logits of the finished text at once; it ends before a token of our own, or when it is full."""
    (ids,) = sampler().generate(prompt=prompt, what="text", max_length=20)
    *before, last = by_hand
    ids_padded = (ids + [0] * 20)[:20]  # one shape
    _, logits = cache_after(*before, last + ids_padded)
    logits = np.array(logits[0, len(last) - 1 :])
    logits[:, END_IMAGE] = -np.inf
    chosen = logits.argmax(-1).tolist()
    assert chosen[: len(ids)] == ids and max(ids, default=0) < END
    assert len(ids) == 20 or chosen[len(ids)] in (END, BEGIN_IMAGE)


def log_probabilities_by_hand(*parts, num_ids):
    """Of what follows the text at each of its places, with all that ends it as one."""
    _, logits = cache_after(*parts)
    logits = np.array(logits[0, -num_ids:], np.float64)
    logits[:, END] = np.logaddexp(logits[:, END], logits[:, BEGIN_IMAGE])
    logits = logits[:, :BEGIN_IMAGE]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(("prompt", "by_hand"), TEXTS_BY_HAND)
def test_guided_text_is_the_most_probable_against_the_text_alone_by_hand(
    token_ids, prompt, by_hand
):
    (ids,) = sampler().generate(prompt=prompt, what="text", max_length=20, guidance_scale=3.0)
    *before, last = by_hand
    ids_padded = (ids + [0] * 20)[:20]  # one shape
    of_prompt = log_probabilities_by_hand(*before, last + ids_padded, num_ids=21)
    alone = log_probabilities_by_hand([END, *ids_padded], num_ids=21)
    chosen = (alone + 3 * (of_prompt - alone)).argmax(-1).tolist()
    assert chosen[: len(ids)] == ids
    assert len(ids) == 20 or chosen[len(ids)] == END
    if prompt:
        assert [ids] != sampler().generate(prompt=prompt, what="text", max_length=20)


@pytest.mark.parametrize("num_beams", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_guided_text_after_another(token_ids, num_beams):
    """It is guided by itself alone, not by the text before it, and makes no other text of the first."""
    of = sampler()
    options = {"guidance_scale": 3.0, "max_length": 5, "num_beams": num_beams}
    prompt, text = as_documents([IMAGES[0]]), of.text_sampling(options)
    ((first, second),) = of.continue_documents(prompt, [("text", "text")], None, text)
    assert [[first]] == of.continue_documents(prompt, [("text",)], None, text)
    with sharding.activate(of.mesh):
        options = StreamOptions(None, text, 0, 0)
        stream = DocumentStream(of, prompt * 2, ("text",), np.arange(2), options)
        stream.push([prompt[0][0]] * 2)
        ids = np.array([[END_IMAGE, *first]] * 2)
        stream._push_ids(ids, np.ones(ids.shape, bool))
        stream._before = "text"
        assert stream.generate("text", None, True)[0] == second


def test_texts_end_before_tokens_of_ours_and_not_all_at_once(token_ids):
    """Of many drawn ones; each is at most max_length long."""
    prompts = [[it] for it in np.repeat(IMAGES, 3, axis=0)]
    texts = sampler().generate(prompt=prompts, what="text", max_length=30, temperature=3.0, seed=1)
    lengths = {len(ids) for ids in texts}
    assert len(lengths) > 3 and max(lengths) == 30
    assert max(max(ids, default=0) for ids in texts) < END
    short = sampler().generate(prompt=prompts, what="text", max_length=7, temperature=3.0, seed=1)
    assert short == [ids[:7] for ids in texts]


def test_a_document_depends_on_its_index_and_prompt_alone():
    """To the byte, in another batch, alone, and on two devices; another group rounds otherwise."""
    of = sampler()
    images = of.generate(prompt=PROMPTS, seed=2, first_index=1)
    texts = of.generate(prompt=PROMPTS, what="text", temperature=1.0, seed=2, max_length=20)
    for index in (0, 2, 5):
        alone = of.generate(prompt=PROMPTS[index], seed=2, first_index=1 + index)
        np.testing.assert_array_equal(alone[0], images[index])
    for begin, end in ((1, 4), (4, 8)):
        options = {"what": "text", "temperature": 1.0, "seed": 2, "max_length": 20}
        assert (
            of.generate(prompt=PROMPTS[begin:end], first_index=begin, **options)
            == (texts[begin:end])
        )
    batches = list(
        of.stream_documents(
            as_documents(PROMPTS), of.settings({}), seed=2, first_index=1, batch_size=3
        )
    )
    assert [len(it) for it in batches] == [3, 4, 1]
    np.testing.assert_array_equal(np.concatenate(batches)[:, 0], images)
    assert (of.generate(prompt=PROMPTS[:1], seed=2) != images[:1]).any()
    assert (of.generate(prompt=["a red four"], seed=2, first_index=1) != images[:1]).any()


@pytest.mark.long
@pytest.mark.slow
def test_devices_and_images_per_device():
    images = sampler().generate(prompt=PROMPTS, seed=2, n=2)
    np.testing.assert_array_equal(sampler(2).generate(prompt=PROMPTS, seed=2, n=2), images)
    other = sampler(sampling__images_per_device=3).generate(prompt=PROMPTS, seed=2, n=2)
    difference = np.abs(other.astype(int) - images)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_places_in_a_batch_are_those_of_the_index():
    of = sampler(2)
    groups = [(it.tolist(), own.tolist()) for it, own in of._groups(np.array([0, 2, 3]), 3)]
    assert groups == [
        ([0, 0, 0, 0], [False, False, False, True]),
        ([2, 2, 3, 2], [False, True, True, False]),
    ]


def total_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_document_ten_times_the_cache(monkeypatch):
    """One compilation a program, constant memory, and its beginning is that of a shorter document.

    No image loses tokens of its own where an AR step begins the ring anew.
    """
    of, held = sampler(model__patch_size=4), []
    capacities = []
    begin = document_sampling.begin
    monkeypatch.setattr(
        document_sampling, "begin", lambda *args: capacities.append(args[-1]) or begin(*args)
    )
    generate = DocumentStream.generate

    def checked(self, *args):
        held.append(total_bytes())
        image = generate(self, *args)
        cache = self._state.caches.main
        is_own = cache.is_filled & (cache.segment_of_slot == cache.segment - 1)[None]
        assert is_own.sum(1).tolist() == [16] * len(is_own)
        return image

    monkeypatch.setattr(DocumentStream, "generate", checked)
    programs = (document_sampling.push_text, document_sampling.generate_image)
    options = {"prompt": [IMAGES[0]], "context_tokens": 1, "split_sizes": (1, 15)}
    options |= {"denoising_steps": 1}
    short = of.generate(**options, n=4)
    sizes = [program._cache_size() for program in programs]
    capacity = capacities[-1]
    n = -(-10 * capacity // 18)  # of 16 tokens, and the two that announce it
    whole = of.generate(**options, n=n)
    assert [program._cache_size() for program in programs] == sizes
    assert set(capacities) == {capacity} and whole.shape == (1, n, *SIZE)
    np.testing.assert_array_equal(whole[:, :4], short)
    assert len({image.tobytes() for image in whole[0]}) == n
    assert len(set(held[-n + 2 :])) == 1


def test_a_class_in_a_prompt():
    """Of a model of both, and against the model of images alone, which has no text before."""
    of = sampler(data__num_classes=3, model__num_condition_tokens=6)
    options = {"seed": 4, "denoising_steps": 2, "guidance_scale": 1.5, "num_ar_steps": 4}
    images = of.generate(prompt=[[2], [0]], **options)
    alone = Sampler(of.config, of.model, of.params, of.mesh).generate([2, 0], **options)
    np.testing.assert_array_equal(of.generate([2, 0], **options), alone)
    assert np.abs(images.astype(int) - alone).max() <= 1
    narrow = of.generate(prompt=[[2], [0]], context_tokens=1, **options)  # the class is remembered
    assert np.abs(narrow.astype(int) - images).max() <= 1
    after_image = of.generate(prompt=[[IMAGES[0], 2]], **options)
    assert (after_image != of.generate(prompt=[[IMAGES[0], 1]], **options)).any()
    assert (after_image != images[:1]).any()


@pytest.mark.parametrize(
    ("num_beams", "scale_of_text", "scale"),
    [(2, 3, 2)]
    + [
        pytest.param(*it, marks=pytest.mark.long)
        for it in [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 2)]
    ],
)
def test_an_image_after_a_text_that_is_generated(token_ids, num_beams, scale_of_text, scale):
    """It follows that text, and does not depend on how long those of other documents are.

    Nor on whether the text was guided: what guides the image has no text.
    """
    of = sampler()
    settings = of.settings({"denoising_steps": 2, "guidance_scale": scale})
    drawn = {"temperature": 2.0} if num_beams == 1 else {}
    options = {"num_beams": num_beams, "max_length": 40} | drawn
    text = of.text_sampling(options | {"guidance_scale": scale_of_text})
    prompts = as_documents([["red"], ["a seven"]])
    follow = [("text", "image")] * 2
    both = of.continue_documents(prompts, follow, settings, text, seed=1)
    for index in range(2):
        (alone,) = of.continue_documents(
            prompts[index : index + 1], follow[:1], settings, text, 1, index
        )
        assert alone[0] == both[index][0]
        np.testing.assert_array_equal(alone[1], both[index][1])

    with sharding.activate(of.mesh):
        options = StreamOptions(settings, of.text_sampling(options), 1, 0)
        stream = DocumentStream(of, prompts, follow[0], np.arange(2), options)
        stream.push([prompt[0] for prompt in prompts])
        ids, is_real = np.zeros((2, 40), np.int32), np.zeros((2, 40), bool)
        for row, (written, _) in enumerate(both):
            ids[row, : len(written)], is_real[row, : len(written)] = written, True
        stream._push_ids(ids, is_real)
        stream._num_generated = 1
        expected = stream.generate("image", None, True)
    found = np.stack([image for _, image in both])
    assert np.abs(found.astype(int) - expected).max() <= 1  # other shapes round otherwise


def test_a_long_sequence_after_a_text_that_is_generated(token_ids):
    """What is forgotten does not depend on how long the texts of other documents are."""
    of = sampler()
    settings = of.settings({"denoising_steps": 1, "guidance_scale": 1.0})
    text = of.text_sampling({"temperature": 2.0, "max_length": 64})
    prompts = as_documents([[it] for it in IMAGES])
    follow = [("text", *["image"] * 24)] * len(prompts)
    options = (settings, text, 3)
    made = of.continue_documents(prompts, follow, *options, context_tokens=1)
    lengths = [len(parts[0]) for parts in made]
    index = int(np.argmin(lengths))
    assert lengths[index] <= 16 < lengths[index ^ 1]  # they are made together
    (alone,) = of.continue_documents(
        prompts[index : index + 1], follow[:1], *options, index, context_tokens=1
    )
    assert alone[0] == made[index][0]
    np.testing.assert_array_equal(np.stack(alone[1:]), np.stack(made[index][1:]))


def test_edits_keep_and_heed_captions():
    of = sampler()
    captions = ["a red three", "", "a blue seven"]
    edited = of.edit(IMAGES[:3], captions, keep="left", num_ar_steps=2, seed=3)
    np.testing.assert_array_equal(edited[:, :, :8], IMAGES[:3, :, :8])
    assert (edited[:, :, 8:] != IMAGES[:3, :, 8:]).any(axis=(1, 2, 3)).all()
    other = of.edit(IMAGES[:3], ["b", "", "c"], keep="left", num_ar_steps=2, seed=3)
    assert (edited != other).any(axis=(1, 2, 3)).tolist() == [True, False, True]
    last = of.edit(IMAGES[2:3], captions[2:], "left", num_ar_steps=2, seed=3, first_index=2)
    np.testing.assert_array_equal(last, edited[2:])
    everything = np.ones(SIZE[:2], bool)
    np.testing.assert_array_equal(of.edit(IMAGES[:3], captions, everything), IMAGES[:3])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "there is nothing to generate from"),
        ({"prompt": "a", "labels": [0]}, "both labels and a prompt"),
        ({"labels": [0]}, "the model has no classes"),
        ({"prompt": "a" * 65}, "has 65 tokens, but text.max_length is 64"),
        ({"prompt": [IMAGES[0, :8]]}, "is uint8 [8, 16, 3], but must be uint8 [16, 16, 3]"),
        ({"prompt": [IMAGES[0] / 255.0]}, "is float64 [16, 16, 3]"),
        ({"prompt": [0]}, "the model has no classes"),
        ({"prompt": [None]}, "a part of the prompt is NoneType"),
        ({"prompt": "a", "n": 0}, "n is 0, but must be at least 1"),
        ({"prompt": "a", "n": 2, "what": "text"}, "n is 2"),
        ({"prompt": "a", "what": "sound"}, "unknown what 'sound'"),
        ({"prompt": "a", "what": "text", "max_length": 65}, "max_length is 65, but the model"),
        ({"prompt": "a", "what": "text", "solver": "ddim"}, "unknown text option 'solver'"),
        ({"prompt": "a", "top_k": 3}, "unknown sampling option 'top_k'"),
    ],
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(UserError) as error:
        sampler().generate(**options)
    assert words in str(error.value)


def test_guidance_of_texts_is_refused_where_it_knows_nothing():
    options = {"prompt": [IMAGES[0]], "what": "text", "guidance_scale": 2.0}
    with pytest.raises(UserError, match="was not trained on texts with nothing before them"):
        sampler(data__image_to_text_share=1.0).generate(**options)
    of = sampler()
    guide = Network(of.model, of.params)
    guided = DocumentSampler(of.config, of.model, of.params, of.mesh, guide=guide)
    with pytest.raises(
        UserError, match="the guide of images can't go with a guidance_scale of text"
    ):
        guided.generate(**options)


def test_other_refusals():
    with pytest.raises(UserError, match="there is no image"):
        sampler().caption(IMAGES[:0])
    with pytest.raises(UserError, match="there are 1 captions for 2 images"):
        sampler().edit(IMAGES[:2], ["a"], "top")
    of = sampler(data__num_classes=3)
    with pytest.raises(UserError, match="class 1 in the prompt has no image after it"):
        of.generate(prompt=[1, "a"])
    with pytest.raises(UserError, match="class 4 is out of range"):
        of.generate(prompt=[4])


def test_prompts_as_documents():
    segments = (TextSegment("a"), ImageSegment(IMAGES[0]), ClassSegment(2))
    assert as_documents("a") == [segments[:1]] == as_documents(["a"]) == as_documents([["a"]])
    assert as_documents([]) == as_documents("") == as_documents([""]) == [()]
    assert as_documents([["a", ""], [], 2]) == [segments[:1], (), segments[2:]]
    ((text, image, label),) = as_documents(["a", IMAGES[0], np.int64(2)])
    assert (text, label) == (segments[0], segments[2])
    np.testing.assert_array_equal(image.pixels, IMAGES[0])
    assert as_documents(np.int64(2)) == as_documents([2]) == [segments[2:]]
