"""The loader: an endless stream that depends on seed and position alone."""

import itertools
import logging as python_logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cfjax.data.loader import TrainLoader
from cfjax.errors import UserError

ROOT = Path(__file__).parents[1]
SIZE, BATCH = 30, 8


class CountingSource:
    """Example i is a 2x3 image with i in its left column and class i."""

    labels = np.arange(SIZE, dtype=np.int32)
    class_names = tuple(str(i) for i in range(SIZE))
    image_shape = (2, 3, 1)

    def __len__(self):
        return SIZE

    def examples_at(self, indices):
        images = np.zeros((len(indices), *self.image_shape), np.uint8)
        images[:, :, 0] = indices[:, None, None] + 1
        return {"image": images, "label": self.labels[indices]}


class BrokenSource(CountingSource):
    def examples_at(self, indices):
        raise UserError("the image 7.png can't be decoded.")


def batches(count, examples_seen=0, rows=None, batch_size=BATCH, **options):
    rows = np.arange(batch_size) if rows is None else rows
    loader = TrainLoader(
        CountingSource(),
        seed=options.pop("seed", 0),
        rows=rows,
        global_batch_size=batch_size,
        examples_seen=examples_seen,
        **options,
    )
    with loader:
        return list(itertools.islice(loader, count))


def labels(taken):
    return np.concatenate([batch["label"] for batch in taken])


def test_batches_are_what_training_takes():
    (batch,) = batches(1)
    assert batch["image"].dtype == np.float32
    assert batch["image"].shape == (BATCH, 2, 3, 1)
    assert batch["label"].dtype == np.int32
    expected = (batch["label"] + 1) / np.float32(127.5) - 1
    np.testing.assert_allclose(batch["image"][:, 0, 0, 0], expected, rtol=1e-6)
    assert (batch["image"][:, :, 1:] == -1).all()


def test_each_epoch_has_each_example_once_in_a_new_order():
    stream = labels(batches(15))[: 4 * SIZE]  # 30 is no multiple of the batch
    epochs = stream.reshape(4, SIZE)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(SIZE))
    assert len({epoch.tobytes() for epoch in epochs}) == 4


def test_seeds_differ():
    seeds = (0, 1, -1, 2**63 + 1)
    takes = [batches(8, seed=seed, horizontal_flip=True) for seed in seeds]
    assert len({labels(taken).tobytes() for taken in takes}) == len(seeds)
    flips = {(np.stack([b["image"] for b in taken])[..., 2, 0] > -1).tobytes() for taken in takes}
    assert len(flips) == len(seeds)


@pytest.mark.parametrize("first", [1, 5])
def test_resumes_at_a_position_to_the_bit(first):
    whole = batches(8, horizontal_flip=True)
    tail = batches(8 - first, examples_seen=first * BATCH, horizontal_flip=True)
    for batch, expected in zip(tail, whole[first:], strict=True):
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["label"], expected["label"])


def test_another_batch_size_goes_on_with_the_same_stream():
    stream = labels(batches(10))
    tail = labels(batches(2, examples_seen=3 * BATCH, batch_size=12))
    np.testing.assert_array_equal(tail, stream[24:48])


def test_flips_follow_the_position_from_anywhere():
    def flips(**where):
        images = np.concatenate([b["image"] for b in batches(2, horizontal_flip=True, **where)])
        return images[:, 0, 2, 0] > -1

    stream = flips(batch_size=40)
    for first in range(6):
        tail = flips(examples_seen=first, batch_size=7)
        np.testing.assert_array_equal(tail, stream[first : first + 14])


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_a_batch(num_processes):
    whole = batches(6, horizontal_flip=True)
    parts = [
        batches(6, rows=rows, horizontal_flip=True)
        for rows in np.arange(BATCH).reshape(-1, num_processes).T  # interleaved
    ]
    for number, expected in enumerate(whole):
        together = np.stack([part[number]["image"] for part in parts], axis=1)
        np.testing.assert_array_equal(together.reshape(expected["image"].shape), expected["image"])


def test_flips_are_half_and_follow_the_position():
    taken = batches(60, horizontal_flip=True)
    images = np.concatenate([batch["image"] for batch in taken])
    is_flipped = images[:, 0, 2, 0] > -1
    # 480 fair coins: 5 standard deviations.
    assert abs(is_flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(480)
    assert ((images[:, 0, 0, 0] > -1) != is_flipped).all()
    unflipped = np.concatenate([batch["image"] for batch in batches(60)])
    np.testing.assert_array_equal(unflipped[~is_flipped], images[~is_flipped])


def test_threads_change_nothing_and_end():
    before = threading.active_count()
    one = batches(20, num_threads=1)
    many = batches(20, num_threads=8)
    np.testing.assert_array_equal(labels(one), labels(many))
    np.testing.assert_array_equal(labels(one), labels(batches(20, num_threads=0)))
    for _ in range(200):
        if threading.active_count() <= before:
            break
        threading.Event().wait(0.01)
    assert threading.active_count() <= before


def test_many_threads_are_no_reason_to_complain(caplog):
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        batches(1, num_threads=16)
    assert not caplog.records
    with pytest.raises(UserError, match=r"data.num_threads must be at least 0, got -1"):
        batches(1, num_threads=-1)


def test_a_file_that_broke_later_is_one_sentence():
    with (
        TrainLoader(BrokenSource(), seed=0, rows=np.arange(4), global_batch_size=4) as loader,
        pytest.raises(UserError, match=r"7.png can't be decoded"),
    ):
        next(loader)


@pytest.mark.parametrize("end", ["loader.close()", "sys.exit(3)"])
def test_programs_end_without_noise(end):
    code = (
        "import sys; import numpy as np; from cfjax.data.embedded import MnistSource;"
        "from cfjax.data.loader import TrainLoader;"
        "loader = TrainLoader(MnistSource('train'), seed=0, rows=np.arange(8),"
        f"global_batch_size=8); next(loader); {end}"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert ended.returncode == (3 if "exit" in end else 0)
    assert (ended.stdout, ended.stderr) == ("", "")
