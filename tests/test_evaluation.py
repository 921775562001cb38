"""Scores: statistics, the Fréchet distance, the classifier and its cache, reports, the program."""

import json
import sys

import numpy as np
import pytest
import scipy.linalg
import svc_judge
import tiny
from absl import flags

from cfjax import evaluate
from cfjax.data.image_files import write_npz
from cfjax.data.sources import MnistSource, all_images
from cfjax.errors import UserError
from cfjax.evaluation import classifier as classifiers
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.report import Report, Score, floor_distance, score
from cfjax.evaluation.statistics import FeatureStatistics
from cfjax.train import train

# ml_collections loads config files that way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
QUICK = classifiers.ClassifierTraining(epochs=3, batch_size=50)


class Subset:
    """Every n-th image of a source."""

    def __init__(self, source, stride):
        self._source, self._stride = source, stride
        self.class_names, self.image_shape = source.class_names, source.image_shape

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


def features(num_samples, num_features=6, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_features, num_features))
    return (1000 + rng.normal(size=(num_samples, num_features)) @ mixing).astype(np.float32)


@pytest.mark.parametrize("batches", [[100], [1] * 100, [33, 1, 66], [0, 50, 0, 50]])
def test_streamed_statistics_equal_numpy(batches):
    """float64 rounding: 1e-12 of values, though the mean is 1000 times the deviation."""
    x = features(100)
    statistics = FeatureStatistics.empty(6)
    for batch in np.split(x, np.cumsum(batches)[:-1]):
        statistics = statistics.update(batch)
    wide = x.astype(np.float64)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(wide.T), rtol=1e-9, atol=1e-10)


def test_merging_in_another_order_is_the_same():
    parts = [FeatureStatistics.of(features(n, seed=n)) for n in (3, 50, 7)]
    a = parts[0].merge(parts[1]).merge(parts[2])
    b = parts[2].merge(parts[0].merge(parts[1]))
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-11)


def test_statistics_are_saved_and_damage_is_refused(tmp_path):
    statistics = FeatureStatistics.of(features(20))
    statistics.save(tmp_path / "real.npz")
    again = FeatureStatistics.load(tmp_path / "real.npz")
    assert again.count == 20
    np.testing.assert_array_equal(again.scatter, statistics.scatter)
    assert [p.name for p in tmp_path.iterdir()] == ["real.npz"]
    (tmp_path / "real.npz").write_bytes(b"PK")
    for name in ("real.npz", "missing.npz"):
        with pytest.raises(UserError, match=f"{name} is no file of feature statistics"):
            FeatureStatistics.load(tmp_path / name)


def test_a_covariance_of_one_sample_is_refused():
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        _ = FeatureStatistics.of(features(1)).covariance


@pytest.mark.parametrize("num_samples", [200, 5])
def test_frechet_distance_equals_scipy(num_samples):
    """Also for singular covariances (5 samples of 6 features), where sqrtm has errors of 1e-6."""
    a, b = FeatureStatistics.of(features(num_samples)), FeatureStatistics.of(features(300, seed=1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    difference = a.mean - b.mean
    expected = difference @ difference + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(b, a), expected, rtol=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: |μa - μb|² + Σ (σa - σb)²."""

    def gaussian(mean, deviations):
        return FeatureStatistics(11, np.array(mean), 10 * np.diag(np.square(deviations)))

    a, b = gaussian([0.0, 1.0], [1.0, 2.0]), gaussian([3.0, 5.0], [4.0, 0.0])
    np.testing.assert_allclose(frechet_distance(a, b), 25 + 9 + 4, rtol=1e-12)
    assert abs(frechet_distance(a, a)) < 1e-12


def test_the_floor_falls_with_more_images():
    x = features(4000)
    assert 0 < floor_distance(x) < floor_distance(x[:200])


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


def make_report(num_samples=100):
    return Report(
        "mnist-classifier", [Score("S = 7", num_samples, 12.3, 0.9)], 1.5, 0.98, 64, {"seed": 3}
    )


def document_warnings(report):
    return json.loads(report.to_json())["warnings"]


def test_a_report_names_its_distance_and_its_protocol(tmp_path):
    report = make_report()
    document = json.loads(report.to_json())
    assert document["scores"] == [
        {"name": "S = 7", "FID-100 (mnist-classifier)": 12.3, "class_agreement": 0.9}
    ]
    table = report.table()
    for words in ("FID-100 (mnist-classifier)", "S = 7", "12.30", "90.0%", "1.50", "98.0%"):
        assert words in table
    assert "seed: 3" in table
    assert "bias the distance upwards" in table
    assert make_report(2048).warnings() == document_warnings(make_report(2048)) == []
    few = make_report(64)
    assert "64 samples give 64 features a singular covariance" in few.table()
    assert len(few.warnings()) == 2 and few.warnings() == document_warnings(few)
    assert len(make_report(65).warnings()) == 1
    report.save(tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == document


def test_score_streams():
    x = features(50)
    classes = np.arange(50) % 10
    labels = np.where(np.arange(50) < 20, classes, (classes + 1) % 10)
    batches = [(x[rows], classes[rows], labels[rows]) for rows in (slice(0, 33), slice(33, 50))]
    row = score("a", iter(batches), FeatureStatistics.of(x))
    assert (row.num_samples, row.class_agreement) == (50, 0.4)
    assert abs(row.fid) < 1e-6 * np.square(x).mean()
    unlabelled = score("a", [(x, classes, None)], FeatureStatistics.of(x))
    assert unlabelled.class_agreement is None


@pytest.fixture
def small_program(real, monkeypatch, classifier):
    """The program on a quarter of the digits, with the classifier of these tests."""
    monkeypatch.setattr(
        evaluate.build_data, "images", lambda _, split, *__: real[split == "held_out"]
    )
    monkeypatch.setattr(evaluate, "load_or_train", lambda *_: classifier)

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
        assert (row["class_agreement"] > 0.8) == (name == "real")
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
