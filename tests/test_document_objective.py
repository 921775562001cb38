"""The objective of documents: its loss by hand, targets alone, parts of a batch, single images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_documents as made
import tiny
from quick_jit import quick_jit

from cfjax import document_objective, objective
from cfjax.diffusion.schedule import make_noise_schedule
from cfjax.document_objective import DocumentObjective
from cfjax.documents import NO_PLACE, NO_TARGET, ClassSegment, ImageSegment, Slots, TextSegment
from cfjax.errors import UserError
from cfjax.factorization import Factorization
from cfjax.objective import Objective

SLOTS = Slots(24, 4)
NUM_ROWS = 4
TEXT_LOSS_WEIGHT = 0.3
SCHEDULE = make_noise_schedule("cosine", 50)


def of_documents(mode="random", split_per_example=False, **changes):
    factorization = Factorization(mode, split_per_example=split_per_example)
    return DocumentObjective(Objective(factorization, SCHEDULE, **changes), TEXT_LOSS_WEIGHT)


def image(is_target=True):
    return ImageSegment(np.zeros(made.IMAGE_SHAPE, np.uint8), is_target)


@functools.cache
def batch():
    """Rows with other numbers of targets, of some kinds none, and with slots that stay empty."""
    rows = [
        [(TextSegment("abc"), image()), (image(), TextSegment("de"))],
        [(image(False), image(), TextSegment("kg", is_target=False), image())],
        [(TextSegment("hijab"),)],
        [(TextSegment("cab", is_target=False), image(False), TextSegment("i"), image())],
    ]
    rows = [made.row(row, SLOTS) for row in rows]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


@functools.cache
def tokens():
    shape = (NUM_ROWS, SLOTS.num_images, made.NUM_TOKENS, made.TOKEN_WIDTH)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


MODEL = made.model(num_classes=0)


@functools.cache
def params():
    return jax.tree.map(jnp.asarray, tiny.random_params(MODEL))


@functools.cache
def draw(of, train_step=3):
    a_batch = batch()
    return jax.jit(lambda: document_objective.corrupt(of, MODEL, a_batch, 7, train_step))()


@functools.cache
def jitted(of, model=MODEL):
    def loss(params, tokens, a_batch, drawn, weights):
        return document_objective.loss(of, model, params, tokens, a_batch, drawn, weights)

    return quick_jit(loss)


def loss_of(of, its_tokens=None, a_batch=None, drawn=None, weights=None):
    a_batch = a_batch or batch()
    return jitted(of)(
        params(),
        tokens() if its_tokens is None else its_tokens,
        a_batch,
        drawn or draw(of),
        weights or document_objective.weights(a_batch),
    )


def prediction_and_logits(drawn):
    x_start, x_t, _ = noised(drawn)
    apply = quick_jit(functools.partial(MODEL.apply, method=MODEL.documents))
    inputs = (x_start.astype(np.float32), x_t.astype(np.float32), drawn.t, *drawn.plan)
    return apply({"params": params()}, made.of_batch(batch()), *inputs)


def noised(drawn):
    """x_0 in generation order, x_t and ᾱ, float64 with an axis of copies but for x_0."""
    order, t, noise = (np.asarray(it) for it in (drawn.plan.token_order, drawn.t, drawn.noise))
    x_start = np.empty(tokens().shape)
    for row, slot, position in np.ndindex(order.shape):
        x_start[row, slot, position] = tokens()[row, slot, order[row, slot, position]]
    alphas = SCHEDULE.alphas_cumprod[np.broadcast_to(t, noise.shape[:-1])][..., None]
    return x_start, np.sqrt(alphas) * x_start[:, :, None] + np.sqrt(1 - alphas) * noise, alphas


def reference_loss(of, drawn, prediction, logits):
    """Diffusion loss, cross-entropy and accuracy, a target at a time, in float64."""
    x_start, _, alphas = noised(drawn)
    noise = np.asarray(drawn.noise, np.float64)
    clean = np.broadcast_to(x_start[:, :, None], noise.shape)
    target = {
        "noise": noise,
        "x_start": clean,
        "velocity": np.sqrt(alphas) * noise - np.sqrt(1 - alphas) * clean,
    }[of.image.prediction_type]
    ids = np.asarray(drawn.plan.ar_step_ids)
    of_images = []
    for row, slot in zip(*np.nonzero(np.asarray(batch()["image_is_target"])), strict=True):
        errors = []
        for copy, position in np.ndindex(noise.shape[2:4]):
            begin = list(ids[row, slot]).index(ids[row, slot, position])
            weight = of.image.ar_loss_weight
            weight -= (weight - 1) * begin / made.NUM_TOKENS
            alpha = alphas[row, slot, copy, position, 0]
            snr = alpha / (1 - alpha)
            if of.image.noise_level_weighting == "min_snr":
                weight *= (
                    min(snr, of.image.noise_level_gamma)
                    / {
                        "noise": snr,
                        "x_start": 1,
                        "velocity": snr + 1,
                    }[of.image.prediction_type]
                )
            where = (row, slot, copy, position)
            errors.append(weight * np.mean((prediction[where] - target[where]) ** 2))
        of_images.append(np.mean(errors))
    of_texts, is_right = [], []
    targets = np.asarray(batch()["text_targets"])
    for row, slot in zip(*np.nonzero(targets != NO_TARGET), strict=True):
        its = np.asarray(logits[row, slot], np.float64)
        of_texts.append(np.log(np.exp(its).sum()) - its[targets[row, slot]])
        is_right.append(its.argmax() == targets[row, slot])
    return np.mean(of_images), np.mean(of_texts), is_right


OPTIONS = {
    "as published": {},
    "a timestep for each AR step": {
        "timestep_sharing": "ar_step",
        "timesteps_per_ar_step": 2,
        "split_per_example": True,
        "prediction_type": "velocity",
    },
    "copies, by noise level": {
        "timesteps_per_ar_step": 2,
        "prediction_type": "x_start",
        "noise_level_weighting": "min_snr",
    },
    "diffusion": {"mode": "diffusion", "ar_loss_weight": 1.0},
    "AR": {"mode": "ar", "ar_loss_weight": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_by_hand(options):
    """float32 against float64."""
    of = of_documents(**options)
    drawn = draw(of)
    prediction, logits = prediction_and_logits(drawn)
    of_image, of_text, is_right = reference_loss(of, drawn, prediction, logits)
    output = loss_of(of, drawn=drawn)
    np.testing.assert_allclose(output.totals["loss/image"][0], of_image, rtol=2e-5)
    np.testing.assert_allclose(output.totals["loss/text"][0], of_text, rtol=2e-5)
    np.testing.assert_allclose(output.loss, of_image + TEXT_LOSS_WEIGHT * of_text, rtol=2e-5)
    assert output.totals["text_accuracy"] == (sum(is_right), len(is_right))


def test_breakdown_is_of_targets():
    """By AR step and by noise level: each token of each target image is in one group of both."""
    of = of_documents("ar", timesteps_per_ar_step=2)
    totals = loss_of(of).totals
    num_targets = int(batch()["image_is_target"].sum())
    for kind in ("loss/ar_step", "loss/noise_quartile"):
        counts = [count for name, (_, count) in totals.items() if name.startswith(kind)]
        assert sum(counts) == num_targets * 2 * made.NUM_TOKENS
    drawn = draw(of)
    prediction, _ = prediction_and_logits(drawn)
    errors = np.mean((prediction - drawn.noise) ** 2, axis=-1)
    first = errors[np.asarray(batch()["image_is_target"])][..., 0]
    np.testing.assert_allclose(totals["loss/ar_step_0"][0], first.sum(), rtol=1e-5)


def test_what_is_no_target_changes_no_loss():
    """To the bit: noise of images that are none, ids and pixels of empty slots."""
    of = of_documents()
    drawn = draw(of)
    expected = float(loss_of(of, drawn=drawn).loss)
    is_target = np.asarray(batch()["image_is_target"])
    assert 0 < is_target.sum() < is_target.size

    def with_noise(where):
        noise = np.array(drawn.noise)
        noise[where] += 1
        return float(loss_of(of, drawn=drawn._replace(noise=jnp.asarray(noise))).loss)

    assert with_noise(~is_target) == expected
    for where in zip(*np.nonzero(is_target), strict=True):
        assert with_noise(where) != expected

    is_empty = np.asarray(batch()["image_places"]) == NO_PLACE
    assert is_empty.any()
    others = tokens().copy()
    others[is_empty] += 1
    assert float(loss_of(of, others).loss) == expected
    ids, places = np.array(batch()["text_ids"]), np.asarray(batch()["text_places"])
    ids[places == NO_PLACE] += 1
    assert float(loss_of(of, a_batch=batch() | {"text_ids": jnp.asarray(ids)}).loss) == expected


def test_an_image_that_is_no_target_is_still_seen():
    """The clean tokens of the first image of the second row, by the images after it."""
    of = of_documents()
    others = tokens().copy()
    assert not batch()["image_is_target"][1, 0]
    others[1, 0] += 1
    assert float(loss_of(of, others).loss) != float(loss_of(of).loss)


def test_text_targets_decide():
    of = of_documents()
    expected = loss_of(of).totals
    targets = np.array(batch()["text_targets"])
    row, slot = 2, 1
    assert targets[row, slot] != NO_TARGET
    targets[row, slot] = (targets[row, slot] + 1) % made.VOCABULARY.size
    totals = loss_of(of, a_batch=batch() | {"text_targets": jnp.asarray(targets)}).totals
    assert float(totals["loss/text"][0]) != float(expected["loss/text"][0])
    assert float(totals["loss/image"][0]) == float(expected["loss/image"][0])


def test_accuracy_counts_targets_alone():
    """Where the model always says id 0, as many are right as there are targets of it."""
    of = of_documents()
    says_zero = params() | {"text_norm": jax.tree.map(jnp.zeros_like, params()["text_norm"])}
    weights = document_objective.weights(batch())
    totals = jitted(of)(says_zero, tokens(), batch(), draw(of), weights).totals
    targets = np.asarray(batch()["text_targets"])
    assert totals["text_accuracy"] == ((targets == 0).sum(), (targets != NO_TARGET).sum())


def test_weights_are_equal_over_the_whole_batch():
    of_image, of_text = document_objective.weights(batch())
    for share, is_target in (
        (of_image, batch()["image_is_target"]),
        (of_text, batch()["text_targets"] != NO_TARGET),
    ):
        np.testing.assert_allclose(share, np.where(is_target, NUM_ROWS / is_target.sum(), 0))
    # Whatever a slot says that is empty.
    all_targets = batch() | {"image_is_target": jnp.ones((NUM_ROWS, SLOTS.num_images), bool)}
    of_image, _ = document_objective.weights(all_targets)
    np.testing.assert_array_equal(of_image > 0, batch()["image_places"] != NO_PLACE)


@pytest.mark.parametrize("name", ["image_is_target", "text_targets"])
def test_a_batch_without_targets_of_a_kind_has_no_loss_of_it(name):
    nothing = {"image_is_target": False, "text_targets": NO_TARGET}[name]
    without = batch() | {name: jnp.full_like(batch()[name], nothing)}
    totals = loss_of(of_documents(), a_batch=without).totals
    losses = [float(totals[it][0]) for it in ("loss/image", "loss/text")]
    assert np.isfinite(losses).all()
    assert [loss == 0 for loss in losses] == [name == "image_is_target", name == "text_targets"]


def gradients(of, model=MODEL, part=slice(None)):
    """Loss and gradients of some rows under the weights of the whole batch."""
    a_batch, drawn = batch(), draw(of)
    cut = jax.tree.map(
        lambda x: x[part], (tokens(), a_batch, drawn, document_objective.weights(a_batch))
    )

    def loss(params):
        return document_objective.loss(of, model, params, *cut).loss

    return quick_jit(jax.value_and_grad(loss))(params())


def assert_close(found, expected, tolerance=1e-5):
    """Within float32's rounding, of the largest gradient."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance * largest, err_msg=name)


@functools.cache
def whole():
    return gradients(of_documents())


def test_parts_of_a_batch_add_up():
    """Though their rows have other numbers of targets, or none of a kind."""
    parts = [gradients(of_documents(), part=slice(i, i + 2)) for i in (0, 2)]
    mean = jax.tree.map(lambda *it: sum(it) / len(it), *parts)
    assert_close(mean, whole())


VARIANTS = {
    "dots": {"remat_policy": "dots"},
    "full": {"remat_policy": "full"},
    "unrolled": {"scan_layers": False},
    "split": {"attention": "split"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_how_it_is_computed_changes_rounding_alone(changes):
    assert_close(gradients(of_documents(), MODEL.clone(**changes)), whole())


def test_every_parameter_of_text_and_images_learns():
    _, grads = whole()
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        is_of_classes = "label_table" in name or "condition_positions" in name
        assert (np.abs(leaf).max() > 0) != is_of_classes, name


def test_corruption_is_that_of_single_images():
    """Of slot j of row i as of example i I + j; the split is the batch's own."""
    of = of_documents(timesteps_per_ar_step=2, class_dropout=0.9)
    drawn = draw(of)
    shape = (NUM_ROWS, SLOTS.num_images)
    labels = jnp.zeros(np.prod(shape), jnp.int32)
    alone = objective.corrupt(of.image, MODEL, labels, 7, 3)
    for ours, expected in zip(
        jax.tree.leaves(drawn._replace(labels=None)),
        jax.tree.leaves(alone._replace(labels=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, np.reshape(expected, (*shape, *expected.shape[1:])))
    # Documents without classes have none to drop.
    assert drawn.labels.shape == (NUM_ROWS, 0)
    other_step = draw(of, train_step=4)
    assert (drawn.noise != other_step.noise).all()


def test_classes_of_documents_are_dropped_as_those_of_single_images():
    model = made.model()
    of = of_documents(class_dropout=0.5)
    labels = jnp.arange(12).reshape(6, 2) % made.NUM_CLASSES
    a_batch = {"image_places": jnp.zeros((6, 2), jnp.int32), "label": labels}
    drawn = document_objective.corrupt(of, model, a_batch, 7, 3)
    alone = objective.corrupt(of.image, model, labels.reshape(-1), 7, 3)
    np.testing.assert_array_equal(drawn.labels, alone.labels.reshape(6, 2))
    assert 0 < (drawn.labels == model.null_class).sum() < 12


@pytest.mark.parametrize("mode", ["random", "diffusion"])
def test_a_class_and_its_image_have_the_loss_of_single_images(mode):
    """Means are summed in another order."""
    model = made.model()
    rows = [made.row([(ClassSegment(label), image())], Slots(0, 1, True)) for label in (3, 0, 4)]
    a_batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    of = of_documents(mode)
    drawn = document_objective.corrupt(of, model, a_batch, 7, 3)
    its_params = jax.tree.map(jnp.asarray, tiny.random_params(model))
    its_tokens = tokens()[:3, :1]
    its_weights = document_objective.weights(a_batch)
    output = jitted(of, model)(its_params, its_tokens, a_batch, drawn, its_weights)
    alone = jax.tree.map(lambda x: x[:, 0], drawn)
    of_images = quick_jit(
        functools.partial(objective.loss, of.image, model, num_clean=made.NUM_TOKENS)
    )
    expected = of_images(its_params, its_tokens[:, 0], alone)
    np.testing.assert_allclose(output.loss, expected.loss, rtol=1e-6)
    assert float(output.totals["loss/text"][0]) == 0


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match="text_loss_weight is -1, but must be at least 0"):
        DocumentObjective(of_documents().image, -1)
