"""`cfjax.evaluate` and `cfjax.reference_stats` with the ADM suite's kind of extractor, a small one."""

import json

import numpy as np
import pytest
import runs
import tiny
import tiny_features

import cfjax
from cfjax import evaluate, evaluation_inputs, reference_stats
from cfjax.data.image_files import read_image, write_npz, write_png
from cfjax.errors import UserError
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.statistics import FeatureStatistics
from cfjax.train import train

# ml_collections loads config files that way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
INCEPTION = "--inception_weights=inception.safetensors"
REAL, SAMPLES = (tiny_features.images(count, seed, 28) for count, seed in ((60, 1), (50, 2)))


@pytest.fixture
def run(monkeypatch):
    """Runs a program; returns the extractor that it used."""

    def run(program, *arguments):
        extractor = tiny_features.TinyExtractor()
        monkeypatch.setattr(evaluation_inputs, "inception", lambda *_: extractor)
        runs.run_in_process(program, list(map(str, arguments)))
        return extractor

    return run


@pytest.fixture
def files(tmp_path):
    """Samples, and the same reference as `.npz`, as a folder, and as statistics of the ADM kind."""
    write_npz(tmp_path / "samples.npz", SAMPLES, np.zeros(50, np.int32))
    np.savez(tmp_path / "real.npz", arr_0=REAL)
    (tmp_path / "real").mkdir()
    for index, image in enumerate(REAL):
        write_png(tmp_path / "real" / f"{index:03}.png", image)
    statistics = of(REAL)
    np.savez(tmp_path / "adm.npz", arr_0=REAL[:20], mu=statistics.mean, sigma=statistics.covariance)
    return tmp_path


def of(images):
    return FeatureStatistics.of(tiny_features.TinyExtractor()(images).pool)


def scores(out):
    return json.loads((out / "scores.json").read_text())


@pytest.mark.parametrize("reference", ["real.npz", "real", "made.npz", "adm.npz"])
def test_all_kinds_of_references_are_the_same(run, files, reference):
    if reference == "made.npz":
        run(reference_stats, f"--images={files / 'real'}", INCEPTION, f"--out={files / reference}")
    samples, out = f"--samples={files / 'samples.npz'}", files / "out"
    run(evaluate, samples, f"--reference={files / reference}", INCEPTION, f"--out={out}")
    (row,) = scores(out)["scores"]
    assert row["FID-50 (tiny)"] == pytest.approx(frechet_distance(of(SAMPLES), of(REAL)), rel=1e-6)
    assert {"IS (tiny)", "precision (tiny)", "recall (tiny)"} <= row.keys()
    # The ADM kind without mu_s: sFID is not there, and the report says why.
    assert ("sFID-50 (tiny)" in row) == (reference != "adm.npz")
    assert any("sfid" in it for it in scores(out)["warnings"]) == (reference == "adm.npz")
    protocol = scores(out)["protocol"]
    assert reference in protocol["reference"] and "sha256" in protocol["feature extractor"]
    assert sorted(it.name for it in out.iterdir()) == [
        "samples_samples.npz.png",
        "scores.csv",
        "scores.json",
    ]


def test_statistics_are_samples_too(run, files):
    for name in ("real", "samples.npz"):
        run(
            reference_stats,
            f"--images={files / name}",
            INCEPTION,
            f"--out={files / name}.stats.npz",
        )
    samples, reference = (files / f"{name}.stats.npz" for name in ("samples.npz", "real"))
    out = files / "out"
    extractor = run(
        evaluate, f"--samples={samples}", f"--reference={reference}", INCEPTION, f"--out={out}"
    )
    assert extractor.calls == []
    (row,) = scores(out)["scores"]
    assert row["FID-50 (tiny)"] == pytest.approx(frechet_distance(of(SAMPLES), of(REAL)), rel=1e-6)
    assert row["sFID-50 (tiny)"] > 0


def test_a_killed_reference_goes_on(run, files, monkeypatch):
    monkeypatch.setattr("cfjax.evaluation.references._SAVE_EVERY", 10)
    out, call = files / "made.npz", tiny_features.TinyExtractor.__call__
    arguments = [f"--images={files / 'real'}", INCEPTION, f"--out={out}", "--batch_size=10"]

    def dying(self, images, first_index=0):
        if first_index == 30:
            raise KeyboardInterrupt
        return call(self, images, first_index)

    monkeypatch.setattr(tiny_features.TinyExtractor, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        run(reference_stats, *arguments)
    assert not out.exists()
    monkeypatch.setattr(tiny_features.TinyExtractor, "__call__", call)
    extractor = run(reference_stats, *arguments)
    assert extractor.calls == [(30, 10), (40, 10), (50, 10)]
    with np.load(out) as arrays:
        np.testing.assert_allclose(arrays["sigma"], of(REAL).covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples={}/samples.npz"], "--samples needs --config too"),
        (
            ["--samples={}/samples.npz", "--reference={}/no.npz", INCEPTION],
            "there is no reference at",
        ),
        (["--samples={}/samples.npz", "--reference={}/real"], "without Inception's weights"),
        (
            ["--samples={}/samples.npz", "--reference={}/small.npz", INCEPTION],
            r"the samples are 28x28, but the reference small\.npz.* is of 8x8",
        ),
        (
            ["--samples={}/samples.npz", "--reference={}/real", INCEPTION, "--metrics=fid,is,kid2"],
            "unknown metric 'kid2'; did you mean 'kid'",
        ),
        (
            ["--samples={}/samples.npz", "--reference={}/real", INCEPTION, "--sweep=eta=0"],
            "it goes with --checkpoint",
        ),
        (
            ["--samples={}/bare.npz", "--reference={}/real"],
            "has statistics alone; pass --inception",
        ),
    ],
)
def test_evaluate_refuses(run, files, arguments, words):
    write_npz(files / "small.npz", tiny_features.images(5), np.zeros(5, np.int32))
    np.savez(files / "bare.npz", mu=np.zeros(6), sigma=np.eye(6))
    out = files / "out"
    with pytest.raises(UserError, match=words):
        run(evaluate, *(it.format(files) for it in arguments), f"--out={out}")
    assert not (out / "scores.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out={}/a.npz"], "pass either --dataset or --images"),
        (["--images={}/real", "--out={}/a.npy"], r"a\.npy must end in \.npz"),
        (["--images={}/real", "--out={}/real.npz"], r"real\.npz is there already"),
        (["--dataset=mnist", "--out={}/a.npz"], "--dataset needs --size and --num_classes too"),
        (["--images={}/nowhere", "--out={}/a.npz"], "there is no reference at"),
    ],
)
def test_reference_stats_refuses(run, files, arguments, words):
    with pytest.raises(UserError, match=words):
        run(reference_stats, INCEPTION, *(it.format(files) for it in arguments))
    assert not (files / "a.npz").exists()


def test_reference_stats_of_a_dataset(run, files):
    out = files / "mnist.npz"
    asked = ("--dataset=mnist", "--split=held_out", "--size=28", "--channels=1", "--num_classes=10")
    run(reference_stats, INCEPTION, *asked, f"--out={out}")
    with np.load(out) as arrays:
        card = json.loads(str(arrays["card"]))
        assert card["count"] == 1000 and "1000 held_out images of mnist" in card["name"]
        assert arrays["features"].shape == (1000, 6)


@pytest.mark.long
def test_a_sweep_names_the_best_and_makes_the_same_images(run, files):
    workdir, out = files / "run", files / "out"
    train(tiny.config(train__num_train_steps=3), workdir)
    run(
        evaluate,
        f"--checkpoint={workdir}",
        f"--reference={files / 'real.npz'}",
        INCEPTION,
        f"--out={out}",
        "--num_samples=12",
        "--sweep=guidance_scale=1.0,3.0",
        "--sweep=weights=ema,params",
        "--metrics=fid",
    )
    document = scores(out)
    names = [row["name"] for row in document["scores"]]
    assert names == [
        f"S = 1, guidance_scale = {scale}, weights = {weights}"
        for scale in (1.0, 3.0)
        for weights in ("ema", "params")
    ]
    distances = [row["FID-12 (tiny)"] for row in document["scores"]]
    assert len(set(distances)) == 4
    assert document["best"] == names[int(np.argmin(distances))]
    assert (out / "scores.csv").read_text().count("\n") == 5
    assert read_image(out / "sweep.png").size[0] > 100
    for weights, distance in zip(("ema", "params"), distances[2:], strict=True):
        model = cfjax.load(workdir, weights=weights)
        images = model.generate([i % 10 for i in range(12)], num_ar_steps=1, guidance_scale=3.0)
        assert frechet_distance(of(images), of(REAL)) == pytest.approx(distance, rel=1e-9)
    assert "swept: guidance_scale, weights" in document["protocol"]["sampler"]
    assert document["protocol"]["recipes"][2]["request"]["sampling"]["guidance_scale"] == 3.0
