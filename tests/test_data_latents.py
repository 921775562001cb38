"""Moments in records, and the loader that picks the flip."""

import itertools
import logging as python_logging

import ml_dtypes
import numpy as np
import pytest

from cfjax.data import latents
from cfjax.data.latents import LatentsSource
from cfjax.data.loader import TrainLoader
from cfjax.data.record_shards import ShardWriter
from cfjax.errors import UserError

COUNT, SIZE, CHANNELS = 10, 3, 2
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def moments(index, dtype):
    """Of the image, and, with the other sign, of its mirror image."""
    drawn = np.random.default_rng(index).uniform(0.5, 1, (SIZE, SIZE, 2 * CHANNELS))
    return np.stack([drawn, -drawn]).astype(DTYPES[dtype])


def make(folder, dtype="bfloat16", **change):
    description = {
        "size": SIZE,
        "channels": CHANNELS,
        "dtype": dtype,
        "class_names": ["cat", "dog"],
    }
    writer = ShardWriter(folder / "train", latents.KIND, description | change, 2)
    writer.begin()
    for shard in writer.missing():
        numbers = range(shard * COUNT // 2, (shard + 1) * COUNT // 2)
        writer.write(shard, (latents.pack(moments(i, dtype), i % 2, 7 * i) for i in numbers))
    writer.finish()
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_return_to_the_bit(tmp_path, dtype):
    source = LatentsSource(make(tmp_path, dtype), "train", SIZE, CHANNELS)
    assert source.class_names == ("cat", "dog")
    assert source.image_shape == (SIZE, SIZE, CHANNELS)
    assert len(source) == COUNT
    examples = source.examples_at([9, 0, 4])
    assert examples["moments"].dtype == DTYPES[dtype]
    expected = np.stack([moments(i, dtype) for i in (9, 0, 4)])
    np.testing.assert_array_equal(examples["moments"], expected)
    np.testing.assert_array_equal(examples["label"], [1, 0, 0])


def test_a_record_has_this_layout():
    """Fixed: little-endian label, source id, moments of both flips, and nothing else."""
    values = moments(0, "bfloat16")
    record = latents.pack(values, 258, 2**40)
    assert len(record) == 4 + 8 + 2 * SIZE * SIZE * 2 * CHANNELS * 2
    assert record[:12] == bytes([2, 1, 0, 0]) + bytes([0, 0, 0, 0, 0, 1, 0, 0])
    assert record[12:] == values.tobytes()
    (unpacked,) = latents.unpack([record], latents.record_dtype(SIZE, CHANNELS, "bfloat16"))
    assert (unpacked["label"], unpacked["source_id"]) == (258, 2**40)


def batches(source, count, **options):
    loader = TrainLoader(source, seed=0, rows=np.arange(5), global_batch_size=5, **options)
    with loader:
        return list(itertools.islice(loader, count))


def test_the_loader_picks_the_flip(tmp_path):
    source = LatentsSource(make(tmp_path), "train", SIZE, CHANNELS)
    taken = batches(source, 40, horizontal_flip=True)
    plain = batches(source, 40)
    signs = []
    for flipped, batch in zip(taken, plain, strict=True):
        assert batch["moments"].shape == (5, SIZE, SIZE, 2 * CHANNELS)
        assert batch["moments"].dtype == np.float32
        np.testing.assert_array_equal(flipped["label"], batch["label"])
        sign = np.sign(flipped["moments"][:, 0, 0, 0].astype(float))
        signs.append(sign)
        expected = batch["moments"].astype(float) * sign[:, None, None, None]
        np.testing.assert_array_equal(flipped["moments"].astype(float), expected)
        assert (batch["moments"] > 0).all()
    # 200 fair coins: 5 standard deviations.
    assert abs(np.mean(signs)) < 5 / np.sqrt(200)


def test_other_latents_are_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(
        UserError, match=r"data.size 4 with data.channels 2 does not fit .* 3 and 2"
    ):
        LatentsSource(tmp_path, "train", 4, CHANNELS)
    with pytest.raises(
        UserError, match=r"there is no folder .*held_out; set data.path to one that"
    ):
        LatentsSource(tmp_path, "held_out", SIZE, CHANNELS)
    with pytest.raises(UserError, match="unknown dtype of moments 'float16'"):
        latents.record_dtype(SIZE, CHANNELS, "float16")


def test_damaged_shards_and_records_are_refused_or_passed_over(tmp_path, caplog):
    make(tmp_path)
    first, second = sorted(tmp_path.glob("train/*.array_record"))
    content = bytearray(first.read_bytes())
    where = content.find(moments(2, "bfloat16").tobytes())
    content[where + 3] ^= 1
    first.write_bytes(content)
    refusing = LatentsSource(tmp_path, "train", SIZE, CHANNELS)
    words = r"record 2 of the shard .*00000.* is corrupt; delete it and run cfjax.encode again, or"
    with pytest.raises(UserError, match=words):
        refusing.examples_at([1, 2])
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        skipping = LatentsSource(tmp_path, "train", SIZE, CHANNELS, "skip")
        np.testing.assert_array_equal(skipping.examples_at([1, 2, 9])["source_id"], [7, 21, 63])
    assert "is corrupt" in caplog.text and not skipping.left_out

    for damage, words in (
        (lambda: second.write_bytes(second.read_bytes()[:-100]), r"has \d+ bytes instead of \d+"),
        (second.unlink, "is missing"),
    ):
        damage()
        mend = "delete it and run cfjax.encode again, or set data.on_corrupt=skip"
        with pytest.raises(UserError, match=f"the shard .*00001-of-00002.* {words}; {mend}"):
            LatentsSource(tmp_path, "train", SIZE, CHANNELS)
        skipping = LatentsSource(tmp_path, "train", SIZE, CHANNELS, "skip")
        assert len(skipping) == COUNT // 2
        assert [it["name"] for it in skipping.left_out] == [second.name]
    (tmp_path / "train" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"there is no .*manifest.json, which is written when all"):
        LatentsSource(tmp_path, "train", SIZE, CHANNELS, "skip")
