"""Models that see latents: training on encoded images or encoding in training, and decoding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from autoencoders import SCALE
from autoencoders import make as make_autoencoder

import cfjax
from cfjax import build, build_data, draw, mesh_autoencoder, sharding
from cfjax.data import latents
from cfjax.data.embedded import MnistSource
from cfjax.data.images import to_model_range, to_uint8
from cfjax.data.record_shards import ShardWriter
from cfjax.errors import UserError
from cfjax.metric_log import read_metrics
from cfjax.train import train
from cfjax.train_step import draw_latents

NUM_IMAGES = 64
LATENTS = {"data__size": 14, "data__channels": 2, "sampling__clip_x_start": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of an autoencoder: digits to latents of 14x14x2."""
    folder = tmp_path_factory.mktemp("vae")
    make_autoencoder(folder)
    return folder


def config(folder, **overrides):
    return tiny.config(**LATENTS | {"autoencoder__path": str(folder)} | overrides)


def encoded(folder, out, **change):
    """A set of the first digits, made without `cfjax.encode`; float32."""
    vae = build_data.autoencoder(config(folder))
    examples = MnistSource("train").examples_at(np.arange(NUM_IMAGES))
    pixels = to_model_range(examples["image"])
    both = np.stack([pixels, pixels[:, :, ::-1]], 1).reshape(-1, 28, 28, 1)
    encode = jax.jit(
        lambda x: vae.module.apply({"params": vae.params}, x, method="encode_parameters")
    )
    moments = np.asarray(encode(both)).reshape(NUM_IMAGES, 2, 14, 14, 4)
    description = {
        "size": 14,
        "channels": 2,
        "dtype": "float32",
        "class_names": [str(i) for i in range(10)],
        "autoencoder_sha256": vae.checksum,
        "scale": SCALE,
    }
    writer = ShardWriter(out / "train", latents.KIND, description | change, 1)
    writer.begin()
    rows = zip(moments, examples["label"].tolist(), range(NUM_IMAGES), strict=True)
    writer.write(0, (latents.pack(*row) for row in rows))
    writer.finish()
    return out


class First:
    """The first images of a source."""

    def __init__(self, source):
        self._source = source
        self.class_names, self.image_shape = source.class_names, source.image_shape

    def __len__(self):
        return NUM_IMAGES

    def examples_at(self, indices):
        return self._source.examples_at(indices)


@pytest.mark.slow
@pytest.mark.parametrize("flip", [pytest.param(False, marks=pytest.mark.long), True])
def test_encoding_in_training_trains_as_on_encoded_images(folder, tmp_path, monkeypatch, flip):
    flips = {"data__horizontal_flip": flip}
    path = str(encoded(folder, tmp_path / "set"))
    on_set = train(config(folder, data__name="latents", data__path=path, **flips), tmp_path / "a")
    open_source = build_data.open_source
    monkeypatch.setattr(build_data, "open_source", lambda *a, **k: First(open_source(*a, **k)))
    in_loop = train(config(folder, **flips), tmp_path / "b")
    losses = [[line["loss"] for line in read_metrics(tmp_path / run)] for run in "ab"]
    assert len(losses[0]) == 3
    # Convolutions of another batch size round otherwise; Adam makes more of that.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), on_set.params, in_loop.params
    )


def test_latents_are_drawn_anew_from_their_moments():
    mean, logvar = np.full((64, 3, 3, 2), 5.0), np.full((64, 3, 3, 2), np.log(0.25))
    moments = jnp.asarray(np.concatenate([mean, logvar], -1), ml_dtypes.bfloat16)
    drawn, other = (draw_latents(moments, jax.random.key(i)) for i in range(2))
    assert drawn.shape == (64, 3, 3, 2) and drawn.dtype == jnp.float32
    # Of 1,152 numbers: four standard errors.
    assert abs(drawn.mean() - 5) < 4 * 0.5 / np.sqrt(1152)
    assert abs(drawn.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * 1152)
    assert np.abs(drawn - other).max() > 0.5
    assert len(np.unique(np.asarray(drawn[:, 0, 0, 0]))) == 64  # each row has a key of its own


@pytest.mark.long
def test_a_train_step_sees_scaled_latents(folder):
    """Certain moments, so that nothing is drawn: the loss is that of scaled means as pixels."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(16, 14, 14, 2)).astype(np.float32)
    moments = np.concatenate([mean, np.full_like(mean, -60.0)], -1)
    label = np.arange(16, dtype=np.int32) % 10
    losses = []
    for shared, batch in (
        ({"data__name": "latents", "autoencoder__path": str(folder)}, {"moments": moments}),
        ({"autoencoder__path": ""}, {"image": SCALE * mean}),
    ):
        program = build.train_program(config(folder, **shared), mesh)
        settings = program.settings
        state = build.init_state(settings.model, settings.optimizer)
        state = sharding.born_sharded(state, mesh, jax.random.key(0))
        batch = jax.device_put(batch | {"label": label}, sharding.batch_sharding(mesh))
        _, totals = program.compile(program.clean_lengths[-1])(state, batch)
        losses.append(float(totals["loss"][0]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)  # exp(-15) of noise is left


@pytest.mark.long
@pytest.mark.slow
def test_samples_are_decoded(folder, tmp_path):
    trained = train(config(folder), tmp_path)
    assert int(trained.train_step) == tiny.NUM_TRAIN_STEPS
    alone = cfjax.load(tmp_path, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    labels = np.arange(11) % 10
    images = alone.generate(labels, num_ar_steps=2)
    assert images.shape == (11, 28, 28, 1) and images.dtype == np.uint8
    # What the decoder gives for the latents themselves, divided by the scale.
    vae, undecoded = (
        alone.autoencoder,
        cfjax.sampler.Sampler(alone.config, alone.model, alone.params, alone.mesh),
    )
    settings = undecoded.settings({"num_ar_steps": 2})
    raw = [np.asarray(x) for x in latents_of(undecoded, labels, settings)]
    expected = vae.module.apply({"params": vae.params}, raw[0] / SCALE, method="decode")
    difference = np.abs(images.astype(int) - to_uint8(np.asarray(expected)))
    assert difference.max() <= 1  # rounding near the edge of a grey level
    everywhere = cfjax.load(tmp_path).generate(labels, num_ar_steps=2)
    np.testing.assert_array_equal(images, everywhere)
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        with pytest.raises(UserError, match="there is no autoencoder"):
            cfjax.load(tmp_path)
        again = cfjax.load(tmp_path, autoencoder=moved).generate(labels, num_ar_steps=2)
        np.testing.assert_array_equal(again, everywhere)
    finally:
        moved.rename(folder)


def latents_of(sampler, labels, settings):
    """What `Sampler.stream` would decode, through a spy in place of the rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cfjax.sampler.to_uint8", lambda images: images)
        return list(sampler.stream(labels, settings))


@pytest.mark.slow
def test_pictures_of_a_latent_model(folder, tmp_path):
    train(config(folder, train__sample_every=6), tmp_path)
    sampler = cfjax.load(tmp_path)
    frames, timesteps = draw.factorization_plane(sampler, 3, 4, 0, {})
    assert frames.shape == (4, len(timesteps), 28, 28, 3)
    blue = (frames == [90, 120, 170]).all(-1)
    # 3, 2, 1 and none of the 4 tokens are yet to come, each of 7x7 latents of 2x2 pixels.
    assert blue.sum((2, 3)).tolist() == [[n * 14 * 14] * len(timesteps) for n in (3, 2, 1, 0)]


def test_images_are_taken_some_at_a_time_and_as_many_as_there_are(folder):
    vae = build_data.autoencoder(config(folder))
    on_mesh = mesh_autoencoder.put(vae, sharding.make_mesh())
    z = np.random.default_rng(0).normal(size=(8 * 9 + 3, 14, 14, 2)).astype(np.float32)
    decode = jax.jit(lambda z: vae.module.apply({"params": vae.params}, z / SCALE, method="decode"))
    images = on_mesh.decode_all(z)
    assert images.shape == (75, 28, 28, 1)
    # Convolutions of another batch size round otherwise.
    np.testing.assert_allclose(images, decode(z), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder__path": ""}, "autoencoder.path is empty"),
        ({"autoencoder__path": "nowhere"}, "no autoencoder in nowhere"),
        (
            {"data__channels": 3},
            "data.channels is 3, .* latents of 2 channels; set data.channels=2",
        ),
        ({"autoencoder__scale": 0.5}, "scale is 0.5, .* is 0.7; set autoencoder.scale=0.7"),
        ({"autoencoder__dtype": "float16"}, "unknown autoencoder.dtype 'float16'"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(folder, change, message):
    with pytest.raises(UserError, match=message):
        build_data.autoencoder(config(folder, data__name="latents", **change))


def test_sets_of_another_autoencoder_are_refused(folder, tmp_path):
    other = make_autoencoder(tmp_path / "other", seed=1)
    path = str(encoded(folder, tmp_path / "set"))
    assert other.checksum != build_data.autoencoder(config(folder)).checksum
    wrong = {"autoencoder__path": str(tmp_path / "other")}
    with pytest.raises(UserError, match="autoencoder"):
        changed = config(folder, data__name="latents", data__path=path, **wrong)
        build_data.source(changed, "train", build_data.autoencoder(changed))


def test_an_autoencoder_for_a_model_of_pixels_is_refused(folder, tmp_path):
    tiny.trained(tmp_path)
    with pytest.raises(UserError, match="generates pixels; don't pass an autoencoder"):
        cfjax.load(tmp_path, autoencoder=folder)
