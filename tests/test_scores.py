"""Scores of features, and the report that they come in."""

import json

import numpy as np
import pytest
import tiny_features

from cfjax.errors import UserError
from cfjax.evaluation import references
from cfjax.evaluation.extractors import Features
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.inception_score import inception_score
from cfjax.evaluation.kernel_distance import kernel_distance_of_subsets
from cfjax.evaluation.precision_recall import precision_recall
from cfjax.evaluation.references import ReferenceBuilder
from cfjax.evaluation.report import Report, floor_distance
from cfjax.evaluation.scores import Protocol, Score, score, score_statistics
from cfjax.evaluation.statistics import FeatureStatistics

EXTRACTOR = tiny_features.TinyExtractor()
DEFAULT = Protocol(metrics=EXTRACTOR.default_metrics, may_leave_out=True)
REAL = EXTRACTOR(tiny_features.images(60, seed=1))
SAMPLES = EXTRACTOR(tiny_features.images(50, seed=2))


def reference_of(features):
    builder = ReferenceBuilder("real", len(features), (8, 8, 1))
    builder.add(features)
    return builder.finish()


REFERENCE = reference_of(REAL)
STATISTICS = [FeatureStatistics.of(it.pool) for it in (SAMPLES, REAL)]


def blocks(*ends):
    for begin, end in zip((0, *ends), (*ends, 50), strict=True):
        yield Features(**{name: it[begin:end] for name, it in SAMPLES.arrays().items()})


@pytest.mark.parametrize("ends", [(), (1,), (20, 33)])
def test_every_score_is_the_one_of_its_function(ends):
    protocol = Protocol(
        metrics=("fid", "sfid", "is", "pr", "kid"),
        pr_arithmetic="float32",
        is_split_size=20,
        kid_subsets=3,
        kid_subset_size=30,
        seed=5,
    )
    row = score("a", blocks(*ends), None, REFERENCE, protocol)
    assert (row.name, row.num_samples, row.left_out) == ("a", 50, {})
    values = row.values
    spatial = [FeatureStatistics.of(it.spatial) for it in (SAMPLES, REAL)]
    assert values["fid"] == pytest.approx(frechet_distance(*STATISTICS), rel=1e-9)
    assert values["sfid"] == pytest.approx(frechet_distance(*spatial), rel=1e-9)
    found = inception_score(SAMPLES.logits, 20)
    assert (values["inception_score"], values["inception_score_std"]) == (found.mean, found.std)
    found = precision_recall(REAL.pool, SAMPLES.pool, 3, "float32")
    assert (values["precision"], values["recall"]) == (found.precision, found.recall)
    kid = kernel_distance_of_subsets(REAL.pool, SAMPLES.pool, 3, 30, 5)
    assert (values["kid"], values["kid_std"]) == kid
    assert "class_agreement" not in values


def test_class_agreement_is_the_share_of_the_labels():
    classes = np.arange(50) % 10
    labels = np.where(np.arange(50) < 20, classes, (classes + 1) % 10)
    parts = [
        Features(SAMPLES.pool[rows], classes=classes[rows]) for rows in (slice(33), slice(33, 50))
    ]
    row = score("a", parts, labels, REFERENCE, DEFAULT)
    assert row.values["class_agreement"] == 0.4
    assert set(row.left_out) == {"sfid", "is"}
    assert "class_agreement" not in score("a", parts, None, REFERENCE, Protocol()).values


def test_the_interval_holds_the_distance_of_many_samples():
    many = EXTRACTOR(tiny_features.images(3000, seed=3))
    row = score("a", [many], None, REFERENCE, Protocol(metrics=("fid",), bootstrap=50))
    low, high = row.values["fid_low"], row.values["fid_high"]
    assert low < high < 1.5 * row.values["fid"]
    assert low < 1.05 * row.values["fid"]


@pytest.mark.parametrize(
    ("metric", "features", "reference", "words"),
    [
        ("sfid", Features(SAMPLES.pool), REFERENCE, "the extractor has no spatial features"),
        ("is", Features(SAMPLES.pool), REFERENCE, "no logits of Inception"),
        ("sfid", SAMPLES, reference_of(Features(REAL.pool)), "the reference has no mu_s"),
        ("pr", SAMPLES, references.Reference("adm", STATISTICS[1]), "has statistics alone"),
        ("kid", SAMPLES, references.Reference("adm", STATISTICS[1]), "has statistics alone"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had_is_refused(metric, features, reference, words):
    with pytest.raises(UserError, match=words):
        score("a", [features], None, reference, Protocol(metrics=("fid", metric)))
    if metric != "kid":
        row = score("a", [features], None, reference, DEFAULT)
        assert words in row.left_out[metric]


def test_no_samples_and_unknown_metrics_are_refused():
    with pytest.raises(UserError, match="a has no samples"):
        score("a", [], None, REFERENCE, Protocol())
    with pytest.raises(UserError, match="unknown metric 'fidd'; did you mean 'fid'"):
        Protocol(metrics=("fidd",))
    with pytest.raises(UserError, match="unknown arithmetic 'float64'"):
        Protocol(pr_arithmetic="float64")


@pytest.mark.parametrize(
    ("protocol", "counts", "words"),
    [
        (
            Protocol(metrics=("kid",)),
            (999, 5000),
            "subsets of 1000, but there are 999 samples and 5000",
        ),
        (Protocol(metrics=("kid",)), (5000, 999), "and 999 real images"),
        (Protocol(metrics=("pr",)), (3, 10), "need more than 3 images, but there are 3 samples"),
        (Protocol(fid_infinity=True), (5000, None), "needs more than 5000 samples, got 5000"),
    ],
)
def test_too_few_images_are_refused_before_they_are_made(protocol, counts, words):
    with pytest.raises(UserError, match=words):
        protocol.check_counts(*counts)
    Protocol(metrics=("kid", "pr"), fid_infinity=True).check_counts(5001, 1000)
    Protocol(metrics=("pr",), may_leave_out=True).check_counts(2, None)


def test_without_neighbours_precision_is_left_out():
    few = Features(**{name: it[:3] for name, it in SAMPLES.arrays().items()})
    row = score("a", [few], None, REFERENCE, DEFAULT)
    assert row.left_out == {"pr": "that takes more than 3 images"}
    assert "precision" not in row.values and row.values["fid"] > 0


def test_statistics_alone_give_the_two_distances():
    other = reference_of(SAMPLES)
    row = score_statistics("a", other, REFERENCE, DEFAULT)
    assert row.values == {
        "fid": pytest.approx(frechet_distance(*STATISTICS)),
        "sfid": pytest.approx(frechet_distance(other.spatial, REFERENCE.spatial)),
    }
    bare = references.Reference("adm", STATISTICS[1])
    assert set(row.left_out) == {"is", "pr"}
    assert set(score_statistics("a", other, bare, DEFAULT).left_out) == {"sfid", "is", "pr"}
    with pytest.raises(UserError, match="asks for pr, but a has statistics alone"):
        score_statistics("a", other, REFERENCE, Protocol(metrics=("pr",)))


def test_a_reference_comes_back_and_is_one_of_the_adm_suite(tmp_path):
    path = tmp_path / "reference.npz"
    references.save(path, REFERENCE, EXTRACTOR)
    again = references.load(path, EXTRACTOR)
    assert frechet_distance(again.pool, REFERENCE.pool) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(again.spatial, REFERENCE.spatial) == pytest.approx(0, abs=1e-9)
    np.testing.assert_array_equal(again.features, REAL.pool)
    assert (again.pool.count, again.image_shape) == (60, (8, 8, 1))
    assert "real" in again.name and references.file_checksum(path) in again.name
    with np.load(path) as arrays:
        np.testing.assert_allclose(arrays["mu"], REAL.pool.astype(np.float64).mean(0))
        np.testing.assert_allclose(arrays["sigma"], np.cov(REAL.pool.T.astype(np.float64)))
        np.testing.assert_allclose(arrays["sigma_s"], np.cov(REAL.spatial.T.astype(np.float64)))


def test_references_of_others_are_read(tmp_path):
    pool = STATISTICS[1]
    np.savez(tmp_path / "fid.npz", mu=pool.mean.astype(np.float32), sigma=pool.covariance)
    found = references.load(tmp_path / "fid.npz", EXTRACTOR)
    assert (found.pool.count, found.spatial, found.features) == (None, None, None)
    assert frechet_distance(STATISTICS[0], found.pool) == pytest.approx(
        frechet_distance(*STATISTICS), rel=1e-5
    )
    np.savez(tmp_path / "images.npz", arr_0=tiny_features.images(3))
    assert references.load(tmp_path / "images.npz", EXTRACTOR) is None


def test_references_of_other_features_are_refused(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match=r"reference\.npz is of 5 features, but the samples have 6"):
        references.load(path, EXTRACTOR)
    np.savez(path, mu=np.zeros(6), sigma=np.eye(5))
    with pytest.raises(UserError, match="do not fit each other"):
        references.load(path, EXTRACTOR)
    references.save(path, REFERENCE, EXTRACTOR)
    other = tiny_features.TinyExtractor()
    other.description = "another extractor"
    with pytest.raises(UserError, match="features of a tiny extractor of sha256 123, but"):
        references.load(path, other)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"reference\.npz can't be read as \.npz"):
        references.load(path, EXTRACTOR)


def test_the_floor_falls_with_more_images():
    rng = np.random.default_rng(0)
    x = 1000 + rng.normal(size=(4000, 6)) @ rng.normal(size=(6, 6))
    assert 0 < floor_distance(x) < floor_distance(x[:200])


def make_report(num_samples=100, extractor="mnist-classifier", **values):
    values = values or {"fid": 12.3, "class_agreement": 0.9}
    return Report(
        extractor,
        [Score("S = 7", num_samples, values)],
        64,
        {"seed": 3},
        floor=1.5,
        held_out_accuracy=0.98,
    )


def warnings_in_json(report):
    return json.loads(report.to_json())["warnings"]


def test_a_report_names_its_distance_and_its_protocol(tmp_path):
    report = make_report()
    document = json.loads(report.to_json())
    assert document["scores"] == [
        {"name": "S = 7", "FID-100 (mnist-classifier)": 12.3, "class agreement": 0.9}
    ]
    table = report.table()
    for words in ("FID-100 (mnist-classifier)", "S = 7", "12.30", "90.0%", "1.50", "98.0%"):
        assert words in table
    assert "seed: 3" in table
    report.save(tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == document


def test_a_report_warns():
    assert "bias the distance upwards" in make_report().table()
    assert make_report(2048).warnings() == warnings_in_json(make_report(2048)) == []
    few = make_report(64)
    assert "64 samples give 64 features a singular covariance" in few.table()
    assert len(few.warnings()) == 2 and few.warnings() == warnings_in_json(few)
    assert len(make_report(65).warnings()) == 1
    unknown = Report(
        "x", [Score("a", 5000, {"fid": 1.0}, {"is": "why"})], 64, {}, extractor_warning="Beware."
    )
    assert unknown.warnings() == ["Beware.", "Not scored: is, as why."]
    assert "Beware." in unknown.table()


def test_an_unknown_number_of_samples_is_said():
    report = make_report(None)
    assert "FID-unknown (mnist-classifier)" in report.table()
    assert report.warnings() == [
        "The number of samples is unknown: distances of other numbers differ."
    ]


def test_only_the_known_inception_makes_a_plain_fid():
    values = {"fid": 3.0, "sfid": 6.0, "inception_score": 200.0, "precision": 0.8, "kid": 0.00123}
    table = make_report(50_000, "inception", **values).table()
    for words in ("FID-50000 ", "sFID-50000", "IS", "80.0%", "0.00123"):
        assert words in table
    table = make_report(50_000, "unknown inception", **values).table()
    for words in ("FID-50000", "sFID-50000", "IS", "precision", "KID"):
        assert f"{words} (unknown inception)" in table


def test_the_best_row_is_named_and_the_csv_has_all():
    rows = [
        Score(f"guidance_scale = {g}", 5000, {"fid": fid, "inception_score": 9.0})
        for g, fid in ((1, 5.0), (2, 4.0), (3, 6.0))
    ]
    report = Report("inception", rows, 64, {})
    assert json.loads(report.to_json())["best"] == "guidance_scale = 2"
    assert report.to_csv().splitlines() == [
        "name,FID-5000,IS",
        "guidance_scale = 1,5.0,9.0",
        "guidance_scale = 2,4.0,9.0",
        "guidance_scale = 3,6.0,9.0",
    ]
