"""The training program: resuming, meshes, processes, metrics, and what is refused."""

import json
import os
import random
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from cfjax import build, checkpoints, sharding
from cfjax.errors import UserError
from cfjax.metric_log import read_metrics
from cfjax.optimizer import make_optimizer
from cfjax.train import train


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, train(tiny.config(), workdir)


def assert_same_bits(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), tree, expected)


def restored(workdir, config=None, **mesh_sizes):
    config = config or tiny.config()
    init = build.init_state(build.model(config), make_optimizer(build.optimizer_settings(config)))
    mesh = sharding.make_mesh(**mesh_sizes)
    return checkpoints.restore_state(
        workdir, sharding.abstract_sharded(init, mesh, jax.random.key(0))
    )


def test_the_last_checkpoint_is_the_final_state(uninterrupted):
    workdir, state = uninterrupted
    saved, examples_seen = restored(workdir)
    assert_same_bits(saved, state)
    assert examples_seen == tiny.NUM_TRAIN_STEPS * 16
    assert checkpoints.train_steps(workdir) == [3, 6]


def test_the_best_checkpoint_stays(tmp_path):
    """With the metric of the train steps since the checkpoint before, here one."""
    keep = {"train__keep_checkpoints": 1, "train__keep_every": 2, "train__log_every": 1}
    config = tiny.config(train__checkpoint_every=1, train__keep_best_metric="gradient_norm", **keep)
    train(config, tmp_path)
    lowest = min(read_metrics(tmp_path), key=lambda line: line["gradient_norm"])
    assert set(checkpoints.train_steps(tmp_path)) == {2, 4, 6, lowest["train_step"]}
    metadata = tmp_path / "checkpoints" / "6" / "metadata" / "metadata.json"
    assert json.loads(metadata.read_text())["best"] == {
        "train_step": lowest["train_step"],
        "value": lowest["gradient_norm"],
    }


def test_an_unknown_metric_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep_best_metric 'los'; did you mean 'loss'"):
        train(tiny.config(train__keep_best_metric="los"), tmp_path)


@pytest.mark.long
def test_splash_attention_elsewhere_than_on_tpus_is_named(tmp_path, caplog):
    config = tiny.config(model__attention="splash", model__depth=1, train__num_train_steps=1)
    with caplog.at_level("WARNING"):
        train(config, tmp_path)
    assert "add --config.model.attention=fused" in caplog.text


def test_ema_follows_and_parameters_move(uninterrupted):
    _, state = uninterrupted
    final = state.params["final_projection"]["kernel"]
    assert np.abs(final).max() > 0  # starts at zero
    assert not np.array_equal(final, state.ema_params["final_projection"]["kernel"])


def test_resumed_equals_uninterrupted_to_the_bit(uninterrupted, tmp_path):
    """A checkpoint off the rhythm of the log, and a resume from it."""
    config = tiny.config(train__num_train_steps=3)
    train(config, tmp_path)
    state = train(tiny.config(), tmp_path)
    assert_same_bits(state, uninterrupted[1])


def test_a_finished_run_changes_nothing(uninterrupted):
    workdir, state = uninterrupted
    before = {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    assert_same_bits(train(tiny.config(), workdir), state)
    after = {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    assert before == after


def test_metrics(uninterrupted):
    lines = read_metrics(uninterrupted[0])
    assert [line["train_step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["loss"] > 0
        assert line["gradient_norm"] > 0
        assert line["images_per_second"] > 0
        assert "loss/ar_step_0" in line
        assert any(name.startswith("loss/noise_quartile_") for name in line)
    # The learning rate of update k is lr min(1, k / warm-up), k from 0.
    np.testing.assert_allclose([line["learning_rate"] for line in lines], [1e-3, 2e-3, 2e-3])


def program_environment():
    return os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


@pytest.mark.long
def test_killed_five_times_ends_with_the_same_bits(tmp_path):
    """SIGKILL at random moments, of saves too (every train step saves)."""
    flags = tiny.flags(train__num_train_steps=150, train__checkpoint_every=1)

    def command(workdir):
        return [sys.executable, "-m", "cfjax.train", *flags, f"--workdir={workdir}"]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    rng, kills, in_a_save = random.Random(0), 0, 0
    places = {"cwd": tiny.REPOSITORY, "env": program_environment()}
    while kills < 5:
        before = max(checkpoints.train_steps(killed), default=0)
        process = subprocess.Popen(command(killed), stderr=subprocess.DEVNULL, **places)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if max(checkpoints.train_steps(killed), default=0) > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
        kills += 1
        in_a_save += any("tmp" in p.name for p in (killed / "checkpoints").iterdir())
    assert in_a_save, "no kill fell into a save"
    for workdir in (killed, whole):
        subprocess.run(command(workdir), check=True, stderr=subprocess.DEVNULL, **places)
    config = tiny.config(train__num_train_steps=150)
    ends = [restored(workdir, config)[0] for workdir in (killed, whole)]
    assert int(ends[0].train_step) == 150
    assert_same_bits(*ends)
    lines = [
        [(line["train_step"], line["loss"]) for line in read_metrics(workdir)]
        for workdir in (killed, whole)
    ]
    assert [step for step, _ in lines[0]] == [step for step, _ in lines[1]]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """The second update, the first with a learning rate above 0, throws the parameters away."""
    config = tiny.config(train__checkpoint_every=1, optimizer__learning_rate=1e38)
    with pytest.raises(UserError) as error:
        train(config, tmp_path)
    message = str(error.value)
    assert "of train step 3 is" in message
    assert "examples 32 to 47" in message
    assert "the last checkpoint is intact" in message
    assert checkpoints.train_steps(tmp_path) == [1, 2]
    assert int(restored(tmp_path)[0].train_step) == 2


BAD_VALUES = [
    ({"factorization__mode": "fixed", "factorization__num_ar_steps": 17}, "num_ar_steps is 17"),
    ({"sampling__num_ar_steps": 17}, "num_ar_steps is 17, but an image of 16 tokens"),
    (
        {"factorization__mode": "decay"},
        "unknown factorization mode 'decay'; did you mean 'decayed'",
    ),
    ({"train__global_batch_size": 12}, "a batch of 12 does not divide"),
    ({"mesh__data": 3}, "mesh data=3"),
    ({"mesh__data": 1, "mesh__tensor": 8}, "activation_heads 2 does not divide"),
    ({"model__patch_size": 5}, "patch_size 5 does not divide data.size 28"),
    ({"model__num_heads": 3}, "width 16 is not divisible by 3 heads"),
    ({"model__dtype": "float8"}, "unknown dtype 'float8'"),
    ({"data__num_classes": 7}, "data.num_classes is 7, but the data have 10 classes"),
    ({"data__size": 35}, "does not fit the digits"),
    ({"data__name": "cifar"}, "unknown data.name 'cifar'"),
    ({"data__name": "latents"}, "autoencoder.path is empty"),
    ({"data__name": "image_folder", "data__path": "nowhere"}, "no image folder 'nowhere'"),
    ({"sampling__denoising_steps": "many"}, "respacing 'many' is not understood"),
    ({"optimizer__schedule": "cosine", "optimizer__warmup_steps": 9}, "warmup_steps is 9"),
    ({"train__log_every": 0}, "train.log_every is 0"),
    (
        {"train__keep_every": 4},
        "train.keep_every is 4, but must be a multiple of train.checkpoint_every, 3",
    ),
]


@pytest.mark.parametrize(("overrides", "words"), BAD_VALUES)
def test_bad_values_are_refused_and_nothing_is_written(overrides, words, tmp_path):
    with pytest.raises(UserError) as error:
        train(tiny.config(**overrides), tmp_path / "run")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_architecture_is_refused(uninterrupted):
    with pytest.raises(UserError, match=r"is of another architecture: .* in the config"):
        train(tiny.config(model__width=32), uninterrupted[0])
    assert checkpoints.train_steps(uninterrupted[0]) == [3, 6]


@pytest.mark.long
@pytest.mark.slow
def test_trains_on_ones_own_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    state = train(
        tiny.config(
            data__name="image_folder",
            data__path=str(tmp_path / "pictures"),
            data__channels=3,
            data__num_classes=2,
            data__horizontal_flip=True,
            train__num_train_steps=2,
        ),
        tmp_path / "run",
    )
    assert int(state.train_step) == 2
