"""Saved by 2 processes of 4 devices, resumed by others: same parameters, same data, none twice."""

import re
import shutil

import numpy as np
import pytest
import runs
import tiny

from cfjax.metric_log import read_metrics

SAVED_AT, LAST = 3, 7  # train steps
EPOCH = LAST * runs.BATCH  # as `faulty_train.py record_epoch` cuts the data

pytestmark = [pytest.mark.long, pytest.mark.multiprocess]


def train(folder, num_processes, num_devices, last, flags_of=tiny.flags):
    """Trains in `folder / "run"`, what is read recorded in `folder / "record"`; what it said."""
    record = folder / "record"
    record.mkdir()
    run = runs.Run(
        folder / "run",
        num_processes=num_processes,
        num_devices=num_devices,
        fault=("record_epoch", record),
        flags_of=flags_of,
        train__num_train_steps=last,
        train__checkpoint_every=SAVED_AT,
        train__log_every=1,
        data__num_threads=0,  # else examples are read ahead that are never trained on
    )
    with run:
        assert run.codes() == [0] * num_processes, run.said()
        return run.said()


def digest(folder, what):
    (path,) = (folder / "record").glob(f"{SAVED_AT}.{what}")
    return path.read_text()


def batches_read(folder, num_processes):
    """The examples of each global batch, sorted, int `[train steps, batch]`."""
    parts = [
        [line.split() for line in path.read_text().splitlines()]
        for path in (folder / "record").iterdir()
        if path.suffix not in (".saved", ".restored")
    ]
    assert len(parts) == num_processes
    return np.sort(np.concatenate(np.array(parts, int), axis=1))


@pytest.fixture(
    scope="module", params=[tiny.flags, tiny.document_flags], ids=["images", "documents"]
)
def flags_of(request):
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory, flags_of):
    """A run of 2 processes of 4 devices that has ended with its checkpoint of train step 3."""
    folder = tmp_path_factory.mktemp("saved")
    train(folder, 2, 4, SAVED_AT, flags_of)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, flags_of):
    """The same run to its end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, 2, 4, LAST, flags_of)
    return folder


@pytest.mark.parametrize(("num_processes", "num_devices"), [(1, 8), (1, 1), (4, 2)])
def test_resumed_elsewhere(num_processes, num_devices, flags_of, saved, uninterrupted, tmp_path):
    """Of documents a row is an example."""
    shutil.copytree(saved / "run", tmp_path / "run")
    said = train(tmp_path, num_processes, num_devices, LAST, flags_of)
    assert re.search(rf"resuming after train step {SAVED_AT}\b", said), said
    assert digest(tmp_path, "restored") == digest(saved, "saved")  # the same bits

    before, after = batches_read(saved, 2), batches_read(tmp_path, num_processes)
    assert (len(before), len(after)) == (SAVED_AT, LAST - SAVED_AT)
    batches = np.concatenate([before, after])
    np.testing.assert_array_equal(batches, batches_read(uninterrupted, 2))
    # An epoch together: each example once.
    np.testing.assert_array_equal(np.sort(batches, axis=None), np.arange(EPOCH))

    # The devices add up in another order, which Adam's updates amplify.
    losses, expected = (
        [line["loss"] for line in read_metrics(folder / "run")]
        for folder in (tmp_path, uninterrupted)
    )
    assert len(losses) == LAST
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
