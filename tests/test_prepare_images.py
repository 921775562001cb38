"""Folders and tar files of images to shards, and the source that reads them."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from cfjax.data import image_records, sources
from cfjax.data.image_folder import ImageFolderSource
from cfjax.data.image_listing import list_images
from cfjax.data.image_records import ArrayRecordSource, Storing
from cfjax.data.image_shards import write_image_set
from cfjax.errors import UserError
from cfjax.prepare_images import split_images
from cfjax.train import train

ROOT = Path(__file__).parents[1]
COUNT = 12  # images of each class
CLASSES = ("a ä", "b", "c")


def picture(seed, size=(40, 30), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Pictures of several sizes and formats in sub-folders of sub-folders."""
    root = tmp_path / "pictures"
    for label, name in enumerate(CLASSES):
        (root / name / "more").mkdir(parents=True)
        for i in range(COUNT):
            place = root / name / ("more" if i % 2 else "")
            image = picture(100 * label + i, (40 + i, 30 + label))
            image.save(place / f"{i:02d}.{'jpg' if i % 3 else 'png'}")
    return root


def prepare(
    folder,
    out,
    storing=None,
    num_processes=1,
    on_corrupt="refuse",
    share=0.1,
    examples_per_shard=10,
):
    """What the program does; the manifests by split."""
    splits, class_names = split_images(list_images(folder), None, share)
    return {
        split: write_image_set(
            out / split,
            images,
            class_names,
            storing or Storing(),
            examples_per_shard=examples_per_shard,
            on_corrupt=on_corrupt,
            num_processes=num_processes,
        )
        for split, images in splits.items()
    }


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cfjax.prepare_images", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("stored_as", ["original", "png", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_prepared_images_are_those_of_the_folder(folder, tmp_path, stored_as, channels):
    size = 0 if stored_as == "original" else 16
    manifests = prepare(folder, tmp_path / "out", Storing(stored_as, size, channels))
    assert sum(manifest["num_records"] for manifest in manifests.values()) == 3 * COUNT
    for split in sources.SPLITS:
        expected = ImageFolderSource(folder, split, 16, channels)
        found = ArrayRecordSource(tmp_path / "out", split, 16, channels)
        assert len(found) == len(expected)
        assert found.class_names == expected.class_names == CLASSES
        assert found.image_shape == expected.image_shape
        for ours, theirs in zip(
            sources.all_images(found), sources.all_images(expected), strict=True
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_jpegs_are_near_and_small(folder, tmp_path):
    prepare(folder, tmp_path / "jpeg", Storing("jpeg", 32, 3, 90))
    prepare(folder, tmp_path / "raw", Storing("raw", 32, 3))
    jpeg, raw = (
        sources.all_images(ArrayRecordSource(tmp_path / name, "train", 32, 3))[0].astype(int)
        for name in ("jpeg", "raw")
    )
    # White noise is the hardest picture for JPEG.
    assert 0 < np.abs(jpeg - raw).mean() < 8
    (record,) = ArrayRecordSource(tmp_path / "jpeg", "train", 32, 3)._reader.records_at([0])
    assert record[10:].find(b"JFIF") > 0


def test_a_smaller_size_is_cut_from_what_is_stored(folder, tmp_path):
    for stored_as in ("raw", "png"):
        prepare(folder, tmp_path / stored_as, Storing(stored_as, 24, 3))
    raw, png = (
        sources.all_images(ArrayRecordSource(tmp_path / name, "train", 8, 3))[0]
        for name in ("raw", "png")
    )
    assert raw.shape[1:] == (8, 8, 3)
    np.testing.assert_array_equal(raw, png)


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tar_files_give_the_same_images(folder, tmp_path):
    """One of folders, or one a class, as ImageNet's come."""
    files = {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "more" not in path.parts
    }
    make_tar(tmp_path / "all.tar", {f"./train/{name}": it for name, it in files.items()})
    by_class = tmp_path / "by class"
    by_class.mkdir()
    for label in CLASSES:
        members = {name.name: it for name, it in files.items() if name.parts[0] == label}
        make_tar(by_class / f"{label}.tar", members | {"._x.jpg": b"", "notes.txt": b"no"})
    for source in (tmp_path / "all.tar", by_class):
        images = list_images(source)
        assert len(images) == len(files)
        found = {(it.class_name, Path(it.name).name): it.read() for it in images}
        assert found == {(name.parts[0], name.name): it for name, it in files.items()}
        prepare(source, tmp_path / source.stem)
    compressed = tmp_path / "all.tar.gz"
    compressed.write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(UserError, match=r"all.tar.gz can't be read as a tar file that is not comp"):
        list_images(compressed)
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "all.tar").read_bytes()[:-30000])
    with pytest.raises(UserError, match=r"cut.tar .*(ends after|can't be read)"):
        [image.read() for image in list_images(cut)]


def test_two_processes_give_the_same_bytes(folder, tmp_path):
    prepare(folder, tmp_path / "one")
    prepare(folder, tmp_path / "two", num_processes=2)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    assert sum(name.endswith(".array_record") for name in one) == 4


def test_what_is_missing_is_made_again(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    expected = contents(tmp_path / "out")
    (tmp_path / "out" / "train" / "images-00001-of-00003.array_record").unlink()
    prepare(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    (folder / "b" / "00.png").write_bytes((folder / "c" / "00.png").read_bytes())
    with pytest.raises(UserError, match=r"was made with listing_sha256 '"):
        prepare(folder, tmp_path / "out")
    (folder / "b" / "new.png").write_bytes((folder / "b" / "00.png").read_bytes())
    with pytest.raises(UserError, match=r"was made with num_listed \d+, not \d+"):
        prepare(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"was made with stored_as 'original', not 'raw'"):
        prepare(folder, tmp_path / "out", Storing("raw", 16))


def spoil(folder):
    """Broken files, and files of odd modes, which are not broken."""
    sound = (folder / "b" / "more" / "01.jpg").read_bytes()
    (folder / "b" / "cut.jpg").write_bytes(sound[: len(sound) // 2])
    (folder / "b" / "empty.png").write_bytes(b"")
    (folder / "b" / "text.png").write_text("no picture")
    for name, mode in (("cmyk.jpg", "CMYK"), ("palette.gif", "P"), ("grey.png", "L")):
        picture(7, mode=mode).save(folder / "b" / name)
    alpha = picture(8).convert("RGBA")
    alpha.putalpha(128)
    alpha.save(folder / "b" / "alpha.png")
    deep = np.linspace(0, 0xFFFF, 1600).reshape(40, 40).astype(np.uint16)
    Image.fromarray(deep).save(folder / "b" / "deep.png")


BROKEN = {
    "b/cut.jpg": "can't be decoded",
    "b/empty.png": "has zero bytes",
    "b/text.png": "is no image",
}


@pytest.mark.parametrize("stored_as", ["original", "raw"])
def test_broken_images_are_refused_or_counted(folder, tmp_path, stored_as):
    spoil(folder)
    storing = Storing(stored_as, 16 if stored_as == "raw" else 0)
    words = r"3 images \(b/cut.jpg, b/empty.png, b/text.png\) can't be decoded; remove or mend them"
    with pytest.raises(UserError, match=words):
        prepare(folder, tmp_path / "out", storing, share=0)
    manifest = prepare(folder, tmp_path / "out", storing, on_corrupt="skip", share=0)["train"]
    assert manifest["num_skipped"] == 3
    assert manifest["num_records"] == 3 * COUNT + 5
    reasons = {it["name"]: it["reason"] for it in manifest["skipped"]}
    assert reasons == {
        name: f"the image {name} {reason}; remove or mend it." for name, reason in BROKEN.items()
    }
    (folder / "c" / "00.png").rename(folder / "c" / "00.webp")  # contents decide, not names
    expected = ImageFolderSource(folder, "train", 16, 3, "skip")
    prepared = ArrayRecordSource(tmp_path / "out", "train", 16, 3)
    ours = {image.tobytes() for image in sources.all_images(prepared)[0]}
    assert {image.tobytes() for image in sources.all_images(expected)[0]} <= ours


@pytest.mark.long
def test_training_reads_them_as_it_reads_the_folder(tmp_path):
    """Grey images of 28x28 in ten classes, as the tiny run has them."""
    rng = np.random.default_rng(0)
    for label in range(10):
        place = tmp_path / "digits" / str(label)
        place.mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    prepare(tmp_path / "digits", tmp_path / "out", Storing("raw", 28, 1))
    states = []
    for name, folder in (("array_record", "out"), ("image_folder", "digits")):
        config = tiny.config(data__name=name, data__path=str(tmp_path / folder))
        states.append(train(config, tmp_path / name))
    for ours, expected in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_a_record_that_broke_later_is_refused_or_passed_over(folder, tmp_path):
    prepare(folder, tmp_path / "out", share=0)
    path = tmp_path / "out" / "train" / "images-00000-of-00004.array_record"
    content = bytearray(path.read_bytes())
    first = list_images(folder)[0]
    where = content.find(first.read())
    content[where + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record 0 of the shard .* is corrupt; delete it and run"):
        ArrayRecordSource(tmp_path / "out", "train", 16, 3).examples_at([0])
    skipping = ArrayRecordSource(tmp_path / "out", "train", 16, 3, "skip").examples_at([0, 1, 11])
    np.testing.assert_array_equal(skipping["image"][0], skipping["image"][1])
    np.testing.assert_array_equal(skipping["label"], [0, 0, 0])


def test_what_does_not_fit_is_refused(folder, tmp_path):
    prepare(folder, tmp_path / "out", Storing("png", 16, 1))
    for words, make in {
        "there is no folder .*nowhere/train": lambda: ArrayRecordSource(
            tmp_path / "nowhere", "train", 16, 1
        ),
        "data.channels is 3, but .* was prepared with 1": lambda: ArrayRecordSource(
            tmp_path / "out", "train", 16, 3
        ),
        "data.size is 32, but the images in .* were prepared at 16": lambda: ArrayRecordSource(
            tmp_path / "out", "train", 32, 1
        ),
        "data.num_classes is 4, but the data have 3": lambda: sources.open_source(
            "array_record",
            str(tmp_path / "out"),
            "train",
            size=16,
            channels=1,
            num_classes=4,
        ),
        "stored as 'raw' can't have the size 0": lambda: Storing("raw"),
        "unknown store 'bmp'": lambda: Storing("bmp", 4),
        "there is no folder and no tar file": lambda: list_images(tmp_path / "nowhere"),
        "has no images": lambda: list_images(folder / "b" / "more"),
    }.items():
        with pytest.raises(UserError, match=words):
            make()


def test_held_out_images_of_their_own(folder):
    images = list_images(folder)
    held = [image for image in images if image.class_name == "b"]
    splits, class_names = split_images(images, held, 0.1)
    assert splits == {"train": images, "held_out": held}
    assert class_names == list(CLASSES)
    with pytest.raises(UserError, match=r"a class 'a ä' that is not among those for training"):
        split_images(held, images, 0.1)
    splits, _ = split_images(images, None, 0.0)
    assert set(splits) == {"train"}


def test_records_hold_any_name():
    name = os.fsdecode("ä\n".encode() + b"\xff.png")
    label, unpacked, image = image_records.unpack(image_records.pack(7, name, b"pixels"))
    assert (label, unpacked, bytes(image)) == (7, name, b"pixels")


def test_the_program_prepares_verifies_and_explains(folder, tmp_path):
    spoil(folder)
    flags = [f"--source={folder}", f"--out={tmp_path / 'out'}", "--examples_per_shard=10"]
    refused = run(*flags, "--held_out_share=0")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: 3 images (b/cut.jpg,")
    flags.append("--processes=1")
    done = run(*flags, "--held_out_share=0", "--on_corrupt=skip", "--verify")
    assert done.returncode == 0, done.stderr
    assert "skipped: the image b/empty.png has zero bytes" in done.stderr
    assert "41 images of 3 classes in 5 shards, 3 skipped, checksums verified" in done.stderr


@pytest.mark.slow
def test_a_killed_program_ends_its_processes_and_is_resumed(folder, tmp_path):
    for i in range(40):  # large enough to be killed in the midst of
        picture(i, (500, 500)).save(folder / "c" / f"large {i}.jpg", quality=100)
    flags = [f"--source={folder}", "--examples_per_shard=4", "--held_out_share=0", "--processes=2"]
    out = tmp_path / "killed"
    program = subprocess.Popen(
        [sys.executable, "-m", "cfjax.prepare_images", f"--out={out}", *flags],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while len(list(out.glob("train/*.array_record"))) < 2:
        assert program.poll() is None
        time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    program.wait()
    for _ in range(1000):  # of its session none is left
        try:
            os.killpg(program.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        os.killpg(program.pid, signal.SIGKILL)
        pytest.fail("its processes went on")
    assert not (out / "train" / "manifest.json").exists()
    assert run(f"--out={out}", *flags).returncode == 0
    prepare(folder, tmp_path / "whole", share=0, examples_per_shard=4)
    assert contents(out) == contents(tmp_path / "whole")
