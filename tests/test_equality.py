"""The same run on every mesh: train steps, images and scores, by the programs as they are run.

The runs start from one checkpoint whose parameters are random, so that every part of the model has
gradients. All is float32; sums over devices add in another order.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import random_inception
import tiny
import tiny_features
from runs import ONE_DEVICE, TWO_PROCESSES, launch

import cfjax
from cfjax import autoencoder_files, build, build_documents, checkpoints, sharding
from cfjax.config_loading import config_to_json
from cfjax.data.image_files import read_images, write_npz
from cfjax.data.sources import MnistSource
from cfjax.evaluation import classifier as classifiers
from cfjax.metric_log import read_metrics
from cfjax.models.classifier import Classifier
from cfjax.train import train

pytestmark = pytest.mark.slow

NUM_TRAIN_STEPS = 5
OVERRIDES = {
    "train__num_train_steps": NUM_TRAIN_STEPS,
    "train__log_every": 1,
    "train__checkpoint_every": 1,
    "train__keep_checkpoints": NUM_TRAIN_STEPS + 1,
    "optimizer__warmup_steps": 1,  # the first train step only gathers its gradients
    # With a small ε, Adam makes whole updates of gradients that are rounding alone.
    "optimizer__eps": 1e-3,
}
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"data": 1, "fsdp": 8},
    "data=2,fsdp=2,tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}
TWO_PROCESSES_MESH = {"data": 2, "fsdp": 4}


def mesh_overrides(sizes):
    return OVERRIDES | {f"mesh__{axis}": size for axis, size in sizes.items()}


def save_start(config, workdir):
    """A checkpoint of train step 0."""
    mesh = sharding.make_mesh()
    program = build.train_program(config, mesh)
    init = build.init_state(program.settings.model, program.settings.optimizer)
    state = sharding.born_sharded(init, mesh, jax.random.key(0))
    random = tiny.random_params(program.settings.model)
    random = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), random, state.params)
    state = state.replace(params=random, ema_params=jax.tree.map(np.copy, random))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.abstract_state))
    with checkpoints.CheckpointWriter(workdir, keep_last=1) as writer:
        writer.save(state, config_to_json(config), 0)
    return workdir


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tiny.config(**OVERRIDES), tmp_path_factory.mktemp("start"))


@pytest.fixture
def workdir(start, tmp_path):
    shutil.copytree(start / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


@pytest.fixture(scope="module")
def on_one_device(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    shutil.copytree(start / "checkpoints", workdir / "checkpoints")
    launch(ONE_DEVICE, "train", *tiny.flags(**OVERRIDES), f"--workdir={workdir}")
    return workdir


def restored(workdir, train_step, config):
    program = build.train_program(config, sharding.make_mesh())
    state, examples_seen = checkpoints.restore_state(workdir, program.abstract_state, train_step)
    assert examples_seen == 16 * train_step
    return jax.device_get(state)


def assert_alike(tree, expected):
    """Within 1e-4, or 1e-6 of the largest value of all: some gradients are 0 but for rounding."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6 * largest, err_msg=name)


def assert_same_training(workdir, expected, config, names=("loss", "gradient_norm")):
    metrics = [read_metrics(folder) for folder in (workdir, expected)]
    assert [line["train_step"] for line in metrics[1]] == [1, 2, 3, 4, 5]
    for line, other in zip(*metrics, strict=True):
        for name in names:
            np.testing.assert_allclose(line[name], other[name], rtol=1e-5, err_msg=name)
    first, last = (
        [restored(folder, step, config) for folder in (workdir, expected)] for step in (1, 5)
    )
    # Adam's first moment after one train step is a tenth of the gradients, clipped.
    moments = [state.opt_state[1][0].mu for state in first]
    assert_alike(*moments)
    for part in ("params", "ema_params"):
        assert_alike(*(getattr(state, part) for state in last))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(MESHES["data=8"], id="data=8", marks=pytest.mark.long),
        pytest.param(MESHES["fsdp=8"], id="fsdp=8", marks=pytest.mark.long),
        pytest.param(MESHES["data=2,fsdp=2,tensor=2"], id="data=2,fsdp=2,tensor=2"),
    ],
)
def test_train_steps_are_the_same_on_a_mesh(on_one_device, workdir, sizes):
    train(tiny.config(**mesh_overrides(sizes)), workdir)
    assert_same_training(workdir, on_one_device, tiny.config(**OVERRIDES))


@pytest.mark.long
@pytest.mark.multiprocess
def test_train_steps_are_the_same_on_two_processes(on_one_device, workdir):
    overrides = mesh_overrides(TWO_PROCESSES_MESH)
    launch(TWO_PROCESSES, "train", *tiny.flags(**overrides), f"--workdir={workdir}")
    assert_same_training(workdir, on_one_device, tiny.config(**OVERRIDES))


@pytest.fixture(scope="module")
def documents_on_one_device(tmp_path_factory):
    """The same of a model of documents, which has its checkpoint of train step 0 too."""
    workdir = tmp_path_factory.mktemp("documents")
    config = tiny.document_config(**OVERRIDES)
    config.text.checksum = build_documents.tokenizer(config).checksum  # as training sets it
    save_start(config, workdir)
    launch(ONE_DEVICE, "train", *tiny.document_flags(**OVERRIDES), f"--workdir={workdir}")
    return workdir


def start_of_documents(expected, workdir):
    shutil.copytree(expected / "checkpoints/0", workdir / "checkpoints/0")
    return workdir


def assert_same_training_of_documents(workdir, expected):
    names = ("loss", "loss/image", "loss/text", "gradient_norm")
    assert_same_training(workdir, expected, tiny.document_config(**OVERRIDES), names)


@pytest.mark.long
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_train_steps_of_documents_are_the_same_on_a_mesh(documents_on_one_device, tmp_path, sizes):
    start_of_documents(documents_on_one_device, tmp_path)
    train(tiny.document_config(**mesh_overrides(sizes)), tmp_path)
    assert_same_training_of_documents(tmp_path, documents_on_one_device)


@pytest.mark.long
@pytest.mark.multiprocess
def test_train_steps_of_documents_are_the_same_on_two_processes(documents_on_one_device, tmp_path):
    start_of_documents(documents_on_one_device, tmp_path)
    overrides = mesh_overrides(TWO_PROCESSES_MESH)
    launch(TWO_PROCESSES, "train", *tiny.document_flags(**overrides), f"--workdir={tmp_path}")
    assert_same_training_of_documents(tmp_path, documents_on_one_device)


@pytest.fixture(scope="module")
def autoencoder_on_one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("autoencoder")
    launch(ONE_DEVICE, "train_autoencoder", *autoencoder_flags(), f"--workdir={workdir}")
    return workdir


def autoencoder_flags():
    return tiny.autoencoder_flags(optimizer__eps=1e-3, train__log_every=1, train__sample_every=3)


@pytest.mark.long
@pytest.mark.multiprocess
@pytest.mark.parametrize("place", [(1, 8), TWO_PROCESSES])
def test_autoencoders_are_the_same_everywhere(autoencoder_on_one_device, tmp_path, place):
    launch(place, "train_autoencoder", *autoencoder_flags(), f"--workdir={tmp_path}")
    metrics = [read_metrics(folder) for folder in (tmp_path, autoencoder_on_one_device)]
    assert [line["train_step"] for line in metrics[1]] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(*metrics, strict=True):
        for name in ("loss", "gradient_norm", "reconstruction", "kl", "psnr"):
            np.testing.assert_allclose(line[name], other[name], rtol=1e-4, err_msg=name)
    reports = [
        json.loads((folder / "autoencoder/training.json").read_text())
        for folder in (tmp_path, autoencoder_on_one_device)
    ]
    for name in ("psnr", "latent_std"):
        np.testing.assert_allclose(reports[0][name], reports[1][name], rtol=1e-4)
    ours, expected = (
        autoencoder_files.load(folder / "autoencoder")
        for folder in (tmp_path, autoencoder_on_one_device)
    )
    assert_alike(ours.params, expected.params)


@pytest.fixture(scope="module")
def samples(start, tmp_path_factory):
    """Images of 20 classes in a row, by one device."""
    out = tmp_path_factory.mktemp("samples") / "one.npz"
    launch(ONE_DEVICE, "sample", *sample_flags(start, out))
    return read_images(out)


def sample_flags(start, out):
    return [f"--checkpoint={start}", f"--out={out}", "--num_samples=20", "--num_ar_steps=4"]


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_samples_are_the_same_on_a_mesh(start, samples, sizes):
    """To the bit; over `tensor` sums are split, which may round over the edge of a grey level."""
    expected, labels = samples
    sampler = cfjax.load(start, mesh=sharding.make_mesh(**sizes))
    images = sampler.generate(labels, num_ar_steps=4)
    if sizes.get("tensor", 1) == 1:
        np.testing.assert_array_equal(images, expected)
    difference = np.abs(images.astype(int) - expected)
    assert difference.max() <= 1 and np.mean(difference) < 1e-3


@pytest.mark.multiprocess
def test_samples_are_the_same_on_two_processes(start, samples, tmp_path):
    launch(TWO_PROCESSES, "sample", *sample_flags(start, tmp_path / "two.npz"), "--fsdp=4")
    images, labels = read_images(tmp_path / "two.npz")
    np.testing.assert_array_equal(labels, samples[1])
    np.testing.assert_array_equal(images, samples[0])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """What the evaluation finds and need not train: a classifier as it was initialized."""
    folder = tmp_path_factory.mktemp("scores") / "classifier"

    def untrained(images, labels, num_classes, training):
        model = Classifier(num_classes)
        return model.init(jax.random.key(0), images[:1].astype(np.float32))["params"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "fit", untrained)
        classifiers.load_or_train(folder, MnistSource("train"), MnistSource("held_out"))
    return folder


@pytest.mark.long
@pytest.mark.multiprocess
def test_scores_are_the_same_everywhere(start, classifier, tmp_path):
    """The first of two processes scores what both made."""
    scores = []
    for place, mesh_flags in [
        (ONE_DEVICE, []),
        ((1, 8), ["--fsdp=2", "--tensor=2"]),
        (TWO_PROCESSES, ["--fsdp=4"]),
    ]:
        out = tmp_path / str(place)
        shutil.copytree(classifier, out / "classifier")
        flags = [f"--checkpoint={start}", f"--out={out}", "--num_samples=30", "--ar_steps=1,4"]
        launch(place, "evaluate", *flags, *mesh_flags)
        scores.append(json.loads((out / "scores.json").read_text()))
    assert len({score["protocol"]["feature extractor"] for score in scores}) == 1
    for score in scores[1:]:
        for row, expected in zip(score["scores"], scores[0]["scores"], strict=True):
            assert row["name"] == expected["name"]
            assert row["class agreement"] == expected["class agreement"]
            # Pixels that differ by one grey level move the features by so much.
            name = "FID-30 (mnist-classifier)"
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-4)


@pytest.mark.long
@pytest.mark.multiprocess
def test_statistics_of_inceptions_features_are_the_same_everywhere(tmp_path):
    """Also for other batches, whose last one is not full: no padding is in them."""
    weights = random_inception.save(tmp_path / "inception.safetensors")
    images = tiny_features.images(11, size=32, channels=3)
    write_npz(tmp_path / "real.npz", images, np.zeros(11, np.int32))
    found = []
    for place, batch_size in [(ONE_DEVICE, 11), ((1, 8), 4), (TWO_PROCESSES, 7)]:
        out = tmp_path / f"{place}.npz"
        flags = [f"--images={tmp_path / 'real.npz'}", f"--inception_weights={weights}"]
        flags += [f"--out={out}", f"--batch_size={batch_size}", "--inception_images_per_device=2"]
        launch(place, "reference_stats", *flags)
        with np.load(out) as arrays:
            found.append({name: arrays[name] for name in arrays if name != "card"})
    assert found[0]["features"].shape == (11, 2048)
    np.testing.assert_allclose(found[0]["mu"], found[0]["features"].mean(0), rtol=1e-5, atol=1e-6)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, array in found[0].items():
            scale = np.abs(array).max()
            np.testing.assert_allclose(
                other[name], array, rtol=1e-9, atol=1e-9 * scale, err_msg=name
            )


@pytest.mark.long
@pytest.mark.multiprocess
def test_scores_in_training_are_the_same_everywhere(start, tmp_path):
    weights = random_inception.save(tmp_path / "inception.safetensors")
    write_npz(tmp_path / "real.npz", tiny_features.images(9, size=28), np.zeros(9, np.int32))
    overrides = OVERRIDES | {
        "train__num_train_steps": 1,
        "evaluation__every": 1,
        "evaluation__num_samples": 10,
        "evaluation__inception_weights": str(weights),
        "evaluation__reference": str(tmp_path / "real.npz"),
        "sampling__images_per_device": 1,
    }
    distances = []
    for place, mesh in ((ONE_DEVICE, {}), (TWO_PROCESSES, TWO_PROCESSES_MESH)):
        workdir = tmp_path / str(place)
        shutil.copytree(start / "checkpoints", workdir / "checkpoints")
        flags = tiny.flags(**overrides, **{f"mesh__{axis}": size for axis, size in mesh.items()})
        launch(place, "train", *flags, f"--workdir={workdir}")
        (line,) = [line for line in read_metrics(workdir) if "evaluation/fid" in line]
        distances.append(line["evaluation/fid"])
    # Parameters after a train step differ by rounding, and so do the pixels of their samples.
    np.testing.assert_allclose(distances[1], distances[0], rtol=1e-2)
