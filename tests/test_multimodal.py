"""The model of documents: single images to the bit, plain language models, causality by gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_documents as made
import tiny
from flax.traverse_util import flatten_dict
from quick_jit import quick_jit

from cfjax.documents import ClassSegment, ImageSegment, Slots, TextSegment
from cfjax.errors import UserError
from cfjax.models.causal_fusion import CausalFusion

IMAGE = ImageSegment(np.zeros(made.IMAGE_SHAPE, np.uint8))


def single_image_model(model):
    names = CausalFusion.__dataclass_fields__.keys() - {"parent", "name"}
    return CausalFusion(**{name: getattr(model, name) for name in names})


@pytest.fixture(scope="module")
def model():
    return made.model()


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(jnp.asarray, tiny.random_params(model))


def test_text_adds_parameters_and_changes_none():
    key = jax.random.key(3)

    def init(model):
        from cfjax import build

        return flatten_dict(jax.device_get(jax.jit(build.init_params(model))(key)), sep="/")

    def unboxed(params):
        return {name: getattr(it, "value", it) for name, it in params.items()}

    with_text = unboxed(init(made.model(has_tied_head=False)))
    alone = unboxed(init(single_image_model(made.model())))
    assert {name.split("/")[0] for name in with_text.keys() - alone.keys()} == {
        "text_table",
        "text_norm",
        "text_head",
    }
    for name, it in alone.items():
        np.testing.assert_array_equal(it, with_text[name])


@pytest.mark.parametrize(
    ("attention", "copies"),
    [
        ("fused", 1),
        ("split", 2),
        pytest.param("fused", 2, marks=pytest.mark.long),
        pytest.param("split", 1, marks=pytest.mark.long),
    ],
)
def test_a_class_and_its_image_are_the_single_image_model(params, attention, copies):
    """To the bit, of the prediction and of every gradient."""
    rng = np.random.default_rng(0)
    documents = [[(ClassSegment(label), IMAGE)] for label in (3, 0, 4)]
    rows = [made.row(it, Slots(0, 1, True)) for it in documents]
    batch = {name: jnp.asarray(np.stack([it[name] for it in rows])) for name in rows[0]}
    inputs = made.images(rng, 3, 1, copies, made.NUM_TOKENS - 1)
    model = made.model(attention=attention)
    alone = single_image_model(model)
    direction = rng.normal(size=inputs[1].shape).astype(np.float32)

    def of_documents(params):
        apply = {"params": params}
        prediction, _ = model.apply(apply, made.of_batch(batch), *inputs, method=model.documents)
        return (prediction * direction).sum(), prediction

    def of_images(params):
        squeezed = (it[:, 0] for it in inputs)
        prediction = alone.apply({"params": params}, batch["label"][:, 0], *squeezed)
        return (prediction[:, None] * direction).sum(), prediction[:, None]

    def run(function):
        return jax.jit(jax.value_and_grad(function, has_aux=True))

    image_params = {name: it for name, it in params.items() if not name.startswith("text")}
    (_, prediction), gradients = run(of_documents)(params)
    (_, expected), expected_gradients = run(of_images)(image_params)
    np.testing.assert_array_equal(prediction, expected)
    flat, expected_flat = flatten_dict(gradients), flatten_dict(expected_gradients)
    for name, it in expected_flat.items():
        np.testing.assert_array_equal(flat[name], it, err_msg=str(name))


def test_a_class_and_its_image_in_any_row(model, params):
    """With slots that stay empty: the same within float32's rounding."""
    rng = np.random.default_rng(0)
    row = made.row([(ClassSegment(3), IMAGE)], Slots(4, 2, True))
    batch = {name: jnp.asarray(it[None]) for name, it in row.items()}
    inputs = made.images(rng, 1, 2)
    prediction, _ = model.apply(
        {"params": params}, made.of_batch(batch), *inputs, method=model.documents
    )
    image_params = {name: it for name, it in params.items() if not name.startswith("text")}
    alone = single_image_model(model)
    expected = alone.apply({"params": image_params}, jnp.array([3]), *(it[:, 0] for it in inputs))
    np.testing.assert_allclose(prediction[:, 0], expected, rtol=0, atol=2e-6)


def reference_language_model(params, ids):
    """A plain causal transformer over ids `[T]` in NumPy, written for the test: logits `[T, V]`."""

    def norm(x, of):
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * of["scale"] + of["bias"]

    def turned(x):  # [T, heads, E]
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
        pairs = x[..., :half] + 1j * x[..., half:]
        pairs = pairs * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["text_table"][ids]
    blocks = params["blocks"]
    for layer in range(len(blocks["mlp"]["fc1"]["bias"])):
        of = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        normed = norm(x, of["norm1"])
        q, k, v = np.einsum("td,dchf->cthf", normed, of["attn"]["qkv"]["kernel"])
        q = turned(norm(q, of["attn"]["q_norm"])) / np.sqrt(q.shape[-1])
        k = turned(norm(k, of["attn"]["k_norm"]))
        logits = np.einsum("qhf,khf->hqk", q, k)
        logits = np.where(np.tril(np.ones(logits.shape[1:], bool)), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khf->qhf", weights, v)
        projection = of["attn"]["proj"]
        x = x + np.einsum("qhf,hfd->qd", attended, projection["kernel"]) + projection["bias"]
        hidden = gelu(norm(x, of["norm2"]) @ of["mlp"]["fc1"]["kernel"] + of["mlp"]["fc1"]["bias"])
        x = x + hidden @ of["mlp"]["fc2"]["kernel"] + of["mlp"]["fc2"]["bias"]
    return norm(x, params["text_norm"]) @ params["text_table"].T


def test_text_alone_is_a_plain_causal_language_model(model, params):
    """Of two packed documents each; float32 against float64, so 1e-5 of the largest logit."""
    documents = [(TextSegment("abcdefgh"),), (TextSegment("kjih"),)]
    row = made.row(documents, Slots(20, 1))
    batch = {name: jnp.asarray(it[None]) for name, it in row.items()}
    inputs = made.images(np.random.default_rng(0), 1, 1)
    _, logits = model.apply(
        {"params": params}, made.of_batch(batch), *inputs, method=model.documents
    )
    begin = 0
    for document in documents:
        ids = np.array([item.token for item in made.items(document)])
        expected = reference_language_model(params, ids)
        found = np.asarray(logits[0, begin : begin + len(ids)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        begin += len(ids)


def test_causality_by_gradient(model, params):
    """No output depends on anything after it, across modalities and documents."""
    rng = np.random.default_rng(1)
    documents = [
        (TextSegment("ab"), IMAGE, TextSegment("cd"), IMAGE),
        (IMAGE, TextSegment("ef")),
    ]
    row = made.row(documents, Slots(18, 3))
    batch = {name: jnp.asarray(it[None]) for name, it in row.items()}
    clean, noised, t, order, ids = made.images(rng, 1, 3)
    num_text = batch["text_ids"].shape[1]
    offsets = jnp.zeros((1, num_text, model.width))

    def outputs(offsets, clean, noised):
        def run(module, *inputs):
            of_text = module.text_tokens
            module_text = lambda it: of_text(it) + offsets  # noqa: E731
            object.__setattr__(module, "text_tokens", module_text)
            return module.documents(made.of_batch(batch), *inputs)

        prediction, logits = model.apply(
            {"params": params}, clean, noised, t, order, ids, method=run
        )
        return prediction.sum(-1)[0, :, 0], logits.sum(-1)[0]

    jacobian = quick_jit(jax.jacrev(outputs, argnums=(0, 1, 2)))(offsets, clean, noised)
    (of_image, of_text) = jax.tree.map(
        lambda it: np.asarray(jnp.abs(it)), jacobian, is_leaf=lambda it: isinstance(it, jax.Array)
    )
    rank = np.asarray(batch["image_places"][0])[:, None] * 100 + np.asarray(ids[0])
    text_rank = np.asarray(batch["text_places"][0]) * 100
    document_of_image = np.asarray(batch["image_begins"][0])
    document_of_text = np.asarray(batch["text_begins"][0])
    filled = text_rank >= 0

    image_by_text = of_image[0].sum(-1)[:, :, 0]  # [I, L, N]
    image_by_clean = of_image[1].sum(-1)[:, :, 0]  # [I, L, I, L]
    image_by_noised = of_image[2].sum(-1)[:, :, 0, :, 0]
    text_by_text = of_text[0].sum(-1)[:, 0]
    text_by_clean = of_text[1].sum(-1)[:, 0]  # [N, I, L]
    text_by_noised = of_text[2].sum(-1)

    def check(found, expected):
        np.testing.assert_array_equal(found > 0, expected)

    same = document_of_image[:, None] == document_of_text[None]
    check(
        image_by_text[..., filled],
        ((text_rank[None, None] < rank[..., None]) & same[:, None])[..., filled],
    )
    same_image = document_of_image[:, None] == document_of_image[None]
    before = rank[:, :, None, None] > rank[None, None]
    check(image_by_clean, before & same_image[:, None, :, None])
    check(image_by_noised, rank[:, :, None, None] == rank[None, None])
    same_text = document_of_text[:, None] == document_of_text[None]
    check(
        text_by_text[np.ix_(filled, filled)],
        ((text_rank[None] <= text_rank[:, None]) & same_text)[np.ix_(filled, filled)],
    )
    check(
        text_by_clean[filled],
        ((rank[None] < text_rank[:, None, None]) & same.T[:, :, None])[filled],
    )
    assert not text_by_noised.any()


def test_splash_attention_is_refused():
    with pytest.raises(UserError, match="splash attention is for models of images alone"):
        tiny.random_params(made.model(attention="splash"))


@pytest.mark.parametrize("padding", [0, 3])
def test_cached_is_uncached(model, params, padding):
    """Interleaved text and images, pushed by AR steps; 3e-5 for sums in another order.

    With `padding` empty slots before every text token, in a ring that is just large enough.
    """
    rng = np.random.default_rng(2)
    document = (TextSegment("ab"), IMAGE, TextSegment("cde"), IMAGE)
    items = made.items(document)
    row = made.row([document], Slots(10, 2))
    batch = {name: jnp.asarray(it[None]) for name, it in row.items()}
    clean, noised, _, order, _ = made.images(rng, 1, 2)
    ar_step_size = 2
    ids = jnp.broadcast_to(jnp.arange(made.NUM_TOKENS) // ar_step_size, order.shape)
    t = jnp.full((1, 2, 1, 1), 300)
    prediction, logits = model.apply(
        {"params": params},
        *(made.of_batch(batch), clean, noised, t, order, ids),
        method=model.documents,
    )

    def jitted(method):
        return quick_jit(lambda *args: model.apply({"params": params}, *args, method=method))

    @jitted
    def push_tokens(model, cache, tokens, indices):
        return model.extend(cache, model.clean_image_tokens(tokens, indices))

    push_text, denoise = jitted(model.push_text), jitted(model.denoise)
    num_text = sum(item.token is not None for item in items)
    capacity = num_text * (1 + padding) + 2 * made.NUM_TOKENS
    cache = model.apply({"params": params}, 1, capacity, method=model.empty_document_cache)
    image, text, found_logits = 0, 0, []
    found = np.zeros(prediction.shape, np.float32)
    for item in items:
        if item.token is not None:
            tokens = jnp.array([[0] * padding + [item.token]])
            is_real = jnp.array([[False] * padding + [True]])
            cache, after = push_text(cache, tokens, is_real)
            found_logits.append(after[0, -1])
            text += 1
            continue
        for begin in range(0, made.NUM_TOKENS, ar_step_size):
            members = slice(begin, begin + ar_step_size)
            indices = order[:, image, members]
            found[0, image, 0, members] = denoise(
                cache, noised[:, image, 0, members], jnp.array([300]), indices
            )[0]
            cache = push_tokens(cache, clean[:, image, members], indices)
        cache = cache.after_segment(1)
        image += 1
    np.testing.assert_allclose(found, prediction, rtol=0, atol=3e-5)
    np.testing.assert_allclose(found_logits, logits[0, :text], rtol=0, atol=3e-5)
    assert cache.position.tolist() == [len(items)]
