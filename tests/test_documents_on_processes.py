"""Two processes caption and score as one device does."""

import json

import numpy as np
import pytest
import tiny
import tiny_documents
import tiny_features
from runs import ONE_DEVICE, TWO_PROCESSES, launch

from cfjax.data.image_files import write_npz

pytestmark = [pytest.mark.long, pytest.mark.multiprocess]


def checkpoint(workdir, name):
    config = tiny_documents.config(name, sampling__images_per_device=1)
    tiny.save_random_checkpoint(workdir, of_run=config)
    return workdir


def test_captions(tmp_path):
    """To the byte; 11 images are no multiple of the 8 that are described at once."""
    workdir = checkpoint(tmp_path / "run", "mnist_scenes.py")
    write_npz(tmp_path / "x.npz", tiny_features.images(11, size=16, channels=3), np.zeros(11, int))
    flags = [f"--checkpoint={workdir}", f"--images={tmp_path / 'x.npz'}", "--temperature=1"]
    made = []
    for place in (ONE_DEVICE, TWO_PROCESSES):
        out = tmp_path / f"{place}.jsonl"
        launch(place, "caption", *flags, f"--out={out}")
        made.append(out.read_text())
    assert len(set(made[0].splitlines())) > 1
    assert made[1] == made[0]


def test_scores(tmp_path):
    """Of what both processes made, the first keeps all and scores it."""
    workdir = checkpoint(tmp_path / "run", "mnist_transforms.py")
    made, reports = [], []
    for place in (ONE_DEVICE, TWO_PROCESSES):
        out = tmp_path / str(place)
        launch(
            place,
            "evaluate_documents",
            f"--checkpoint={workdir}",
            f"--out={out}",
            "--num_samples=11",
        )
        blocks = []
        for path in sorted(out.glob("generated/*/*.npz")):
            with np.load(path) as arrays:
                blocks.append(arrays["images"])
        made.append(np.concatenate(blocks))
        reports.append(json.loads((out / "scores.json").read_text())["scores"])
    assert len(made[0]) == 11
    np.testing.assert_array_equal(made[1], made[0])
    assert reports[1] == reports[0]
