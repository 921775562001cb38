"""Sets of records: whole shards, the manifest, and what is done about damage."""

import dataclasses
import json
import logging as python_logging
import os
import threading

import numpy as np
import pytest

from cfjax.data.record_shards import ShardWriter
from cfjax.data.records import (
    RecordReader,
    Shard,
    read_manifest,
    shards_of,
    verify_checksums,
)
from cfjax.errors import UserError

NUM_SHARDS, PER_SHARD, NUM_BYTES = 3, 20, 5000  # a file has at least 64 KiB, the smallest block
MEND = "delete it and make it again"


def record(index):
    return np.random.default_rng(index).bytes(NUM_BYTES)


def records_of(shard):
    return (record(shard * PER_SHARD + i) for i in range(PER_SHARD))


def writer(folder, **description):
    made = ShardWriter(folder, "noise", {"seed": 0} | description, NUM_SHARDS)
    made.begin()
    return made


def write_all(folder):
    made = writer(folder)
    for shard in made.missing():
        made.write(shard, records_of(shard))
    return made.finish()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "a set"
    write_all(place)
    return place


def reader(folder, on_corrupt="refuse"):
    return RecordReader(shards_of(folder, read_manifest(folder, "noise")), on_corrupt, MEND)


def damage(folder, index):
    """Changes a bit within a record."""
    shard, position = divmod(index, PER_SHARD)
    path = writer(folder).path(shard)
    content = bytearray(path.read_bytes())
    where = content.find(record(shard * PER_SHARD + position)[:100])
    assert where > 0
    content[where + 50] ^= 1
    path.write_bytes(content)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_return_from_any_place(folder):
    manifest = read_manifest(folder, "noise")
    assert manifest["num_records"] == NUM_SHARDS * PER_SHARD
    assert (manifest["num_skipped"], manifest["skipped"]) == (0, [])
    verify_checksums(folder, manifest)
    indices = np.random.default_rng(0).integers(0, NUM_SHARDS * PER_SHARD, 100)
    assert reader(folder).records_at(indices) == [record(index) for index in indices]
    for outside in (-1, NUM_SHARDS * PER_SHARD):
        with pytest.raises(IndexError):
            reader(folder).records_at([outside])


def test_threads_share_a_reader(folder):
    shared, failed = reader(folder), []

    def read(seed):
        for index in np.random.default_rng(seed).permutation(NUM_SHARDS * PER_SHARD):
            if shared.records_at([index]) != [record(index)]:
                failed.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_part_of_each_shard_can_be_meant(folder):
    path = str(writer(folder).path(1))
    part = RecordReader([Shard(path, PER_SHARD, 3, 2), Shard(path, PER_SHARD, 19)], "refuse", MEND)
    assert part.records_at([0, 1, 2]) == [record(PER_SHARD + i) for i in (3, 4, 19)]


def test_what_a_killed_run_left_is_kept_and_the_rest_made(folder, tmp_path):
    expected = contents(folder)
    place = tmp_path / "interrupted"
    interrupted = writer(place)

    def killed():
        yield record(0)
        raise KeyboardInterrupt

    interrupted.write(1, records_of(1))
    with pytest.raises(KeyboardInterrupt):
        interrupted.write(0, killed())
    shard_without_count = interrupted.path(2)
    shard_without_count.write_bytes(b"half")
    assert writer(place).missing() == [0, 2]
    with pytest.raises(UserError, match=r"no .*manifest.json, which is written when all shards"):
        read_manifest(place, "noise")
    with pytest.raises(ValueError, match=r"shards \[0, 2\] of .* are missing"):
        interrupted.finish()
    before = interrupted.path(1).stat().st_mtime_ns
    write_all(place)
    assert interrupted.path(1).stat().st_mtime_ns == before
    assert contents(place) == expected


def test_another_description_is_refused(folder):
    with pytest.raises(UserError, match=r"a set was made with seed 0, not 1; name another folder"):
        writer(folder, seed=1)
    with pytest.raises(UserError, match=r"holds noise in format 1, not images in format 1"):
        read_manifest(folder, "images")


def test_writing_that_fails_is_one_sentence_and_leaves_no_shard(tmp_path, monkeypatch):
    made = writer(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(UserError, match=r"00000-of-00003.array_record can't be written: No space"):
        made.write(0, records_of(0))
    assert {path.name for path in tmp_path.iterdir()} == {"description.json"}
    with pytest.raises(UserError, match="write them to a disk and copy"):
        ShardWriter("gs://bucket/set", "noise", {}, 1).begin()


def break_shards(folder):
    """One cut, one gone."""
    path = writer(folder).path(0)
    path.write_bytes(path.read_bytes()[:-1000])
    writer(folder).path(2).unlink()


def test_damaged_shards_are_refused_or_skipped_by_name(folder, caplog):
    break_shards(folder)
    words = (
        r"noise-00000-of-00003.array_record has \d+ bytes instead of \d+, the shard"
        r" .*noise-00002.* is missing; delete it and make it again, or set data.on_corrupt=skip\.$"
    )
    with pytest.raises(UserError, match=words):
        reader(folder)
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        rest = reader(folder, "skip")
    assert rest.records_at(range(len(rest))) == list(records_of(1))
    assert "skipped a shard" in caplog.text and "noise-00002" in caplog.text
    with pytest.raises(UserError, match=r"noise-00000.*, noise-00002.* are missing or changed"):
        verify_checksums(folder, read_manifest(folder, "noise"))
    expected = set(writer(folder).missing())
    assert expected == {0, 2}
    write_all(folder)
    verify_checksums(folder, read_manifest(folder, "noise"))


def test_a_cut_shard_of_unknown_size_is_found(folder):
    break_shards(folder)
    path = str(writer(folder).path(0))
    with pytest.raises(UserError, match=r"has 0 records instead of 20"):
        RecordReader([Shard(path, PER_SHARD)], "refuse", MEND)
    with pytest.raises(UserError, match="there are no records to read"):
        RecordReader([Shard(path, PER_SHARD)], "skip", MEND)


def test_a_corrupt_record_is_refused_or_the_next_one_read(folder, caplog):
    for index in (7, 8, 59):
        damage(folder, index)
    with pytest.raises(UserError, match=r"record 7 of the shard .*noise-00000.* is corrupt; del"):
        reader(folder).records_at([3, 7, 30])
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        skipping = reader(folder, "skip")
        for _ in range(2):
            found = skipping.records_at([59, 3, 7, 8, 9])
            assert found == [record(index) for index in (0, 3, 9, 9, 9)]
    assert caplog.text.count("is corrupt") == 3  # each once
    with pytest.raises(UserError, match=r"noise-00000.*, noise-00002.* are missing or changed"):
        verify_checksums(folder, read_manifest(folder, "noise"))


def test_what_does_not_decode_is_treated_alike(folder, caplog):
    def decode(content):
        if content in (record(4), record(5)):
            raise UserError("the image 4.png is no image; remove or mend it.")
        return content

    with pytest.raises(UserError, match=r"4.png is no image; remove or mend it, or set"):
        reader(folder).decoded_at([4], decode)
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        assert reader(folder, "skip").decoded_at([4, 2], decode) == [record(6), record(2)]
    assert "4.png is no image" in caplog.text


def test_a_reader_that_replaces_none_leaves_out_damaged_shards_alone(folder):
    damage(folder, 27)
    writer(folder).path(0).unlink()
    shards = shards_of(folder, read_manifest(folder, "noise"))
    strict = RecordReader(shards, "skip", MEND, replaces=False)
    (left_out,) = strict.left_out
    assert left_out["name"] == "noise-00000-of-00003.array_record"
    assert left_out["reason"].endswith(f"00000-of-00003.array_record is missing; {MEND}.")
    assert strict.records_at([6, 8]) == [record(26), record(28)]
    with pytest.raises(UserError, match=rf"record 7 of .*noise-00001.* is corrupt; {MEND}\.$"):
        strict.records_at([6, 7, 8])
    with pytest.raises(UserError, match=r"^nothing is right\.$"):
        strict.decoded_at([6], refuse_all)
    assert RecordReader(shards, "skip", MEND).records_at([7]) == [record(28)]


def test_fingerprints_tell_sets_apart(folder, tmp_path):
    before = reader(folder).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert reader(moved).fingerprint == before
    shards = shards_of(moved, read_manifest(moved, "noise"))
    assert RecordReader(shards[1:], "refuse", MEND).fingerprint != before
    first = dataclasses.replace(shards[0], sha256="0")
    assert RecordReader([first, *shards[1:]], "refuse", MEND).fingerprint != before


def refuse_all(_):
    raise UserError("nothing is right.")


def test_a_set_without_a_sound_record_ends(folder):
    with pytest.raises(UserError, match="no record can be read"):
        reader(folder, "skip").decoded_at([4], refuse_all)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(num_records=61),
        lambda manifest: manifest["shards"].pop(),
        lambda manifest: manifest.pop("shards"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json is damaged .*; delete it and run"):
        read_manifest(folder, "noise")
    path.write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        read_manifest(folder, "noise")
