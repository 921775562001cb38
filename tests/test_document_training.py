"""Training on documents: a run that resumes to the bit, its pictures, and what is refused."""

import json

import jax
import numpy as np
import pytest
import tiny
import tiny_documents

from cfjax import build, build_documents, checkpoints, train_pictures
from cfjax.errors import UserError
from cfjax.sharding import make_mesh, unbox
from cfjax.train import train


@pytest.mark.long
def test_killed_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    """To the bit, as rows, directions, dropout and noise follow from the train step."""
    whole = train(tiny_documents.config(), str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        save = checkpoints.CheckpointWriter.save

        def save_and_die(writer, *args):
            save(writer, *args)
            raise KeyboardInterrupt

        patched.setattr(checkpoints.CheckpointWriter, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_documents.config(), str(tmp_path / "parts"))
    assert checkpoints.latest_train_step(tmp_path / "parts") < tiny.NUM_TRAIN_STEPS
    resumed = train(tiny_documents.config(), str(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(lines[-1])
    assert {"loss", "loss/image", "loss/text", "text_accuracy"} <= metrics.keys()
    config = json.loads(checkpoints.read_config(tmp_path / "whole"))
    assert config["text"]["checksum"] == "bytes"


def test_another_tokenizer_is_refused(tmp_path):
    config = tiny_documents.config(text__checksum="0" * 64)
    with pytest.raises(UserError, match="trained with 000000000000"):
        train(config, str(tmp_path))


def test_mirrored_documents_are_refused(tmp_path):
    config = tiny_documents.config(data__horizontal_flip=True)
    with pytest.raises(UserError, match=r"horizontal_flip .* left and right untrue"):
        build_documents.documents(config, "train")


def test_evaluation_during_training_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.every is for models of classes"):
        train(tiny_documents.config(evaluation__every=2), str(tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("name", ["mnist_scenes.py", "mnist_transforms.py"])
def test_pictures(name):
    config = tiny_documents.config(name, sampling__denoising_steps="2")
    documents = build_documents.documents(config, "train")
    params = unbox(jax.jit(build.init_params(build.model(config)))(jax.random.key(0)))
    picture = train_pictures.of_documents(config, params, make_mesh(), None, documents)
    size = config.data.size
    num_columns, num_rows = (8, 1) if documents.is_captioned else (6, 8)
    assert picture.dtype == np.uint8
    assert picture.shape[0] >= num_rows * size
    assert picture.shape[1] >= num_columns * size
