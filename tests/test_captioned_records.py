"""Sets of captioned images: pairs of an image and a caption that belong together, and damage."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from cfjax.data.caption_listing import list_captioned
from cfjax.data.captioned_records import CaptionedRecordSource
from cfjax.data.image_records import Storing
from cfjax.data.images import center_crop
from cfjax.data.records import read_manifest
from cfjax.errors import UserError
from cfjax.prepare_captions import split_captioned, write_captioned_set

COUNT = 12


def picture(index):
    pixels = np.random.default_rng(index).integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def captions_of(index):
    """One to three, which say which picture they belong to."""
    return [f"picture {index}, ä {number}\u2028猫" for number in range(1 + index % 3)]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    lines = []
    for index in range(COUNT):
        name = f"part {index % 2}/{index:02d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(root / name)
        lines.append(json.dumps({"image": name, "captions": captions_of(index)}))
    (root / "captions.jsonl").write_text("\n".join(lines))
    return root


def prepare(folder, out, storing=None, num_processes=1, on_corrupt="refuse", share=0.0):
    """What the program does; the manifests by split."""
    images, skipped = list_captioned(folder, on_corrupt)
    return {
        split: write_captioned_set(
            out / split,
            members,
            skipped,
            storing or Storing(),
            examples_per_shard=4,
            on_corrupt=on_corrupt,
            num_processes=num_processes,
        )
        for split, members in split_captioned(images, share).items()
    }


def index_of(caption):
    return int(caption.split(",")[0].removeprefix("picture "))


def assert_belong_together(captions, images, size):
    for caption, image in zip(captions, images, strict=True):
        expected = np.asarray(center_crop(picture(index_of(caption)), size))
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("stored_as", ["original", "png", "raw"])
def test_pairs_belong_together(folder, tmp_path, stored_as):
    prepare(folder, tmp_path / "out", Storing(stored_as, 0 if stored_as == "original" else 16))
    source = CaptionedRecordSource(tmp_path / "out", "train", 16, 3)
    expected = [text for index in range(COUNT) for text in captions_of(index)]
    assert sorted(source.captions) == sorted(expected)
    assert len(source) == len(expected) == 24
    assert source.image_shape == (16, 16, 3)
    assert source.left_out == ()
    indices = np.random.default_rng(0).permutation(24)
    images = source.images_at(indices)
    assert images.dtype == np.uint8 and images.flags.writeable
    assert_belong_together([source.captions[index] for index in indices], images, 16)
    examples = source.examples_at(indices)
    np.testing.assert_array_equal(examples["image"], images)
    np.testing.assert_array_equal(examples["index"], indices)
    assert examples["caption"] == [source.captions[index] for index in indices]
    smaller = CaptionedRecordSource(tmp_path / "out", "train", 8, 3)
    assert smaller.images_at([3]).shape == (1, 8, 8, 3)


def test_captions_are_read_without_images(folder, tmp_path, monkeypatch):
    prepare(folder, tmp_path / "out")
    monkeypatch.setattr("cfjax.data.image_records.decode_image", None)
    monkeypatch.setattr("cfjax.data.records.RecordReader.records_at", None)
    assert len(CaptionedRecordSource(tmp_path / "out", "train", 16, 3).captions) == 24


def test_splits_share_no_image(folder, tmp_path):
    """And those of an image stay together."""
    prepare(folder, tmp_path / "out", share=0.3)
    train, held_out = (
        CaptionedRecordSource(tmp_path / "out", split, 16, 3) for split in ("train", "held_out")
    )
    of_train, of_held_out = ({index_of(it) for it in s.captions} for s in (train, held_out))
    assert of_train | of_held_out == set(range(COUNT))
    assert not of_train & of_held_out
    assert len(train) + len(held_out) == 24
    assert_belong_together(held_out.captions, held_out.images_at(range(len(held_out))), 16)


def test_bytes_do_not_depend_on_processes_or_the_order_of_lines(folder, tmp_path):
    prepare(folder, tmp_path / "one")
    lines = (folder / "captions.jsonl").read_text().split("\n")
    (folder / "captions.jsonl").write_text("\n".join(reversed(lines)))
    prepare(folder, tmp_path / "two", num_processes=2)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "train").iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    assert sum(name.endswith(".array_record") for name in one) == 3


def test_what_is_missing_is_made_again_and_other_captions_are_refused(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    place = tmp_path / "out" / "train"
    expected = {path.name: path.read_bytes() for path in place.iterdir()}
    for name in ("captions.jsonl", "manifest.json"):
        (place / name).unlink()
    (place / "captioned_images-00001-of-00003.array_record").unlink()
    prepare(folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == expected
    text = (folder / "captions.jsonl").read_text()
    (folder / "captions.jsonl").write_text(text.replace("picture 3,", "a picture 3,"))
    with pytest.raises(UserError, match=r"was made with files {'captions.jsonl': '.*, not"):
        prepare(folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == expected


def test_fingerprints_tell_images_and_captions_apart(folder, tmp_path):
    def fingerprint(name, split="train"):
        return CaptionedRecordSource(tmp_path / name, split, 16, 3).fingerprint

    prepare(folder, tmp_path / "out")
    prepare(folder, tmp_path / "again")
    assert fingerprint("out") == fingerprint("again")
    lines = (folder / "captions.jsonl").read_text()
    (folder / "captions.jsonl").write_text(lines.replace("picture 3,", "a picture 3,"))
    prepare(folder, tmp_path / "words")
    (folder / "captions.jsonl").write_text(lines)
    picture(20).save(folder / "part 0" / "00.png")
    prepare(folder, tmp_path / "images")
    assert len({fingerprint(name) for name in ("out", "words", "images")}) == 3


def test_broken_images_are_skipped_with_their_captions(folder, tmp_path):
    (folder / "part 1" / "05.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 image \(part 1/05.png\) can't be decoded; remove or"):
        prepare(folder, tmp_path / "out")
    manifest = prepare(folder, tmp_path / "out", on_corrupt="skip")["train"]
    assert [it["name"] for it in manifest["skipped"]] == ["part 1/05.png"]
    source = CaptionedRecordSource(tmp_path / "out", "train", 16, 3)
    assert {index_of(it) for it in source.captions} == set(range(COUNT)) - {5}
    assert_belong_together(source.captions, source.images_at(range(len(source))), 16)


def damage_record(folder, of_index, tmp_path):
    """Changes a byte of an image in its shard."""
    (name,) = folder.rglob(f"{of_index:02d}.png")
    content = name.read_bytes()
    for path in (tmp_path / "out" / "train").glob("*.array_record"):
        shard = bytearray(path.read_bytes())
        if (where := shard.find(content)) >= 0:
            shard[where + 100] ^= 1
            path.write_bytes(shard)
            return
    raise AssertionError("no shard has it")


def test_a_record_that_broke_later_is_refused_or_passed_over_with_its_caption(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    damage_record(folder, 5, tmp_path)
    source = CaptionedRecordSource(tmp_path / "out", "train", 16, 3)
    (first, *_) = bad = [i for i, text in enumerate(source.captions) if index_of(text) == 5]
    assert len(bad) == 3
    words = r"record \d of the shard .* is corrupt; delete it and run cfjax.prepare_captions again"
    for read in (source.images_at, source.examples_at):
        with pytest.raises(UserError, match=rf"{words}, or set data.on_corrupt=skip\.$"):
            read([0, first])
    skipping = CaptionedRecordSource(tmp_path / "out", "train", 16, 3, "skip")
    assert skipping.captions == source.captions
    with pytest.raises(UserError, match=rf"{words}\.$"):
        skipping.images_at([first])
    examples = skipping.examples_at([0, *bad, 23])
    following = (bad[-1] + 1) % 24
    np.testing.assert_array_equal(examples["index"], [0, *[following] * 3, 23])
    assert examples["caption"] == [source.captions[index] for index in examples["index"]]
    assert_belong_together(examples["caption"], examples["image"], 16)


def test_a_damaged_shard_is_refused_or_left_out_with_its_captions(folder, tmp_path):
    manifest = prepare(folder, tmp_path / "out")["train"]
    path = tmp_path / "out" / "train" / manifest["shards"][1]["file"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00001-of-00003.array_record has \d+ bytes instead of"):
        CaptionedRecordSource(tmp_path / "out", "train", 16, 3)
    source = CaptionedRecordSource(tmp_path / "out", "train", 16, 3, "skip")
    assert [it["name"] for it in source.left_out] == [path.name]
    assert len({index_of(it) for it in source.captions}) == COUNT - 4
    assert_belong_together(source.captions, source.images_at(range(len(source))), 16)


def test_damaged_captions_are_refused(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    path = tmp_path / "out" / "train" / "captions.jsonl"
    content = path.read_text()
    for on_corrupt in ("refuse", "skip"):
        path.write_text(content.replace("picture 3", "picture 4"))
        with pytest.raises(
            UserError, match=r"captions.jsonl has changed since it was written; del"
        ):
            CaptionedRecordSource(tmp_path / "out", "train", 16, 3, on_corrupt)
        path.unlink()
        with pytest.raises(UserError, match=r"captions.jsonl can't be read .*No such file"):
            CaptionedRecordSource(tmp_path / "out", "train", 16, 3, on_corrupt)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    prepare(folder, tmp_path / "out", Storing("png", 16, 1))
    for words, arguments in {
        "there is no folder .*nowhere/train; .* cfjax.prepare_captions": ("nowhere", 16, 1),
        "data.channels is 3, but .* was prepared with 1": ("out", 16, 3),
        "data.size is 32, but the images in .* were prepared at 16": ("out", 32, 1),
        r"data.channels must be 1 \(grey\) or 3": ("out", 16, 2),
    }.items():
        name, size, channels = arguments
        with pytest.raises(UserError, match=words):
            CaptionedRecordSource(tmp_path / name, "train", size, channels)
    with pytest.raises(UserError, match=r"holds captioned_images in format 1, not images"):
        read_manifest(tmp_path / "out" / "train", "images")


def test_threads_read_at_the_same_time(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    source = CaptionedRecordSource(tmp_path / "out", "train", 16, 3)
    expected = source.images_at(range(24))
    same = []

    def read(seed):
        indices = np.random.default_rng(seed).permutation(24)
        same.append((source.images_at(indices) == expected[indices]).all())

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 8
