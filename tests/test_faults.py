"""Faults that a test makes happen to `python -m cfjax.train`: nothing good is lost, and it resumes.

SIGKILL at random moments, also during saves, is in test_train.py and test_checkpoints.py. A full
disk is a limit on the size of files here: what writes fails with EFBIG instead of ENOSPC, and with
it in the same places.
"""

import gc
import re
import signal
import time

import numpy as np
import pytest
import runs
from PIL import Image

from cfjax import checkpoints, preemption
from cfjax.checkpoint_folders import CorruptCheckpoint

FOREVER = {"train__num_train_steps": 100_000, "train__checkpoint_every": 5, "train__log_every": 1}
SHORT = {"train__checkpoint_every": 5, "train__log_every": 1}
TWO = {"num_processes": 2, "num_devices": 2}

pytestmark = [pytest.mark.long, pytest.mark.multiprocess]


@pytest.mark.parametrize("victim", [0, 1])
def test_sigkill_of_one_process_of_two(victim, tmp_path):
    """The other ends by itself, without a launcher that would stop it."""
    with runs.Run(tmp_path, **TWO, **FOREVER) as run:
        run.wait_for_checkpoint()
        run.processes[victim].kill()
        codes = run.codes(timeout=60)
        said = run.said()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, 75), said
    assert re.search("(another task died|lost another process of this run)", said), said
    newest = runs.assert_nothing_lost(tmp_path)
    runs.assert_resumes(tmp_path, newest, **TWO, **SHORT)


@pytest.mark.parametrize("processes", [{}, TWO])
def test_sigterm_saves_and_asks_to_be_started_again(processes, tmp_path):
    """One process of two is told; all save the same train step. A second notice changes nothing."""
    with runs.Run(tmp_path, **processes, **FOREVER) as run:
        run.wait_for_checkpoint()
        for _ in range(100):  # until it has ended, through the save
            run.processes[-1].terminate()
            time.sleep(0.05)
        codes = run.codes()
        said = run.said()
    assert codes == [preemption.EXIT_CODE] * len(codes), said
    newest = runs.assert_nothing_lost(tmp_path)
    assert f"Told to end: train step {newest} of 100000 is saved" in said
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    runs.assert_resumes(tmp_path, newest, **processes, **SHORT)


def test_sigterm_before_the_first_train_step(tmp_path):
    with runs.Run(tmp_path, **TWO, **FOREVER) as run:
        run.wait_until(lambda: "training images" in run.said())
        run.processes[1].terminate()
        assert run.codes() == [preemption.EXIT_CODE] * 2, run.said()
    assert runs.assert_nothing_lost(tmp_path) < 5


def test_sigterm_changes_no_bit(tmp_path):
    whole, told = tmp_path / "whole", tmp_path / "told"
    with runs.Run(told, **FOREVER) as run:
        run.wait_for_checkpoint()
        run.processes[0].terminate()
        assert run.codes() == [preemption.EXIT_CODE], run.said()
    newest = runs.assert_nothing_lost(told)
    runs.assert_resumes(told, newest, **SHORT)
    with runs.Run(whole, **SHORT, train__num_train_steps=newest + 4) as run:
        assert run.codes() == [0], run.said()
    for leaf, expected in zip(leaves(told), leaves(whole), strict=True):
        np.testing.assert_array_equal(leaf, expected)


def leaves(workdir):
    import jax

    return jax.tree.leaves(runs.restored(workdir)[0])


@pytest.mark.parametrize("damage", ["truncated", "removed"])
@pytest.mark.parametrize("processes", [{}, TWO])
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)
def test_newest_checkpoint_damaged(damage, processes, tmp_path):
    with runs.Run(tmp_path, **processes, **SHORT, train__num_train_steps=10) as run:
        assert run.codes() == [0] * len(run.processes), run.said()
    (file,) = (tmp_path / "checkpoints" / "10" / "state" / "d").iterdir()
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CorruptCheckpoint):
        runs.restored(tmp_path, 10)
    time.sleep(0.1)
    gc.collect()  # orbax drops the other arrays, which complain of it here and not in another test
    said = runs.assert_resumes(tmp_path, 5, **processes, **SHORT)
    assert said.count("The checkpoint of train step 10 can't be read") == 1
    assert "going on from the one of train step 5." in said
    assert checkpoints.train_steps(tmp_path) == [5, 9]
    assert (tmp_path / "checkpoints" / "10.damaged").is_dir()
    runs.assert_resumes(tmp_path, 9, **processes, **SHORT)  # through train step 10 again
    assert checkpoints.train_steps(tmp_path) == [9, 10, 13]


@pytest.mark.parametrize("processes", [{}, TWO])
def test_full_disk(processes, tmp_path):
    with runs.Run(tmp_path, **processes, fault=("full_disk", 10), **FOREVER) as run:
        codes = run.codes()
        said = run.said()
    assert codes[0] == 2 and 0 not in codes, said
    assert re.search(r"error: (a checkpoint|the metrics) .*could not be written", said), said
    assert runs.assert_nothing_lost(tmp_path, [5]) == 5
    runs.assert_resumes(tmp_path, 5, **processes, **SHORT)


def test_nan_in_a_batch(tmp_path):
    """The parameters after that train step are NaN, and no checkpoint has them."""
    with runs.Run(tmp_path, fault=("record", tmp_path), **SHORT, train__num_train_steps=8) as run:
        assert run.codes() == [0], run.said()
    (record,) = tmp_path.glob("0.*")
    index = record.read_text().splitlines()[6].split()[3]  # of train step 7
    spoiled = tmp_path / "spoiled"
    with runs.Run(spoiled, fault=("nan", index), **FOREVER) as run:
        assert run.codes() == [2], run.said()
        said = run.said()
    assert "of train step 7 is nan (examples 96 to 111 of the data)" in said
    assert "the last checkpoint is intact" in said
    assert runs.assert_nothing_lost(spoiled, [5]) == 5
    runs.assert_resumes(spoiled, 5, **SHORT)


def test_damaged_image(tmp_path):
    """A file that broke after the run had checked it is named; mended, the run goes on."""
    pictures = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (pictures / label).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / label / f"{i}.png")
    own = {
        "data__name": "image_folder",
        "data__path": str(pictures),
        "data__channels": 3,
        "data__num_classes": 2,
    }
    workdir = tmp_path / "run"
    with runs.Run(workdir, fault=("decode_late", "-"), **FOREVER, **own) as run:
        run.wait_for_checkpoint()
        whole = {path: path.read_bytes() for path in pictures.glob("cat/*.png")}
        for path, content in whole.items():
            path.write_bytes(content[: len(content) // 2])
        codes = run.codes()
        said = run.said()
    assert codes == [2], said
    assert re.search(r"error: .*pictures/cat/\d+\.png", said), said
    newest = runs.assert_nothing_lost(workdir, **own)
    for path, content in whole.items():
        path.write_bytes(content)
    runs.assert_resumes(workdir, newest, **SHORT, **own)


@pytest.mark.parametrize("process", [0, 1])
def test_one_process_that_fails_ends_the_other(process, tmp_path):
    """The other is in a train step, where nobody will meet it."""
    with runs.Run(tmp_path, **TWO, fault=("unreadable", process), **FOREVER) as run:
        codes = run.codes()
        said = run.said()
    assert codes[process] == 2 and codes[1 - process] not in (0, 75), said
    assert "error: the disk of this process is gone; plug it in." in said
    runs.assert_resumes(tmp_path, runs.assert_nothing_lost(tmp_path), **TWO, **SHORT)
