"""The program that prepares captioned images, and the lines of captions that it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfjax.data.caption_listing import list_captioned, pack_captions, unpack_captions
from cfjax.data.captioned_records import CaptionedRecordSource
from cfjax.errors import UserError
from cfjax.prepare_captions import split_captioned

ROOT = Path(__file__).parents[1]


def save(path, size=(24, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, **options)


def write_lines(folder, *lines):
    """Values as JSON, and bytes as they are."""
    folder.mkdir(exist_ok=True)
    encoded = [it if isinstance(it, bytes) else json.dumps(it).encode() for it in lines]
    (folder / "captions.jsonl").write_bytes(b"\n".join(encoded) + b"\n")


@pytest.fixture
def folder(tmp_path):
    """Twenty images of recaptioned ImageNet's kind, and a few with several captions."""
    root = tmp_path / "pictures"
    lines = []
    for i in range(20):
        name = f"n{i % 3}/{i}.JPEG"
        save(root / name)
        captions = {"captions": [f"a {i}", f"one {i}"]} if i % 5 == 0 else {"caption": f"a {i}"}
        lines.append({"image": name, **captions, "label": i % 3})
    write_lines(root, *lines)
    return root


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cfjax.prepare_captions", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        check=False,
    )


def test_lines_of_both_kinds_are_read(folder):
    images, skipped = list_captioned(folder)
    assert skipped == []
    found = {it.image.name: it.captions for it in images}
    assert list(found) == sorted(found)
    assert found["n0/0.JPEG"] == ("a 0", "one 0")
    assert found["n1/1.JPEG"] == ("a 1",)
    assert len(found) == 20
    assert all(it.image.read() == (folder / it.image.name).read_bytes() for it in images)


def test_lines_of_one_image_are_joined(tmp_path):
    save(tmp_path / "f" / "a ä.png")
    lines = [
        {"image": "a ä.png", "caption": "  one\n"},
        {"image": "./b/../a ä.png", "captions": ["two", "one"]},
    ]
    write_lines(tmp_path / "f", b"\xef\xbb\xbf" + json.dumps(lines[0]).encode(), b" ", lines[1])
    (image,), _ = list_captioned(tmp_path / "f")
    assert image.image.name == "a ä.png"
    assert image.captions == ("one", "two", "one")


BAD = {
    b"{": "no JSON",
    b"[1]": "no JSON object",
    b'{"image": "a.png", "caption": "\xff"}': "no UTF-8",
    b'{"caption": "a"}': "'image' must be a path, not None",
    b'{"image": 3, "caption": "a"}': "'image' must be a path, not 3",
    b'{"image": "a.png"}': "needs either 'caption' or 'captions'",
    b'{"image": "a.png", "caption": "a", "captions": []}': "needs either 'caption' or 'captions'",
    b'{"image": "a.png", "captions": "a"}': "'captions' must be a list, not 'a'",
    b'{"image": "a.png", "captions": []}': "'captions' is empty",
    b'{"image": "a.png", "caption": 7}': "a caption must be a text, not 7",
    b'{"image": "a.png", "captions": ["a", null]}': "a caption must be a text, not None",
    b'{"image": "a.png", "captions": ["a", " \\n"]}': "a caption is empty",
    b'{"image": "a.png", "caption": "\\ud800"}': "half of a surrogate pair is no Unicode",
    b'{"image": "b.png", "caption": "a"}': "there is no image 'b.png'",
    b'{"image": "a\\u0000.png", "caption": "a"}': "there is no image 'a",
    b'{"image": "../f2.png", "caption": "a"}': "the image ../f2.png lies outside the folder",
    b'{"image": "/etc/hostname", "caption": "a"}': "the image /etc/hostname lies outside the folder",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_refused_or_skipped_by_number(tmp_path, line):
    save(tmp_path / "f" / "a.png")
    save(tmp_path / "f2.png")
    write_lines(tmp_path / "f", {"image": "a.png", "caption": "good"}, b"", line)
    with pytest.raises(UserError) as error:
        list_captioned(tmp_path / "f")
    assert f"1 line of {tmp_path / 'f' / 'captions.jsonl'} can't be used (line 3: " in str(
        error.value
    )
    assert BAD[line] in str(error.value)
    images, skipped = list_captioned(tmp_path / "f", "skip")
    assert [it.captions for it in images] == [("good",)]
    assert [it["name"] for it in skipped] == ["line 3"]
    assert BAD[line] in skipped[0]["reason"]


def test_folders_without_captions_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*captions.jsonl; write one with a"):
        list_captioned(tmp_path)
    write_lines(tmp_path, b"")
    with pytest.raises(UserError, match=r"captions.jsonl names no image that can be used"):
        list_captioned(tmp_path)


def test_packed_captions_are_those_that_are_read():
    images = [("a ä.png", ["one\u2028two\n", '"quoted" \\']), ("b\x85.png", ["猫"])]
    content = pack_captions(images)
    assert content.count(b"\n") == 2
    assert unpack_captions(content) == images


def test_the_split_is_by_name(folder):
    images, _ = list_captioned(folder)
    splits = split_captioned(images, 0.3)
    assert 0 < len(splits["held_out"]) < len(splits["train"])
    fewer = split_captioned(images[::2], 0.3)
    kept = {it.image.name for it in images[::2]}
    expected = {it.image.name for it in splits["held_out"]} & kept
    assert {it.image.name for it in fewer["held_out"]} == expected
    assert set(split_captioned(images, 0.0)) == {"train"}


def test_the_program_prepares_verifies_and_explains(folder, tmp_path):
    with (folder / "captions.jsonl").open("a") as lines:
        lines.write('{"image": "n0/0.JPEG", "caption": ""}\n')
    (folder / "n1" / "7.JPEG").write_bytes(b"")
    out = tmp_path / "out"
    flags = [f"--source={folder}", f"--out={out}", "--processes=1", "--store=jpeg", "--size=16"]
    refused = run(*flags)
    assert refused.returncode == 2
    (sentence,) = refused.stderr.splitlines()[-1:]
    assert sentence.startswith(
        f"error: 1 line of {folder}/captions.jsonl can't be used (line 21: a"
    )
    assert not out.exists()
    held_out = tmp_path / "held out"
    save(held_out / "x.png")
    write_lines(held_out, {"image": "x.png", "captions": ["x", "y"]})
    flags += [f"--held_out_source={held_out}", "--on_corrupt=skip", "--verify"]
    done = run(*flags, "--examples_per_shard=8")
    assert done.returncode == 0, done.stderr
    assert "skipped: captions.jsonl, line 21: a caption is empty" in done.stderr
    assert "skipped: the image n1/7.JPEG has zero bytes" in done.stderr
    assert (
        f"{out}/train: 19 images with 23 captions in 3 shards, 1 skipped, checksums verified"
        in done.stderr
    )
    assert f"{out}/held_out: 1 images with 2 captions in 1 shards, 0 skipped" in done.stderr
    manifest = json.loads((out / "train" / "manifest.json").read_text())
    assert manifest["description"]["skipped_lines"] == [
        {"name": "line 21", "reason": "line 21: a caption is empty"}
    ]
    source = CaptionedRecordSource(out, "held_out", 16, 3)
    assert source.captions == ["x", "y"]
    assert len(CaptionedRecordSource(out, "train", 16, 3)) == 23
    (shard,) = (out / "held_out").glob("*.array_record")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    changed = run(*flags, "--examples_per_shard=8")
    assert changed.returncode == 2
    assert f"error: {shard.name} of {out}/held_out are missing or changed" in changed.stderr


@pytest.mark.slow
def test_a_killed_program_is_resumed(folder, tmp_path):
    with (folder / "captions.jsonl").open("a") as lines:
        for i in range(40):  # large enough to be killed in the midst of
            save(folder / f"large {i}.jpg", (500, 500), quality=100)
            lines.write(json.dumps({"image": f"large {i}.jpg", "caption": f"large {i}"}) + "\n")
    flags = [f"--source={folder}", "--examples_per_shard=4", "--processes=1"]
    out = tmp_path / "killed"
    program = subprocess.Popen(
        [sys.executable, "-m", "cfjax.prepare_captions", f"--out={out}", *flags],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while len(list(out.glob("train/*.array_record"))) < 2:
        assert program.poll() is None
        time.sleep(0.01)
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    assert not (out / "train" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"there is no .*manifest.json, which is written when all"):
        CaptionedRecordSource(out, "train", 16, 3)
    assert run(f"--out={out}", *flags).returncode == 0
    assert run(f"--out={tmp_path / 'whole'}", *flags).returncode == 0
    killed, whole = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (out, tmp_path / "whole")
    )
    assert {path: it for path, it in killed.items() if not path.name.startswith(".")} == whole
