"""cfjax.sample, edit and caption with a model of documents: prompts, recipes, kills, refusals."""

import json

import numpy as np
import pytest
import tiny
import tiny_documents
from PIL import Image
from runs import run_in_process

import cfjax
from cfjax import caption, edit, sample
from cfjax.data.image_files import read_images, write_npz, write_png
from cfjax.errors import UserError
from cfjax.evaluation.caption_scores import bleu, cider_d
from cfjax.sample_outputs import SampleOutput

TEXTS = ["a red three", "a blue seven above a green one"]


@pytest.fixture(scope="session")
def scenes_run(tmp_path_factory):
    """A run of a tiny model of documents; with its 8 devices 8 documents are made at a time."""
    config = tiny_documents.config(sampling__images_per_device=1)
    return tiny.save_random_checkpoint(tmp_path_factory.mktemp("scenes") / "run", of_run=config)


@pytest.fixture(scope="module")
def model(scenes_run):
    return cfjax.load(scenes_run)


@pytest.fixture(scope="module")
def images(model):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, *model.image_shape)).astype(np.uint8)


@pytest.fixture
def pictures(tmp_path, images):
    """A folder of the images."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(images):
        write_png(folder / f"{index}.png", image)
    return folder


def test_prompts_and_the_same_bytes_again(scenes_run, model, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join([TEXTS[0], "", f"{TEXTS[1]}  ", ""]))
    arguments = [f"--checkpoint={scenes_run}", "--num_samples=5", "--seed=3"]
    out = tmp_path / "a.npz"
    prompts = f"--prompts_file={tmp_path / 'texts.txt'}"
    run_in_process(sample, [*arguments, f"--out={out}", prompts])
    images, labels = read_images(out)
    assert labels.tolist() == [0, 1, 0, 1, 0]
    expected = model.generate(prompt=[[TEXTS[i]] for i in labels], seed=3)
    np.testing.assert_array_equal(images, expected)
    assert (images[0] != images[2]).any()

    (tmp_path / "texts.txt").unlink()  # the recipe has them
    run_in_process(sample, [f"--from_json={out}.json", f"--out={tmp_path / 'again'}"])
    np.testing.assert_array_equal(read_images(tmp_path / "again")[0], images)
    assert (tmp_path / "again" / "000003_prompt1.png").exists()
    recipe = json.loads((tmp_path / "a.npz.json").read_text())["recipe"]
    assert recipe["request"]["prompt"]["texts"] == TEXTS
    assert recipe["tokenizer"] == "bytes"

    run_in_process(sample, [*arguments, f"--out={tmp_path / 'x.png'}", f"--prompt={TEXTS[0]}"])
    with Image.open(tmp_path / "x.png") as grid:
        assert grid.size == (5 * 20, 20)
        np.testing.assert_array_equal(np.asarray(grid)[2:18, 2:18], images[0])
    with pytest.raises(UserError, match=r"holds another run, with request\.prompt\.texts"):
        run_in_process(sample, [*arguments, f"--out={tmp_path / 'x.png'}", f"--prompt={TEXTS[1]}"])
    again = [f"--from_json={tmp_path / 'x.png.json'}", f"--out={tmp_path / 'y.png'}"]
    with pytest.raises(UserError, match="says how to sample; drop --prompt"):
        run_in_process(sample, [*again, "--prompt=a"])


def test_sequences_a_row_each_go_on_after_a_kill(
    scenes_run, model, images, pictures, tmp_path, monkeypatch
):
    """Killed after the first of two batches, and with the last of its documents damaged."""
    files = ",".join(str(pictures / f"{index}.png") for index in (0, 2))
    arguments = [f"--checkpoint={scenes_run}", f"--prompt_images={files}", "--batch_size=1"]
    arguments += ["--num_samples=9", "--images_per_document=2"]
    append = SampleOutput.append

    def killed(self, images, labels):
        if self.num_done != self._count:
            raise KeyboardInterrupt
        append(self, images, labels)

    with monkeypatch.context() as patched:
        patched.setattr(SampleOutput, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(sample, [*arguments, f"--out={tmp_path / 'killed'}"])
    made = sorted((tmp_path / "killed").glob("*.png"))
    assert len(made) == 16
    made[-1].write_bytes(made[-1].read_bytes()[:50])

    counts = []
    with monkeypatch.context() as patched:
        patched.setattr(
            SampleOutput,
            "append",
            lambda self, images, labels: counts.append(len(images)) or append(self, images, labels),
        )
        run_in_process(sample, [*arguments, f"--out={tmp_path / 'killed'}"])
    assert counts == [1, 2]
    expected = model.generate(prompt=[[images[0], images[2]]] * 9, n=2)
    found = read_images(tmp_path / "killed")[0]
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)

    again = [f"--from_json={tmp_path / 'killed'}", f"--out={tmp_path / 'rows.png'}"]
    run_in_process(sample, again)
    with Image.open(tmp_path / "rows.png") as grid:
        assert grid.size == (2 * 20, 9 * 20)
        np.testing.assert_array_equal(np.asarray(grid)[22:38, 22:38], expected[1, 1])
    write_png(pictures / "2.png", images[1])
    with pytest.raises(UserError, match="prompt_images_sha256 is another one than in the recipe"):
        run_in_process(sample, [again[0], f"--out={tmp_path / 'other.png'}"])
    assert not (tmp_path / "other.png").exists()


def test_captions_with_scores(scenes_run, model, images, pictures, tmp_path):
    out = tmp_path / "made" / "captions.jsonl"
    references = [["a red three", "a three"], ["a blue seven"], ["a green one"]]
    lines = [
        {"image": f"{i}.png", "captions": texts} if i else {"image": "0.png", "caption": texts[j]}
        for i, texts in enumerate(references)
        for j in range(1 if i else 2)
    ]
    (tmp_path / "references.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    arguments = [f"--checkpoint={scenes_run}", f"--images={pictures}", f"--out={out}"]
    arguments += ["--max_length=6", "--temperature=1.5", "--top_p=0.9", "--seed=2"]
    scored = [*arguments, f"--references={tmp_path / 'references.jsonl'}"]
    run_in_process(caption, scored)
    expected = model.caption(images, max_length=6, temperature=1.5, top_p=0.9, seed=2)
    found = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert found == [{"image": f"{i}.png", "caption": it} for i, it in enumerate(expected)]
    assert len(set(expected)) == 3
    scores = json.loads((tmp_path / "made" / "captions_scores.json").read_text())
    assert scores["bleu_4"] == bleu(expected, references)
    assert scores["cider_d"] == cider_d(expected, references)[0]
    assert scores["num_references"] == 4

    whole, recipe = out.read_bytes(), (tmp_path / "made" / "captions.jsonl.json").read_bytes()
    assert json.loads(recipe)["recipe"]["text"]["top_p"] == 0.9
    out.write_bytes(whole[: whole.index(b"\n") + 9])  # as a kill leaves it
    run_in_process(caption, arguments)
    assert out.read_bytes() == whole
    assert (tmp_path / "made" / "captions.jsonl.json").read_bytes() == recipe
    out.write_bytes(whole.replace(b'"1.png"', b'"5.png"'))  # as no run leaves it
    run_in_process(caption, arguments)
    assert out.read_bytes() == whole
    with pytest.raises(UserError, match=r"holds another run, with seed 2, not 3.*--overwrite"):
        run_in_process(caption, [*arguments, "--seed=3"])
    assert out.read_bytes() == whole
    run_in_process(caption, [*arguments, "--seed=3", "--overwrite"])
    assert out.read_bytes() != whole


def test_captions_by_beams_of_an_array_and_of_one_picture(
    scenes_run, model, images, pictures, tmp_path
):
    write_npz(tmp_path / "mine.npz", images, np.zeros(3, np.int32))
    options = ["--num_beams=3", "--length_penalty=0.5", "--max_length=5"]
    base = [f"--checkpoint={scenes_run}", *options]
    run_in_process(caption, [*base, f"--images={tmp_path / 'mine.npz'}", f"--out={tmp_path / 'a'}"])
    expected = model.caption(images, num_beams=3, length_penalty=0.5, max_length=5)
    found = [json.loads(line) for line in (tmp_path / "a").read_text().split("\n")[:-1]]
    assert found == [{"image": f"00000{i}", "caption": text} for i, text in enumerate(expected)]
    run_in_process(caption, [*base, f"--images={pictures / '0.png'}", f"--out={tmp_path / 'b'}"])
    assert json.loads((tmp_path / "b").read_text()) == {"image": "0.png", "caption": expected[0]}


def test_an_edit_by_caption_keeps_what_is_kept(scenes_run, model, images, pictures, tmp_path):
    arguments = [f"--checkpoint={scenes_run}", f"--images={pictures}", "--keep=top", "--seed=1"]
    out = tmp_path / "edited.npz"
    run_in_process(edit, [*arguments, f"--caption={TEXTS[0]}", f"--out={out}"])
    edited = read_images(out)[0]
    np.testing.assert_array_equal(edited[:, :8], images[:, :8])
    assert (edited[:, 8:] != images[:, 8:]).any(axis=(1, 2, 3)).all()
    expected = model.edit(images, [TEXTS[0]] * 3, keep="top", seed=1)
    np.testing.assert_array_equal(edited, expected)
    assert (expected != model.edit(images, [TEXTS[1]] * 3, keep="top", seed=1)).any()
    with Image.open(tmp_path / "edited_strip.png") as strip:
        assert strip.size == (3 * 20, 3 * 20)
    run_in_process(edit, [f"--from_json={out}.json", f"--out={tmp_path / 'again.npz'}"])
    assert (tmp_path / "again.npz").read_bytes() == out.read_bytes()
    everything = [
        f"--keep={tmp_path / 'mask.png'}",
        f"--out={tmp_path / 'same.npz'}",
        "--caption=a",
    ]
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    run_in_process(edit, [*arguments, *everything])
    np.testing.assert_array_equal(read_images(tmp_path / "same.npz")[0], images)


LONG = "a" * 65


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        (sample, ["--classes=1"], "the model has no classes (data.num_classes is 0)"),
        (sample, [], "the model has no classes (data.num_classes is 0)"),
        (sample, ["--prompt=a", "--classes=1"], "both a prompt and --classes are given"),
        (sample, ["--prompt=a", "--prompts_file=b"], "both --prompt and --prompts_file are given"),
        (sample, ["--images_per_document=2"], "--images_per_document is of documents"),
        (sample, ["--prompts_file=gone.txt"], "gone.txt can't be read (No such file"),
        (sample, ["--prompts_file=EMPTY"], "is empty; write one prompt a line"),
        (sample, ["--prompts_file=BINARY"], "it is no UTF-8 text"),
        (sample, [f"--prompt={LONG}"], "has 65 tokens, but text.max_length is 64"),
        (sample, ["--prompt_images=LARGE"], "is uint8 [24, 16, 3], but must be uint8 [16, 16, 3]"),
        (sample, ["--prompt_images=gone.png"], "the image gone.png can't be decoded"),
        (sample, ["--prompt=a", "--num_ar_steps=5"], "num_ar_steps is 5"),
        (edit, ["--images=LARGE", "--caption=a", "--classes=1"], "both --caption and --classes"),
        (edit, ["--images=LARGE", f"--caption={LONG}"], "has 65 tokens, but"),
        (edit, ["--images=LARGE", "--classes=0"], "the model has no classes"),
        (edit, ["--images=LARGE"], "the model has no classes"),
        (caption, ["--images=gone"], "there are no images at gone"),
        (caption, ["--images=EMPTY"], "EMPTY is no image"),
        (caption, ["--images=WRONG"], "are [8, 8, 3], but those of the model [16, 16, 3]"),
        (caption, ["--images=LARGE", "--max_length=65"], "max_length is 65, but the model is"),
        (caption, ["--images=LARGE", "--top_p=2"], "top_p is 2, but must be in (0, 1]"),
        (caption, ["--images=LARGE", "--num_beams=2", "--top_k=3"], "beam search draws nothing"),
        (caption, ["--images=WIDE", "--references=EMPTY"], "has no caption of large.png"),
        (caption, ["--images=WIDE", "--references=BINARY"], "BINARY can't be read: it is no UTF-8"),
        (caption, ["--images=WIDE", "--references=TEXT"], 'is not {"image": name'),
    ],
)
def test_refused_before_anything_is_written(scenes_run, tmp_path, program, arguments, words):
    folder = tmp_path / "in"
    (folder / "WIDE").mkdir(parents=True)
    (folder / "EMPTY").write_text("\n \n")
    (folder / "TEXT").write_text("large.png\n")
    (folder / "BINARY").write_bytes(b"\xff\xfe\x00")
    for path in (folder / "LARGE", folder / "WIDE" / "large.png"):
        Image.new("RGB", (16, 24)).save(path, format="PNG")
    write_npz(folder / "WRONG.npz", np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int32))
    places = {name: str(folder / name) for name in ("EMPTY", "TEXT", "BINARY", "LARGE", "WIDE")}
    places["WRONG"] = str(folder / "WRONG.npz")

    def with_place(argument):
        name, value = argument.split("=", 1)
        return f"{name}={places.get(value, value)}"

    out = tmp_path / "made" / "out"
    arguments = [f"--checkpoint={scenes_run}", f"--out={out}", *map(with_place, arguments)]
    with pytest.raises(UserError) as error:
        run_in_process(program, arguments)
    assert words in str(error.value)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        (sample, ["--prompt=a"], "a prompt needs a model with a text head; this one has none"),
        (edit, ["--source_classes=1", "--caption=a"], "--caption needs a model with a text head"),
        (caption, ["--images=gone"], "has no text head and can't write captions"),
    ],
)
def test_a_model_of_classes_has_no_text_head(workdir, tmp_path, program, arguments, words):
    out = tmp_path / "made" / "out"
    with pytest.raises(UserError) as error:
        run_in_process(program, [f"--checkpoint={workdir}", f"--out={out}", *arguments])
    assert words in str(error.value)
    assert not out.parent.exists()


def test_another_tokenizer_is_refused(tmp_path):
    config = tiny_documents.config()
    config.text.checksum = "0" * 64
    run = tiny.save_random_checkpoint(tmp_path / "run", of_run=tiny_documents.config())
    path = next(run.glob("checkpoints/*/config/config.json"))
    path.write_text(path.read_text().replace('"checksum": ""', f'"checksum": "{"0" * 64}"'))
    with pytest.raises(UserError, match="the tokenizer bytes has the checksum bytes"):
        cfjax.load(run)
    path.write_text(path.read_text().replace('"bytes"', '"gone.json"'))
    with pytest.raises(UserError, match=r"there is no tokenizer 'gone\.json'"):
        cfjax.load(run)
    with pytest.raises(UserError, match="the tokenizer bytes has the checksum bytes"):
        cfjax.load(run, tokenizer="bytes")


@pytest.mark.long
def test_a_tokenizer_may_lie_elsewhere_than_in_training(tmp_path, workdir):
    config = tiny_documents.config(text__tokenizer="scene_words")
    run = tiny.save_random_checkpoint(tmp_path / "run", of_run=config)
    images = np.zeros((1, *cfjax.load(run).image_shape), np.uint8)
    captions = cfjax.load(run).caption(images)
    path = next(run.glob("checkpoints/*/config/config.json"))
    path.write_text(path.read_text().replace('"scene_words"', '"gone.json"'))
    assert cfjax.load(run, tokenizer="scene_words").caption(images) == captions
    out = tmp_path / "captions.jsonl"
    Image.fromarray(images[0]).save(tmp_path / "black.png")
    asked = [f"--checkpoint={run}", f"--images={tmp_path / 'black.png'}", f"--out={out}"]
    run_in_process(caption, [*asked, "--tokenizer=scene_words"])
    assert captions[0] in out.read_text()
    with pytest.raises(UserError, match="has no text head; don't pass a tokenizer"):
        cfjax.load(workdir, tokenizer="bytes")
