"""The program that trains autoencoders: what it writes, resuming, and what is refused."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from cfjax import autoencoder_files, autoencoder_results, checkpoints, lpips_files, sharding
from cfjax.data.image_files import read_image
from cfjax.data.images import to_model_range, to_uint8
from cfjax.data.sources import MnistSource
from cfjax.errors import UserError
from cfjax.metric_log import read_metrics
from cfjax.train_autoencoder import autoencoder, train, train_step_settings


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, train(tiny.autoencoder_config(), workdir)


def assert_same_bits(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), tree, expected)


def restored(workdir):
    settings = train_step_settings(tiny.autoencoder_config())
    mesh = sharding.make_mesh()
    target = sharding.abstract_sharded(settings.init, mesh, jax.random.key(0))
    return checkpoints.restore_state(workdir, target)


def report(workdir):
    return json.loads((workdir / "autoencoder" / "training.json").read_text())


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_the_folder_has_the_averaged_parameters(uninterrupted):
    workdir, state = uninterrupted
    loaded = autoencoder_files.load(workdir / "autoencoder")
    assert_same_bits(loaded.params, jax.device_get(state.ema_params))
    assert np.abs(
        loaded.params["quant_conv"]["kernel"] - state.params["quant_conv"]["kernel"]
    ).max()
    module = autoencoder(tiny.autoencoder_config())
    assert loaded.module == module.clone(scale=1 / report(workdir)["latent_std"])


@pytest.mark.slow
def test_scaled_latents_have_a_variance_of_one(uninterrupted):
    """By other draws than those that were measured."""
    loaded = autoencoder_files.load(uninterrupted[0] / "autoencoder")
    images = to_model_range(MnistSource("train").examples_at(np.arange(4000))["image"])
    moments = loaded.module.apply({"params": loaded.params}, images, method="encode")
    latents = loaded.module.scale * moments.sample(jax.random.key(7))
    assert latents.shape == (4000, 14, 14, 2)
    assert abs(np.asarray(latents, np.float64).std() - 1) < 0.005


@pytest.mark.slow
def test_the_stated_psnr_is_of_all_held_out_images(uninterrupted):
    loaded = autoencoder_files.load(uninterrupted[0] / "autoencoder")
    images = to_model_range(MnistSource("held_out").examples_at(np.arange(1000))["image"])
    decoded = np.asarray(loaded.module.apply({"params": loaded.params}, images))
    squared = ((np.clip(decoded, -1, 1) - images).astype(np.float64) ** 2).mean((1, 2, 3))
    stated = report(uninterrupted[0])
    np.testing.assert_allclose(stated["psnr"], (10 * np.log10(4 / squared)).mean(), rtol=1e-5)
    assert (stated["num_held_out"], stated["num_training"]) == (1000, 4000)
    assert stated["train_step"] == tiny.NUM_TRAIN_STEPS
    assert stated["config"]["autoencoder"]["channels"] == 4


@pytest.mark.slow
def test_the_picture_has_originals_above_reconstructions(uninterrupted):
    workdir = uninterrupted[0]
    picture = np.asarray(read_image(workdir / "reconstructions.png"))
    assert picture.shape == (4 * 32, 10 * 32)
    tiles = picture.reshape(4, 32, 10, 32).swapaxes(1, 2)[:, :, 2:-2, 2:-2]
    images = MnistSource("held_out").examples_at(np.arange(20) * 50)["image"]
    np.testing.assert_array_equal(tiles[[0, 2]].reshape(images[..., 0].shape), images[..., 0])
    loaded = autoencoder_files.load(workdir / "autoencoder")
    decoded = to_uint8(loaded.module.apply({"params": loaded.params}, to_model_range(images)))
    shown = tiles[[1, 3]].reshape(images[..., 0].shape).astype(int)
    # Truncation turns a difference in the last bits into a grey level.
    assert np.abs(shown - decoded[..., 0]).max() <= 1


@pytest.mark.long
@pytest.mark.slow
def test_resumed_equals_uninterrupted_to_the_bit(uninterrupted, tmp_path):
    """Also what is written at the end, which replaces what the shorter run wrote."""
    train(tiny.autoencoder_config(train__num_train_steps=3), tmp_path)
    assert report(tmp_path)["train_step"] == 3
    state = train(tiny.autoencoder_config(), tmp_path)
    assert_same_bits(state, uninterrupted[1])
    assert files_of(tmp_path / "autoencoder") == files_of(uninterrupted[0] / "autoencoder")


@pytest.mark.long
def test_killed_ends_with_the_same_bits(uninterrupted, tmp_path):
    flags = tiny.autoencoder_flags(train__checkpoint_every=1)
    command = [sys.executable, "-m", "cfjax.train_autoencoder", *flags, f"--workdir={tmp_path}"]
    places = {"cwd": tiny.REPOSITORY, "env": os.environ | {"PYTHONPATH": str(tiny.REPOSITORY)}}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **places)
    deadline = time.monotonic() + 240
    while not checkpoints.train_steps(tmp_path) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed_after = max(checkpoints.train_steps(tmp_path))
    assert 1 <= killed_after < tiny.NUM_TRAIN_STEPS and not (tmp_path / "autoencoder").exists()
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, **places)
    assert f"resuming after train step {killed_after}" in done.stderr
    assert_same_bits(restored(tmp_path)[0], uninterrupted[1])
    weights, config = autoencoder_files.WEIGHTS_FILE, autoencoder_files.CONFIG_FILE
    ours, expected = (files_of(place / "autoencoder") for place in (tmp_path, uninterrupted[0]))
    assert (ours[weights], ours[config]) == (expected[weights], expected[config])


@pytest.mark.slow
def test_checkpoints_and_metrics(uninterrupted):
    workdir, state = uninterrupted
    saved, examples_seen = restored(workdir)
    assert_same_bits(saved, state)
    assert examples_seen == tiny.NUM_TRAIN_STEPS * 16
    assert checkpoints.train_steps(workdir) == [3, 6]
    lines = read_metrics(workdir)
    assert [line["train_step"] for line in lines] == [2, 4, 6]
    kl_weight = tiny.autoencoder_config().loss.kl_weight
    for line in lines:
        expected = line["reconstruction"] + kl_weight * line["kl"]
        np.testing.assert_allclose(line["loss"], expected, rtol=1e-5)
        assert line["psnr"] > 0 and line["train_steps_per_second"] > 0


@pytest.mark.slow
def test_a_folder_is_replaced_whole_or_not_at_all(uninterrupted, tmp_path, monkeypatch):
    loaded = autoencoder_files.load(uninterrupted[0] / "autoencoder")
    folder = tmp_path / "autoencoder"
    autoencoder_results.write_folder(folder, loaded.module, loaded.params, {"number": 1})
    before = files_of(folder)
    assert json.loads(before["training.json"]) == {"number": 1}

    zeros = jax.tree.map(np.zeros_like, loaded.params)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: 1 / 0)  # of the config, after the weights
        with pytest.raises(ZeroDivisionError):
            autoencoder_results.write_folder(folder, loaded.module, zeros, {"number": 2})
    assert files_of(folder) == before

    autoencoder_results.write_folder(folder, loaded.module, zeros, {"number": 3})
    assert_same_bits(autoencoder_files.load(folder).params, zeros)
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]


BAD_VALUES = [
    ({"data__name": "latents"}, "data.name is 'latents', but an autoencoder is trained on images"),
    ({"data__size": 27}, "data.size 27 is not a multiple of 2, by which 2 levels make images"),
    ({"loss__reconstruction": "l3"}, "unknown loss.reconstruction 'l3'"),
    ({"loss__kl_weight": -1.0}, "loss.kl_weight is -1.0"),
    (
        {"autoencoder__num_groups": 3},
        "autoencoder.num_groups 3 does not divide a level's 4 channels",
    ),
    ({"autoencoder__channel_multipliers": ()}, "autoencoder.channel_multipliers is empty"),
    ({"autoencoder__dtype": "float8"}, "unknown dtype 'float8'"),
    ({"train__global_batch_size": 12}, "a batch of 12 does not divide"),
    ({"train__log_every": 0}, "train.log_every is 0"),
    ({"train__keep_best_metric": "psn"}, "keep_best_metric 'psn'; did you mean 'psnr'"),
]


@pytest.mark.parametrize(("overrides", "words"), BAD_VALUES)
def test_bad_values_are_refused(overrides, words, tmp_path):
    with pytest.raises(UserError) as error:
        train(tiny.autoencoder_config(**overrides), tmp_path / "run")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "autoencoder").exists()


@pytest.mark.long
def test_trains_with_a_perceptual_loss(tmp_path):
    """With random weights of VGG-16."""
    rng = np.random.default_rng(0)
    arrays = (
        (path, rng.normal(0, 0.05, shape).astype(np.float32))
        for path, shape in lpips_files.flat_shapes().items()
    )
    lpips_files.save_streaming(tmp_path / "lpips", arrays)
    overrides = {"loss__perceptual_weight": 0.5, "loss__perceptual_path": str(tmp_path / "lpips")}
    config = tiny.autoencoder_config(train__log_every=1, train__num_train_steps=2, **overrides)
    state = train(config, tmp_path / "run")
    other = train(tiny.autoencoder_config(train__num_train_steps=2), tmp_path / "without")
    lines = read_metrics(tmp_path / "run")
    weights = config.loss
    for line in lines:
        expected = (
            line["reconstruction"] + weights.kl_weight * line["kl"] + 0.5 * line["perceptual"]
        )
        np.testing.assert_allclose(line["loss"], expected, rtol=1e-5)
    kernels = [it.params["quant_conv"]["kernel"] for it in (state, other)]
    assert np.abs(np.subtract(*kernels)).max() > 0


@pytest.mark.long
def test_trains_on_ones_own_pictures(tmp_path):
    """In colour, of which fewer are held out than a row shows."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    config = tiny.autoencoder_config(
        data__name="image_folder",
        data__path=str(tmp_path / "pictures"),
        data__channels=3,
        data__num_classes=2,
        train__num_train_steps=2,
        train__sample_every=1,
    )
    train(config, tmp_path / "run")
    num_held_out = report(tmp_path / "run")["num_held_out"]
    assert 1 <= num_held_out < 10
    picture = np.asarray(read_image(tmp_path / "run" / "reconstructions.png"))
    assert picture.shape == (2 * 32, num_held_out * 32, 3)
