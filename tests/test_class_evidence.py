"""How well images fit a class by the model itself, and the choice among candidates of an edit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from autoencoders import make as make_autoencoder

import cfjax
from cfjax import build, class_evidence, sampling, sharding
from cfjax.data.images import to_uint8
from cfjax.errors import UserError
from cfjax.models.patches import unpatchify
from cfjax.rng import per_example_keys, stream_key

BATCH, L, WIDTH = 3, 16, 49
LABELS = np.array([3, 5, 0], np.int32)


@pytest.fixture(scope="module")
def network():
    model = build.sampling_model(tiny.config())
    return model, jax.tree.map(jnp.asarray, tiny.random_params(model))


def tokens_of(seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, L, WIDTH)).astype(np.float32)


def keys_of(seed=0):
    return per_example_keys(jax.random.key(seed), jnp.arange(BATCH))


def evidence_of(network, prediction_type="x_start", tokens=None, labels=LABELS, keys=None):
    tokens, keys = tokens_of() if tokens is None else tokens, keys_of() if keys is None else keys
    schedule = build.noise_schedule(tiny.config())
    arguments = (*network, schedule, prediction_type, jnp.asarray(tokens), jnp.asarray(labels))
    return np.asarray(class_evidence.class_evidence(*arguments, keys))


@pytest.mark.parametrize("prediction_type", ["x_start", "noise"])
def test_evidence_is_that_of_the_errors(network, prediction_type):
    """Recomputed in NumPy from what the network predicts in a training sequence, without caches.

    Tolerance: rounding in sums of another order.
    """
    model, params = network
    alphas_cumprod = build.noise_schedule(tiny.config()).alphas_cumprod
    tokens, keys = tokens_of().astype(np.float64), keys_of()

    @jax.jit
    def predict(labels, x_t, t):
        order = jnp.broadcast_to(jnp.arange(L), (BATCH, L))
        t = jnp.broadcast_to(t, (BATCH, 1, 1))
        arguments = (x_t[:, :0], x_t[:, None], t, order, jnp.zeros_like(order))
        return model.apply({"params": params}, labels, *arguments)[:, 0]

    shares = []
    timesteps = (600, 700, 800, 900)
    for index, t in enumerate(timesteps):
        noise = np.stack(
            [jax.random.normal(jax.random.fold_in(key, index), (L, WIDTH)) for key in keys]
        )
        signal_rate, noise_rate = np.sqrt([alphas_cumprod[t], 1 - alphas_cumprod[t]])
        x_t = signal_rate * tokens + noise_rate * noise
        errors = []
        for labels in (LABELS, np.full(BATCH, model.null_class)):
            x_start = np.asarray(predict(labels, x_t.astype(np.float32), t), np.float64)
            if prediction_type == "noise":
                x_start = (x_t - noise_rate * x_start) / signal_rate
            errors.append(np.square(x_start - tokens).mean(axis=(1, 2)))
        shares.append(1 - errors[0] / errors[1])
    expected = np.mean(shares, axis=0)
    assert np.abs(expected).min() > 1e-4
    np.testing.assert_allclose(
        evidence_of(network, prediction_type), expected, atol=1e-6, rtol=1e-3
    )


def test_evidence_of_an_image_depends_on_its_class_and_key_alone(network):
    whole = evidence_of(network)
    # Of no class there is none, but for rounding.
    np.testing.assert_allclose(evidence_of(network, labels=np.full(BATCH, 10)), 0, atol=1e-6)
    assert (evidence_of(network, labels=LABELS + 1) != whole).all()
    assert (evidence_of(network, keys=keys_of(1)) != whole).all()
    tokens = np.concatenate([tokens_of()[:1], tokens_of(1)[1:]])
    others = evidence_of(network, tokens=tokens)
    assert others[0] == whole[0]
    assert (others[1:] != whole[1:]).all()


def test_the_candidate_with_the_most_evidence_is_chosen():
    candidates = [jnp.full((4, 2, 2, 1), index, jnp.float32) for index in range(3)]
    evidence = np.array([[0.0, 3.0, 1.0, -2.0], [1.0, 2.0, 1.0, -1.0], [0.5, 4.0, 1.0, -3.0]])

    def of(images):
        return jnp.asarray(evidence[int(images[0, 0, 0, 0])], jnp.float32)

    best = class_evidence.best_of(iter(candidates), of, 3)
    # The first of the same.
    np.testing.assert_array_equal(best, np.broadcast_to([1, 2, 0, 1], (1, 2, 2, 4)).T)
    assert class_evidence.best_of(iter(candidates[:1]), None, 1) is candidates[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, [1, 2], 0.1), "num_candidates is 0, but must be at least 1"),
        ((2, [1, 10], 0.1), "nothing to choose by for an image without a class"),
        ((2, [1, 2], 0.0), "loss.class_dropout=0 and does not know the null class"),
    ],
)
def test_candidates_that_there_is_no_choice_among_are_refused(arguments, words):
    def check(num_candidates, labels, class_dropout):
        labels = np.array(labels)
        class_evidence.check_num_candidates(num_candidates, labels, 10, class_dropout)

    with pytest.raises(UserError, match=words):
        check(*arguments)
    check(1, [1, 10], 0.0)
    check(2, [1, 2], 0.1)


def candidates_of(model, images, labels, num_candidates, **options):
    """Pixels or latents of all candidates, and their evidence, from `sampling.generate`."""
    known = model.known_tokens(images, "top")
    settings = model.settings(options, (), int(known.is_known[0].sum()))
    settings = dataclasses.replace(settings, kept_as="noised")
    indices = jnp.arange(len(labels), dtype=jnp.uint32)
    addresses = [("sample",), *(("candidate", index) for index in range(1, num_candidates))]
    tokens, evidence = [], []
    for stream, *address in addresses:
        keys = per_example_keys(stream_key(4, stream, *address), indices)
        network, labels = (model.model, model.params), jnp.asarray(labels, jnp.int32)
        tokens.append(sampling.generate(*network, settings, labels, keys, known=known))
        keys = per_example_keys(stream_key(4, "class_evidence"), indices)
        schedule = build.noise_schedule(model.config)
        arguments = (*network, schedule, "x_start", tokens[-1], labels, keys)
        evidence.append(np.asarray(class_evidence.class_evidence(*arguments)))
    made = [unpatchify(it, model.config.model.patch_size, model.model.grid) for it in tokens]
    return np.stack(made), np.stack(evidence)


OPTIONS = {"num_ar_steps": 1, "denoising_steps": 2}


def load(workdir):
    return cfjax.load(workdir, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def test_an_edit_is_the_best_of_its_candidates(workdir):
    """And the same bytes in any batch, from wherever on. Sums of another number of rows round else."""
    model = load(workdir)
    labels = [1, 9, 3, 4, 5]
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    options = {"keep": "top", "kept_as": "noised", "seed": 4} | OPTIONS
    first, best = (model.edit(images, labels, num_candidates=n, **options) for n in (1, 4))
    made, evidence = candidates_of(model, images, labels, 4, **OPTIONS)
    assert np.diff(np.sort(evidence, axis=0), axis=0)[-1].min() > 1e-4  # more than rounding
    chosen = evidence.argmax(axis=0)
    assert len(set(chosen)) > 1
    for edited, candidate in ((first, made[0]), (best, made[chosen, np.arange(5)])):
        difference = edited.astype(int) - to_uint8(candidate)
        assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(best[chosen == 0], first[chosen == 0])
    np.testing.assert_array_equal(first, model.edit(images, labels, **options))
    again = model.edit(
        images[3:], labels[3:], num_candidates=4, first_index=3, batch_size=1, **options
    )
    np.testing.assert_array_equal(again, best[3:])


@pytest.mark.long
@pytest.mark.slow
def test_latents_are_chosen_before_they_are_decoded(tmp_path):
    make_autoencoder(tmp_path / "vae")
    fields = {"data__size": 14, "data__channels": 2, "sampling__clip_x_start": False}
    fields["autoencoder__path"] = str(tmp_path / "vae")
    model = load(tiny.save_random_checkpoint(tmp_path / "run", **fields))
    images, labels = np.zeros((2, 28, 28, 1), np.uint8), [1, 2]
    best = model.edit(images, labels, "top", kept_as="noised", seed=4, num_candidates=3, **OPTIONS)
    made, evidence = candidates_of(model, images, labels, 3, **OPTIONS)
    assert evidence.argmax(axis=0).any()
    expected = model.autoencoder.decode_all(made[evidence.argmax(axis=0), np.arange(2)])
    assert np.abs(best.astype(int) - to_uint8(expected)).max() <= 1
