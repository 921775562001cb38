"""cfjax.sample and cfjax.edit as programs: outputs, recipes that repeat them, kills, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from runs import run_in_process

import cfjax
from cfjax import edit, sample, sharding
from cfjax.data.image_files import read_images, write_npz
from cfjax.errors import UserError
from cfjax.generation_request import params_checksum


@pytest.fixture(scope="module")
def model(workdir):
    return cfjax.load(workdir)


def images_of(path):
    return read_images(path)[0]


def test_a_recipe_repeats_the_bytes(workdir, tmp_path, capfd):
    """Also of fields that are not those of the config, into another kind of output."""
    arguments = ["--classes=3,7,10", "--num_samples=7", "--seed=5", "--split=cosine"]
    arguments += ["--num_ar_steps=3", "--denoising_steps=5:3", "--solver=dpmpp_2m_sde"]
    arguments += ["--guidance_interval=100,900", "--guidance_schedule=linear", "--temperature=0.9"]
    run_in_process(sample, [f"--checkpoint={workdir}", f"--out={tmp_path / 'a.npz'}", *arguments])
    moved = tmp_path / "moved"
    workdir.rename(moved)
    try:
        arguments = [f"--from_json={tmp_path / 'a.npz'}", f"--out={tmp_path / 'again'}"]
        with pytest.raises(UserError, match="there is no folder"):
            run_in_process(sample, arguments)
        run_in_process(sample, [*arguments, f"--checkpoint={moved}"])
    finally:
        moved.rename(workdir)
    np.testing.assert_array_equal(images_of(tmp_path / "again"), images_of(tmp_path / "a.npz"))
    recipe = json.loads((tmp_path / "a.npz.json").read_text())["recipe"]
    assert recipe["num_denoising_steps"] == [5, 4, 3]
    assert recipe["request"]["classes"] == [3, 7, 10]
    # All fields, as another version may have other defaults.
    assert set(recipe["request"]["sampling"]) == set(tiny.config().sampling)
    assert recipe["solver"]["name"] == "dpmpp_2m_sde"
    assert set(recipe["versions"]) == {"cfjax", "jax", "numpy", "device"}


def test_a_recipe_of_another_model_is_refused(workdir, tmp_path):
    run_in_process(
        sample, [f"--checkpoint={workdir}", f"--out={tmp_path / 'a.png'}", "--num_samples=2"]
    )
    other = tiny.save_random_checkpoint(tmp_path / "other", seed=1)
    arguments = [f"--from_json={tmp_path / 'a.png.json'}", f"--out={tmp_path / 'b.png'}"]
    with pytest.raises(UserError, match="params_sha256 is another one than in the recipe"):
        run_in_process(sample, [*arguments, f"--checkpoint={other}"])
    with pytest.raises(UserError, match="says how to sample; drop --seed"):
        run_in_process(sample, [*arguments, "--seed=3"])
    with pytest.raises(UserError, match=r"a\.png\.json is of cfjax\.sample"):
        run_in_process(edit, arguments)
    assert not (tmp_path / "b.png").exists()


def test_another_run_is_not_replaced(workdir, tmp_path):
    arguments = [f"--checkpoint={workdir}", f"--out={tmp_path / 'a.npz'}", "--num_samples=2"]
    run_in_process(sample, arguments)
    first = images_of(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"holds another run.*seed.*--overwrite"):
        run_in_process(sample, [*arguments, "--seed=1"])
    np.testing.assert_array_equal(images_of(tmp_path / "a.npz"), first)
    run_in_process(sample, [*arguments, "--seed=1", "--overwrite"])
    assert (images_of(tmp_path / "a.npz") != first).any()
    run_in_process(sample, [*arguments, "--seed=1"])  # it is there already


@pytest.mark.long
def test_killed_and_run_again_gives_the_same_bytes(workdir, tmp_path):
    """SIGKILL when two of 16 batches are there; the second run goes on from them."""
    options = ["--num_samples=64", "--batch_size=4", "--num_ar_steps=16", "--denoising_steps=40"]
    one_device = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}

    def start(out):
        program = [sys.executable, "-m", "cfjax.sample", f"--checkpoint={workdir}"]
        return subprocess.Popen(
            [*program, f"--out={tmp_path / out}", *options],
            cwd=tiny.REPOSITORY,
            env=one_device,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start("killed.npz") as process:
        partial = tmp_path / ".killed.npz.partial"
        deadline = time.monotonic() + 200
        while len(list(partial.glob("chunk*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed.npz").exists()
    num_done = 4 * len(list(partial.glob("chunk*")))
    for out in ("killed.npz", "whole.npz"):
        with start(out) as process:
            _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        first_bar = re.search(r"(\d+)/64 ", errors)[1]
        assert int(first_bar) == (num_done if out == "killed.npz" else 0)
    assert 8 <= num_done < 64
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_images_are_the_same_bytes_on_any_number_of_devices(workdir, num_devices):
    labels = np.arange(13) % 10
    mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
    loaded = cfjax.load(workdir, mesh=mesh)
    images = loaded.generate(labels, num_ar_steps=3)
    options = {"keep": "left", "num_ar_steps": 2, "num_candidates": 2}
    known = loaded.edit(images, labels[::-1], **options)
    reference = cfjax.load(workdir, mesh=sharding.make_mesh(devices=jax.devices()[:4]))
    np.testing.assert_array_equal(images, reference.generate(labels, num_ar_steps=3))
    np.testing.assert_array_equal(
        known, reference.edit(images, labels[::-1], **options, batch_size=3)
    )
    assert params_checksum(loaded.params) == params_checksum(reference.params)


def test_editing_in_python(model):
    images = model.generate([3, 5, 7], num_ar_steps=2)
    edited = model.edit(images, [1, 2, 10], keep="top", num_ar_steps=2, seed=4)
    np.testing.assert_array_equal(edited[:, :14], images[:, :14])
    assert (edited[:, 14:] != images[:, 14:]).any(axis=(1, 2, 3)).all()
    everything = np.ones((28, 28), bool)
    np.testing.assert_array_equal(model.edit(images, [1, 2, 3], keep=everything), images)
    np.testing.assert_array_equal(
        model.edit(images, [1, 2, 3], keep=~everything, num_ar_steps=2, seed=4),
        model.generate([1, 2, 3], num_ar_steps=2, seed=4),
    )
    shares = [
        (model.edit(images, [1, 2, 3], "random", keep_ratio=ratio) == images).mean()
        for ratio in (0.75, 0.25)
    ]
    assert shares[0] > shares[1]


@pytest.mark.long
def test_editing_with_noised_context(model):
    """What is kept comes back, and image i is the same bytes in any batch, from wherever on."""
    images = model.generate([3, 5, 7], num_ar_steps=2)
    options = {"keep": "top", "kept_as": "noised", "num_ar_steps": 2, "denoising_steps": 3}
    edited = model.edit(images, [1, 2, 10], **options)
    np.testing.assert_array_equal(edited[:, :14], images[:, :14])
    assert (edited != model.edit(images, [1, 2, 10], **options | {"kept_as": "clean"})).any()
    np.testing.assert_array_equal(
        edited[1:], model.edit(images[1:], [2, 10], **options, first_index=1, batch_size=1)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"images": np.zeros((2, 28, 28, 3), np.uint8)},
            "images are uint8 .2, 28, 28, 3., but must",
        ),
        ({"labels": [1]}, "there are 1 labels for 2 images"),
        ({"labels": [1, 11]}, "class 11 is out of range"),
        ({"keep": "middle"}, "unknown mask 'middle'"),
        ({"keep": np.ones((14, 14), bool)}, "must be bool of the image's"),
        ({"num_ar_steps": 9}, "num_ar_steps is 9, but an image of 8 tokens takes 1 to 8"),
        ({"split_sizes": (9,)}, "must sum to the 8 tokens"),
        ({"kept_as": "blurred"}, "unknown kept_as 'blurred'"),
        ({"num_candidates": 0}, "num_candidates is 0, but must be at least 1"),
        ({"num_candidates": 2, "labels": [1, 10]}, "for an image without a class"),
    ],
)
def test_bad_edits_are_refused(model, options, words):
    arguments = {"images": np.zeros((2, 28, 28, 1), np.uint8), "labels": [1, 2], "keep": "top"}
    with pytest.raises(UserError, match=words):
        model.edit(**arguments | options)


@pytest.mark.slow
def test_the_edit_program(workdir, model, tmp_path):
    images = model.generate([3, 5], num_ar_steps=2)
    write_npz(tmp_path / "mine.npz", images, np.array([3, 5]))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(images):  # larger and in colour: scaled, cropped, turned grey
        picture = Image.fromarray(image[..., 0]).resize((56, 60)).convert("RGB")
        picture.save(folder / f"{index}.jpg")
    mask = np.zeros((28, 28), np.uint8)
    mask[:14] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    base = [f"--checkpoint={workdir}", "--num_ar_steps=2", "--seed=4"]
    for name, arguments in {
        "by_name.npz": ["--keep=top", f"--images={tmp_path / 'mine.npz'}"],
        "by_mask.npz": [f"--keep={tmp_path / 'mask.png'}", f"--images={tmp_path / 'mine.npz'}"],
        "by_box.npz": ["--keep=box", "--keep_box=0,0,14,28", f"--images={tmp_path / 'mine.npz'}"],
        "edited": ["--keep=left", f"--images={folder}"],
    }.items():
        run_in_process(edit, [*base, f"--out={tmp_path / name}", "--classes=1,2", *arguments])
    expected = model.edit(images, [1, 2], keep="top", num_ar_steps=2, seed=4)
    for name in ("by_name", "by_mask", "by_box"):
        np.testing.assert_array_equal(images_of(tmp_path / f"{name}.npz"), expected)
        with Image.open(tmp_path / f"{name}_strip.png") as strip:
            assert strip.size == (3 * 32, 2 * 32)
    assert images_of(tmp_path / "edited").shape == (2, 28, 28, 1)

    morph = [*base, "--source_classes=3,5", "--classes=8", "--keep=random", "--kept_as=noised"]
    morph += ["--keep_ratio=0.8,0.2", "--num_candidates=2"]
    run_in_process(edit, [*morph, f"--out={tmp_path / 'morph.npz'}"])
    morphed, labels = read_images(tmp_path / "morph.npz")
    assert len(morphed) == 4 and (labels == 8).all()
    sources = model.generate([3, 5], num_ar_steps=2)
    options = {"keep_ratio": 0.2, "kept_as": "noised", "num_ar_steps": 2, "seed": 4}
    options["num_candidates"] = 2
    np.testing.assert_array_equal(morphed[2:], model.edit(sources, [8, 8], "random", **options))
    again = [f"--from_json={tmp_path / 'morph.npz.json'}", f"--out={tmp_path / 'again.npz'}"]
    for other in ("--kept_as=clean", "--num_candidates=1"):
        with pytest.raises(UserError, match=f"says how to sample; drop {other.split('=')[0]}"):
            run_in_process(edit, [*again, other])
    run_in_process(edit, again)
    np.testing.assert_array_equal(images_of(tmp_path / "again.npz"), morphed)

    # A recipe of an earlier version says neither.
    document = json.loads((tmp_path / "by_name.npz.json").read_text())
    for name in ("kept_as", "num_candidates"):
        del document["recipe"]["request"]["edit"][name]
    (tmp_path / "earlier.json").write_text(json.dumps(document))
    out = tmp_path / "later.npz"
    run_in_process(edit, [f"--from_json={tmp_path / 'earlier.json'}", f"--out={out}"])
    np.testing.assert_array_equal(images_of(out), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep=top"], "pass either --images, of your own, or --source_classes"),
        (["--source_classes=1", "--keep=random"], "--keep=random needs --keep_ratio"),
        (["--source_classes=1", "--keep=top", "--keep_ratio=0.5"], "--keep_ratio is for"),
        (["--source_classes=1", "--keep=middle"], "unknown mask 'middle'"),
        (["--source_classes=1", "--keep=gone.png"], "gone.png"),
        (["--source_classes=1", "--keep=top", "--kept_as=dim"], "unknown kept_as 'dim'"),
        (["--source_classes=12"], "class 12 is out of range"),
        (
            ["--source_classes=1", "--num_candidates=0"],
            "num_candidates is 0, but must be at least 1",
        ),
        (["--source_classes=10", "--num_candidates=2"], "for an image without a class"),
        (["--images=nowhere.npz"], "nowhere.npz"),
        (["--images=nowhere"], "nowhere"),
        (["--source_classes=1", "--keep=outside", "--num_ar_steps=15"], "num_ar_steps is 15"),
    ],
)
def test_the_edit_program_refuses_before_it_writes(workdir, tmp_path, arguments, words):
    out = tmp_path / "made" / "edits"
    with pytest.raises(UserError) as error:
        run_in_process(edit, [f"--checkpoint={workdir}", f"--out={out}", *arguments])
    assert words in str(error.value)
    assert not out.exists()


def test_a_mask_of_another_size_is_refused(workdir, tmp_path):
    Image.new("L", (56, 56)).save(tmp_path / "mask.png")
    arguments = [f"--checkpoint={workdir}", "--source_classes=1", f"--out={tmp_path / 'x.png'}"]
    with pytest.raises(UserError, match="is 56 x 56 pixels, but the images are 28 x 28"):
        run_in_process(edit, [*arguments, f"--keep={tmp_path / 'mask.png'}"])


def test_a_guide_that_does_not_fit_is_refused(workdir, tmp_path):
    other = tiny.save_random_checkpoint(tmp_path / "other", diffusion__prediction_type="noise")
    with pytest.raises(UserError, match=r"diffusion\.prediction_type=noise.*x_start"):
        cfjax.load(workdir, guide=other)


def test_a_model_without_class_dropout_needs_no_more_than_another_guide(workdir, tmp_path):
    """It is loaded; what it can't do is refused when it is asked for."""
    other = tiny.save_random_checkpoint(tmp_path / "other", loss__class_dropout=0.0)
    alone, guided = cfjax.load(other), cfjax.load(other, guide=workdir)
    with pytest.raises(UserError, match="does not know the null class"):
        alone.settings({"guidance_scale": 2.0})
    with pytest.raises(UserError, match=r"num_candidates is 2.*does not know the null class"):
        images = np.zeros((1, 28, 28, 1), np.uint8)
        alone.edit(images, [1], "top", num_candidates=2, guidance_scale=1.0)
    assert not alone.settings({"guidance_scale": 1.0}).is_guided
    assert guided.settings({"guidance_scale": 2.0}).is_guided


@pytest.mark.long
def test_a_guide(workdir, model, tmp_path):
    """Another checkpoint of another size, in place of the null class."""
    smaller = tiny.save_random_checkpoint(tmp_path / "smaller", seed=1, model__width=8)
    guided = cfjax.load(workdir, guide=smaller)
    images = guided.generate([3, 1], num_ar_steps=2, guidance_scale=2.0)
    assert (images != model.generate([3, 1], num_ar_steps=2, guidance_scale=2.0)).any()
    np.testing.assert_array_equal(
        guided.generate([3, 1], num_ar_steps=2, guidance_scale=1.0),
        model.generate([3, 1], num_ar_steps=2, guidance_scale=1.0),
    )
