"""Scores during training: logged, the best kept, and the training is the same to the bit."""

import jax
import numpy as np
import pytest
import tiny
from tiny_features import TinyExtractor

from cfjax import checkpoints, evaluation_inputs, train_evaluation
from cfjax.checkpoint_folders import train_steps
from cfjax.data.image_files import write_npz
from cfjax.errors import UserError
from cfjax.metric_log import read_metrics
from cfjax.paths import absolute
from cfjax.train import train

# ml_collections loads config files that way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
EVERY = {"evaluation__every": 2, "evaluation__num_samples": 8, "train__checkpoint_every": 2}


@pytest.fixture
def tiny_extractor(monkeypatch):
    monkeypatch.setattr(evaluation_inputs, "classifier", lambda *_: TinyExtractor())


@pytest.mark.long
@pytest.mark.usefixtures("tiny_extractor")
def test_the_training_is_the_same_to_the_bit(tmp_path):
    plain = train(tiny.config(train__checkpoint_every=2), tmp_path / "plain")
    scored = train(tiny.config(**EVERY), tmp_path / "scored")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(plain), jax.device_get(scored))
    logged = {
        line["train_step"]: line["evaluation/fid"]
        for line in read_metrics(tmp_path / "scored")
        if "evaluation/fid" in line
    }
    assert list(logged) == [2, 4, 6]
    assert all(value > 0 for value in logged.values())
    assert len(set(logged.values())) == 3
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("plain", "scored")
    ]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("tiny_extractor")
def test_the_best_checkpoint_by_its_score_stays(tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train_evaluation, "scorer", lambda *_: lambda params: {"fid": next(values)})
    config = tiny.config(**EVERY, train__keep_best_metric="fid", train__keep_checkpoints=1)
    train(config, tmp_path)
    assert train_steps(absolute(tmp_path) / "checkpoints") == [4, 6]
    assert checkpoints.latest_train_step(tmp_path) == 6


def test_a_reference_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_inputs, "inception", lambda *_: TinyExtractor())
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 1), np.uint8)
    write_npz(tmp_path / "real.npz", images, np.zeros(9, np.int32))
    config = tiny.config(
        **EVERY,
        evaluation__inception_weights="inception.safetensors",
        evaluation__reference=str(tmp_path / "real.npz"),
    )
    train(config, tmp_path / "run")
    assert any("evaluation/fid" in line for line in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"evaluation__every": -1}, "evaluation.every is -1"),
        ({"evaluation__every": 2, "evaluation__num_samples": 1}, "evaluation.num_samples 1"),
        ({"train__keep_best_metric": "fid"}, "nothing is evaluated; set evaluation.every"),
        (
            {
                "train__keep_best_metric": "fid",
                "evaluation__every": 2,
                "train__checkpoint_every": 3,
            },
            "evaluation.every 2 must be a multiple of train.checkpoint_every 3",
        ),
    ],
)
def test_fields_that_do_not_fit_are_refused(overrides, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train(tiny.config(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
