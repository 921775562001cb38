"""Scores of models of documents: the program, what it keeps, and each table against its functions.

Longer than most files: all tables are asked of the same tiny runs.
"""

import json

import numpy as np
import pytest
import runs
import tiny
import tiny_documents
import tiny_features

import cfjax
from cfjax import document_scores, evaluate, evaluate_documents, evaluation_inputs
from cfjax.data.embedded import MnistSource
from cfjax.data.image_files import read_image
from cfjax.data.progressions import ProgressionsSource, continue_classes
from cfjax.data.scene_captions import parse_caption, phrasings
from cfjax.data.scenes import ScenesSource
from cfjax.data.transforms import TRANSFORM_NAMES, TransformsSource
from cfjax.document_sampler import DocumentSampler
from cfjax.document_scores import standard_errors
from cfjax.errors import UserError
from cfjax.evaluation.caption_scores import bleu, cider_d
from cfjax.evaluation.classifier import ClassifierTraining, TrainedClassifier, load_or_train
from cfjax.evaluation.frechet import frechet_distance
from cfjax.evaluation.scene_judge import load_scene_judge
from cfjax.evaluation.scene_scores import score_captions, score_images
from cfjax.evaluation.sequence_scores import judged_classes, score_progressions, score_transforms
from cfjax.evaluation.statistics import FeatureStatistics
from cfjax.evaluation_captions import one_caption_an_image, open_captions
from cfjax.sampler import Sampler

QUICK = ClassifierTraining(epochs=1, batch_size=500, max_shift=1)
COUNT = 10  # documents, of which the model makes 8 at a time


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a random checkpoint, by the name of its set."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def of(name):
        workdir = folder / name
        if not workdir.exists():
            config = tiny_documents.config(f"mnist_{name}.py", sampling__images_per_device=1)
            tiny.save_random_checkpoint(workdir, of_run=config)
        return workdir

    return of


@pytest.fixture(autouse=True)
def _quick_judges(monkeypatch):
    monkeypatch.setattr(document_scores, "SCENE_JUDGE_TRAINING", QUICK)
    monkeypatch.setattr(document_scores, "DIGIT_JUDGE_TRAINING", QUICK)


@pytest.fixture
def calls(monkeypatch):
    """How many documents each call of the model made."""
    made, generate = [], DocumentSampler.generate

    def counting(self, *arguments, prompt, **options):
        made.append(len(prompt))
        return generate(self, *arguments, prompt=prompt, **options)

    monkeypatch.setattr(DocumentSampler, "generate", counting)
    return made


def run(workdir, out, *arguments, count=COUNT):
    runs.run_in_process(
        evaluate_documents,
        [f"--checkpoint={workdir}", f"--out={out}", f"--num_samples={count}", *arguments],
    )
    return json.loads((out / "scores.json").read_text())


def values(report, title):
    return {name: it["value"] for name, it in report["scores"][title].items()}


def kept(out, name):
    """All that was generated for a task."""
    (folder,) = out.glob(f"generated/{name}-*")
    blocks = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            blocks.append(np.array(json.loads(path.read_text()), object))
        else:
            with path.open("rb") as file, np.load(file) as arrays:
                blocks.append(arrays["images"])
    return np.concatenate(blocks)


def assert_same(found, scores, leave_out=("num_scenes",)):
    """What a table has is what the function says."""
    expected = {
        name.replace("_", " "): value
        for name, value in vars(scores).items()
        if name not in leave_out and value is not None
    }
    assert found == expected


def test_scenes(checkpoint, tmp_path, calls, capsys):
    workdir, out = checkpoint("scenes"), tmp_path / "scores"
    report = run(workdir, out, "--num_ar_steps=2", "--seed=3")
    assert calls == [8, 2, 8, 2]
    sampler, source = cfjax.load(workdir), ScenesSource("held_out", 16)
    captions = source.captions[:COUNT]
    images = sampler.generate(prompt=[[it] for it in captions], seed=3, num_ar_steps=2)
    np.testing.assert_array_equal(kept(out, "captions_to_images")[:, 0], images)
    judge = load_scene_judge(out / "judge", 16, 2, QUICK)
    scored = score_images([parse_caption(it) for it in captions], judge.read(images))
    of_images = values(report, "captions to images")
    assert_same(of_images, scored, ("num_scenes", "parsed"))
    texts = sampler.caption(source.images_at(range(COUNT)), seed=3)
    assert kept(out, "images_to_captions").tolist() == texts
    scenes = [source.scene_at(index) for index in range(COUNT)]
    of_texts = values(report, "images to captions")
    references = [phrasings(scene) for scene in scenes]
    assert of_texts.pop("BLEU-4") == bleu(texts, references)
    assert of_texts.pop("CIDEr-D") == cider_d(texts, references)[0]
    assert_same(of_texts, score_captions(texts, scenes))
    assert {"cells", "digits", "scenes"} < values(report, "the judge on 2000 real images").keys()
    protocol = report["protocol"]
    assert protocol["plan"] == "S = 2, of [2, 2] tokens"
    assert judge.classifier.checksum in protocol["judge"]
    assert protocol["documents"] == "10 of split held_out of scenes"
    shown = f"{100 * of_images['colours']:.1f}% ±"
    assert shown in capsys.readouterr().out and shown in (out / "scores.md").read_text()


def test_a_killed_evaluation_goes_on(checkpoint, tmp_path, calls, monkeypatch):
    """And a finished one is scored again; what others made is not taken for it."""
    workdir, out = checkpoint("scenes"), tmp_path / "scores"
    counting = DocumentSampler.generate

    def dying(self, *arguments, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counting(self, *arguments, **options)

    monkeypatch.setattr(DocumentSampler, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run(workdir, out)
    monkeypatch.setattr(DocumentSampler, "generate", counting)
    calls.clear()
    report = run(workdir, out)
    assert calls == [2]
    calls.clear()
    assert run(workdir, out) == report
    assert calls == []
    (damaged,) = out.glob("generated/captions_to_images-*/00000000.npz")
    damaged.write_bytes(damaged.read_bytes()[:-200])
    assert run(workdir, out)["scores"] == report["scores"]
    assert calls == [8]
    calls.clear()
    run(workdir, out, count=COUNT - 1)
    assert calls == []
    run(workdir, out, "--num_beams=2")
    assert calls == [8, 2]  # texts
    calls.clear()
    run(workdir, out, "--data_split=held_out_seen", count=3)
    assert calls == [3, 3]


class Perfect:
    """A generator that gives what is asked for, or of every `spoilt_every`-th document something else."""

    def __init__(self, images=None, texts=None, spoilt_every=0):
        self.of_images, self.of_texts, self.spoilt_every = images, texts, spoilt_every
        self.prompts = {}

    def images(self, name, documents, prompts, count, n=1):
        self.prompts[name] = prompts(np.arange(count))
        images = self.of_images[:count].copy()
        assert images.shape[:2] == (count, n)
        if self.spoilt_every:
            images[:: self.spoilt_every] = 0
        return images

    def texts(self, name, documents, prompts, count):
        self.prompts[name] = prompts(np.arange(count))
        texts = list(self.of_texts[:count])
        if self.spoilt_every:
            texts[:: self.spoilt_every] = ["nothing"] * len(texts[:: self.spoilt_every])
        return texts


def shares(scores, index=0):
    return {name: number.value for name, number in scores.sections[index].numbers.items()}


def test_scenes_that_are_right(tmp_path):
    """Real images and true captions: all is right but what the judge misreads; a part spoilt shows."""
    source = ScenesSource("held_out", 16, num_scenes=60)
    images = source.images_at(range(60))
    scenes = [source.scene_at(index) for index in range(60)]
    texts = [phrasings(scene)[-1] for scene in scenes]
    generator = Perfect(images[:, None], texts)
    scores = document_scores.of_scenes(generator, source, "", 60, tmp_path)
    assert generator.prompts["captions to images"] == [[it] for it in source.captions]
    for (image,), real in zip(generator.prompts["images to captions"], images, strict=True):
        np.testing.assert_array_equal(image, real)
    of_images, of_texts, of_judge = (shares(scores, index) for index in range(3))
    assert of_images["colours"] == of_images["number"] == of_judge["cells"] == 1
    # The judge reads the very same images.
    assert of_images["digits"] == of_judge["digits"]
    assert of_images["scenes"] == of_judge["scenes"]
    assert set(of_texts.values()) == {1.0, of_texts["CIDEr-D"]}
    spoilt = document_scores.of_scenes(
        Perfect(images[:, None], texts, spoilt_every=3), source, "", 60, tmp_path
    )
    assert shares(spoilt, 0)["number"] == pytest.approx(2 / 3)
    of_texts = spoilt.sections[1].numbers
    assert of_texts["scenes"].value == pytest.approx(2 / 3)
    assert of_texts["scenes"].error == pytest.approx((2 / 9 / 60) ** 0.5, rel=0.1)
    assert shares(spoilt, 1)["BLEU-4"] < 0.9


def test_progressions_that_are_right(tmp_path, monkeypatch):
    """The judge reads classes that the pixels are; trained with 5 images, continued to 12."""
    source = ProgressionsSource("held_out", 5, 30)
    judge = TrainedClassifier({}, 10, 0.75, "123")
    monkeypatch.setattr(document_scores, "load_or_train", lambda *_: judge)
    monkeypatch.setattr(
        document_scores,
        "judged_classes",
        lambda classifier, images: images[..., 0, 0, 0].astype(np.int32),
    )
    given = source.classes_at(range(30))[:, :3]
    classes = continue_classes(given, 12)[:, 3:]
    images = np.zeros((30, 9, 28, 28, 1), np.uint8)
    images[:] = classes[..., None, None, None]
    generator = Perfect(images)
    scores = document_scores.of_progressions(generator, source, "", 30, 12, tmp_path)
    for prompt, sequence in zip(
        generator.prompts["progressions"], source.sequences_at(range(30)), strict=True
    ):
        np.testing.assert_array_equal(np.stack(prompt), sequence[:3])
    assert set(shares(scores, 0).values()) == set(shares(scores, 1).values()) == {1.0}
    assert {"image 5", "image 12", "copy"} < shares(scores, 1).keys()
    assert scores.by_position == (1.0,) * 9
    assert shares(scores, 2) == {"right classes": 0.75}
    images[:, 4:] = 10  # none of the digits
    scores = document_scores.of_progressions(Perfect(images), source, "", 30, 12, tmp_path)
    assert scores.by_position == (1.0,) * 4 + (0.0,) * 5
    assert shares(scores, 0)["right class"] == shares(scores, 1)["image 5"] == 1
    assert shares(scores, 1)["image 12"] == shares(scores, 1)["whole sequences"] == 0
    assert min(read_image(tmp_path / "accuracy_by_position.png").size) > 300


def test_transforms_that_are_right():
    source = TransformsSource("held_out", 2, 52)
    sequences = source.sequences_at(range(52))
    generator = Perfect(sequences[:, -1:])
    scores = document_scores.of_transforms(generator, source, "", 52)
    assert [len(it) for it in generator.prompts["transforms"]] == [5] * 52
    np.testing.assert_array_equal(generator.prompts["transforms"][7][4], sequences[7, 4])
    assert set(shares(scores).values()) == {1.0}
    assert {"right", "nearest", *TRANSFORM_NAMES} >= shares(scores).keys()
    spoilt = document_scores.of_transforms(
        Perfect(sequences[:, -1:], spoilt_every=4), source, "", 52
    )
    assert shares(spoilt)["right"] == pytest.approx(3 / 4)


class Several:
    """Three images, the first with three captions and the last with two."""

    image_shape, fingerprint, left_out = (4, 4, 3), "several", ()
    captions = (
        "a red cat",
        "one cat",
        "a cat is red",
        "a dog",
        "two birds fly",
        "birds in the sky",
    )
    image_ids = np.array([3, 3, 3, 5, 8, 8])

    def __len__(self):
        return 6

    def images_at(self, indices):
        return np.stack([np.full((4, 4, 3), self.image_ids[it], np.uint8) for it in indices])


def test_captions_are_compared_with_all_of_an_image(monkeypatch):
    source = Several()
    texts = ["a cat is red here", "a dog", "birds in the sky"]
    generator = Perfect(texts=texts)
    scores = document_scores.of_captions(generator, source, "", 3)
    assert [it[0][0, 0, 0] for it in generator.prompts["images to captions"]] == [3, 5, 8]
    references = [source.captions[:3], source.captions[3:4], source.captions[4:]]
    assert shares(scores) == {
        "BLEU-4": bleu(texts, references),
        "CIDEr-D": cider_d(texts, references)[0],
    }
    with pytest.raises(UserError, match="--num_samples is 4, but the split has 3 images"):
        document_scores.of_captions(generator, source, "", 4)
    # For the distance one caption an image comes first.
    assert one_caption_an_image(source).tolist() == [0, 3, 4, 1, 5, 2]
    monkeypatch.setattr("cfjax.build_documents.source", lambda *_: source)
    captions = open_captions(None, "held_out")
    assert captions.at(4, 8) == [source.captions[it] for it in (5, 2, 0, 3)]
    assert len(captions.images) == 3
    np.testing.assert_array_equal(captions.images.examples_at([2])["image"], source.images_at([4]))
    assert captions.describe(4).startswith("4 of split held_out, of 3 images in turn, sha256")
    assert "6 of split held_out, of 3 images in turn, over and over" in captions.describe(7)


@pytest.mark.parametrize("count", [2, 50, 400])
def test_standard_errors(count):
    """Of a mean it is that of the textbooks; groups scatter, by 1 / sqrt(2 * 49) of it.

    The documents have a period, which the groups don't share.
    """
    rights = np.arange(count) % 5 < 1

    def score(rows):
        return {"mean": rights[rows].mean(), "none": None}

    errors = standard_errors(score, count)
    expected = np.std(rights, ddof=1) / count**0.5
    assert errors["mean"] == pytest.approx(expected, rel=0.3 if count > 50 else 1e-9)
    assert errors["none"] is None
    assert standard_errors(score, 1) == {"mean": None, "none": None}


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("scenes", ["--num_samples=2001"], "is 2001, but the split has 2000 scenes"),
        ("scenes", ["--data_split=held_uot"], "unknown --data_split 'held_uot'"),
        ("scenes", ["--text_temperature=1", "--num_beams=2"], "beam search draws nothing"),
        ("scenes", ["--max_length=65"], "max_length is 65"),
        ("scenes", ["--num_ar_steps=5"], "5"),
    ],
)
def test_refusals(checkpoint, tmp_path, name, arguments, match):
    with pytest.raises(UserError, match=match):
        run(checkpoint(name), tmp_path / "scores", *arguments)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_model_of_classes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_documents, "load_sampler", lambda: Sampler(None, None, None, None))
    with pytest.raises(UserError, match=r"runs/x has no text head; score it with cfjax.evaluate"):
        run("runs/x", tmp_path)


INCEPTION = "--inception_weights=inception.safetensors"


@pytest.fixture
def extractor(monkeypatch):
    made = tiny_features.TinyExtractor()
    monkeypatch.setattr(evaluation_inputs, "inception", lambda *_: made)
    return made


def distance(workdir, out, *arguments):
    flags = [f"--checkpoint={workdir}", f"--out={out}", "--metrics=fid", *arguments]
    runs.run_in_process(evaluate, flags)
    return json.loads((out / "scores.json").read_text())


def test_distance_of_images_from_captions(checkpoint, tmp_path, extractor, calls):
    """Sample i has caption i; the reference is all images of the split."""
    workdir, out = checkpoint("scenes"), tmp_path / "scores"
    options = ("--num_samples=20", "--batch_size=16", "--ar_steps=2", "--seed=1")
    report = distance(workdir, out, INCEPTION, *options)
    assert calls == [16, 4]
    source = ScenesSource("held_out", 16)
    prompts = [[it] for it in source.captions[:20]]
    images = cfjax.load(workdir).generate(prompt=prompts, seed=1, num_ar_steps=2)
    of_samples, of_real = (
        FeatureStatistics.of(extractor(it).pool) for it in (images, source.images_at(range(2000)))
    )
    (row,) = report["scores"]
    assert row["FID-20 (tiny)"] == pytest.approx(frechet_distance(of_samples, of_real), rel=1e-6)
    assert "20 of split held_out, of 2000 images in turn" in report["protocol"]["captions"]
    assert report["protocol"]["reference"].startswith("2000 held_out captioned images of scenes")
    assert "by no caption" in report["protocol"]["guidance"]


@pytest.mark.usefixtures("extractor")
def test_refusals_of_the_distance(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"documents have no classes.*--inception_weights"):
        distance(checkpoint("scenes"), tmp_path)


@pytest.mark.long
@pytest.mark.usefixtures("extractor")
def test_progressions(checkpoint, tmp_path):
    workdir, out = checkpoint("progressions"), tmp_path / "scores"
    report = run(workdir, out, "--length=6", count=4)
    source = ProgressionsSource("held_out")
    prompts = [list(images[:3]) for images in source.sequences_at(range(4))]
    images = cfjax.load(workdir).generate(prompt=prompts, n=3)
    judge = load_or_train(out / "judge", *map(MnistSource, ("train", "held_out")), QUICK)
    judged = judged_classes(judge, images)
    scored = score_progressions(source.classes_at(range(4))[:, :3], judged)
    assert report["by_position"] == list(scored.by_position)
    assert values(report, "the image after 3")["right class"] == scored.next_class
    assert (out / "accuracy_by_position.png").exists()
    with pytest.raises(UserError, match="progressions have no captions"):
        distance(workdir, tmp_path / "distance", INCEPTION)
    with pytest.raises(UserError, match="--length is 3"):
        run(workdir, out, "--length=3")


@pytest.mark.long
def test_transforms(checkpoint, tmp_path):
    workdir, out = checkpoint("transforms"), tmp_path / "scores"
    report = run(workdir, out, count=4)
    source = TransformsSource("held_out")
    prompts = [list(images[:-1]) for images in source.sequences_at(range(4))]
    images = cfjax.load(workdir).generate(prompt=prompts)
    scored = score_transforms(source.queries_at(range(4)), images, source.transforms_at(range(4)))
    found = values(report, "answers after 2 examples")
    assert (found["right"], found["nearest"]) == (scored.answers, scored.nearest)
