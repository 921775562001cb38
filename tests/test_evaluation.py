"""Scoring by the classifier of the real images: it, its cache, and the program."""

import json
import sys

import numpy as np
import pytest
import svc_judge
import tiny
from absl import flags

from cfjax import evaluate, evaluation_inputs
from cfjax.data.image_files import write_npz
from cfjax.data.sources import MnistSource, all_images
from cfjax.errors import UserError
from cfjax.evaluation import classifier as classifiers
from cfjax.train import train

# ml_collections loads config files that way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
QUICK = classifiers.ClassifierTraining(epochs=3, batch_size=50)


class Subset:
    """Every n-th image of a source."""

    def __init__(self, source, stride):
        self._source, self._stride = source, stride
        self.class_names, self.image_shape = source.class_names, source.image_shape
        self.fingerprint = f"{source.fingerprint} {stride}"

    def __len__(self):
        return len(range(0, len(self._source), self._stride))

    def examples_at(self, indices):
        return self._source.examples_at(indices * self._stride)


@pytest.fixture(scope="module")
def real():
    return Subset(MnistSource("train"), 4), Subset(MnistSource("held_out"), 5)


@pytest.fixture(scope="module")
def folder(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    classifiers.load_or_train(folder, *real, QUICK)
    return folder


@pytest.fixture(scope="module")
def classifier(real, folder):
    return classifiers.load_or_train(folder, *real, QUICK)


def test_the_classifier_learns(classifier):
    assert classifier.held_out_accuracy > 0.85  # 3 epochs of 1,000 images


def test_features_do_not_depend_on_the_batch(classifier, real):
    images, _ = all_images(real[1])
    whole, classes = classifier.features(images[:7])
    alone, _ = classifier.features(images[6:7])
    assert whole.shape == (7, 64)
    assert classes.shape == (7,)
    np.testing.assert_allclose(whole[6:], alone, rtol=1e-5, atol=1e-5)


def test_training_is_deterministic(classifier, real):
    images, labels = all_images(real[0])
    again = classifiers.fit(images, labels, 10, QUICK)
    np.testing.assert_array_equal(again["logits"]["bias"], classifier.params["logits/bias"])


def test_the_kept_classifier_is_used_and_renewed_when_need_be(folder, real, tmp_path, monkeypatch):
    trained = []
    params = classifiers.load_or_train(folder, *real, QUICK).params
    nested = {}
    for name, value in params.items():
        layer, leaf = name.split("/")
        nested.setdefault(layer, {})[leaf] = value
    monkeypatch.setattr(classifiers, "fit", lambda *args: trained.append(args) or nested)
    copy = tmp_path / "classifier"
    classifiers.load_or_train(copy, *real, QUICK)
    assert len(trained) == 1
    classifiers.load_or_train(copy, *real, QUICK)
    assert len(trained) == 1
    classifiers.load_or_train(copy, Subset(real[0], 2), real[1], QUICK)  # other images
    assert len(trained) == 2
    other_held_out = Subset(real[1], 2)
    classifiers.load_or_train(copy, Subset(real[0], 2), other_held_out, QUICK)
    assert len(trained) == 3
    classifiers.load_or_train(copy, *real, classifiers.ClassifierTraining(epochs=4))
    assert len(trained) == 4
    (copy / "params.npz").write_bytes((copy / "params.npz").read_bytes()[:1000])
    classifiers.load_or_train(copy, *real, classifiers.ClassifierTraining(epochs=4))
    assert len(trained) == 5


@pytest.fixture
def small_program(real, monkeypatch, classifier):
    """The program on a quarter of the digits, with the classifier of these tests."""
    monkeypatch.setattr(
        evaluate.build_data, "images", lambda _, split, *__: real[split == "held_out"]
    )
    monkeypatch.setattr(evaluation_inputs, "load_or_train", lambda *_: classifier)

    def run(*arguments):
        before = list(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])  # the config's overrides
        try:
            evaluate.define_flags()
            flags.FLAGS(sys.argv)
            evaluate.main([])
        finally:
            flags.FLAGS.unparse_flags()
            flags.FLAGS.remove_flag_values([name for name in flags.FLAGS if name not in before])

    return run


def test_real_held_out_digits_score_near_the_floor(small_program, real, tmp_path, capsys):
    images, labels = all_images(real[1])
    write_npz(tmp_path / "real.npz", images, labels)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    write_npz(tmp_path / "noise.npz", noise, labels)
    distances = {}
    for name in ("real", "noise"):
        arguments = [f"--samples={tmp_path / name}.npz", f"--out={tmp_path / 'out'}"]
        small_program(*arguments, *tiny.flags())
        (row,) = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
        distances[name] = row["FID-200 (mnist-classifier)"]
        assert (row["class agreement"] > 0.8) == (name == "real")
    assert 20 * distances["real"] < distances["noise"]
    assert "FID-200 (mnist-classifier)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --checkpoint or --samples"),
        (["--checkpoint=a", "--samples=b"], "either --checkpoint or --samples"),
        (["--samples=nowhere.npz", *tiny.flags()], "there are no samples at nowhere.npz"),
        (["--samples=nowhere.npz"], "--samples needs --config too"),
        (["--checkpoint=nowhere"], "there is no folder nowhere"),
    ],
)
def test_the_program_refuses(small_program, arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        small_program(f"--out={tmp_path / 'out'}", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("width", "label", "words"),
    [
        (30, 0, r"the samples are \(28, 30, 1\), but the images of mnist"),
        (28, 10, "has labels outside the classes 0 to 9"),
    ],
)
def test_samples_that_do_not_fit_are_refused(small_program, tmp_path, width, label, words):
    images, labels = np.zeros((4, 28, width, 1), np.uint8), np.full(4, label, np.int32)
    write_npz(tmp_path / "odd.npz", images, labels)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=words):
        small_program(f"--samples={tmp_path / 'odd.npz'}", f"--out={out}", *tiny.flags())
    assert not out.exists()


def test_a_checkpoint_is_scored(small_program, tmp_path):
    run = tmp_path / "run"
    train(tiny.config(train__num_train_steps=3, train__checkpoint_every=1), run)
    checkpoint, out = run / "checkpoints" / "2", tmp_path / "out"
    small_program(
        f"--checkpoint={checkpoint}", f"--out={out}", "--num_samples=30", "--ar_steps=1,4"
    )
    document = json.loads((out / "scores.json").read_text())
    assert [row["name"] for row in document["scores"]] == ["S = 1", "S = 4"]
    for row in document["scores"]:
        assert row["FID-30 (mnist-classifier)"] > document["floor (mnist-classifier)"]
    assert "train step 2," in document["protocol"]["checkpoint"]
    assert "4 denoising steps of ddim" in document["protocol"]["sampler"]


def test_the_judge_is_right_about_real_digits():
    images, labels = all_images(MnistSource("held_out"))
    assert svc_judge.agreement(svc_judge.train(), images, labels) > 0.95
