"""Workdirs in cloud storage, against a stand-in for it; nothing leaves this machine."""

import json
import struct

import fake_cloud
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from tensorboardX.proto import event_pb2

from cfjax import (
    autoencoder_files,
    autoencoder_results,
    checkpoint_folders,
    checkpoints,
    paths,
    program,
    sharding,
    train_state,
)
from cfjax.errors import UserError
from cfjax.metric_log import MetricLog, read_metrics
from cfjax.models.autoencoder_kl import AutoencoderKL

RUN = "gs://bucket/runs/a"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The objects; and nothing may be written to the folder at hand."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield fake_cloud.install(tmp_path / "objects")
    assert list((tmp_path / "here").iterdir()) == []


def init():
    return train_state.create({"w": jnp.arange(8.0)}, optax.sgd(1.0))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(fsdp=4)


def save(mesh, train_steps, **retention):
    state = sharding.born_sharded(init, mesh)
    with checkpoints.CheckpointWriter(RUN, **retention) as writer:
        for number in train_steps:
            train_step = jax.device_put(jnp.int32(number), sharding.replicated(mesh))
            writer.save(state.replace(train_step=train_step), '{"a": 1}', number, float(number))


def test_checkpoints(store, mesh):
    save(mesh, (1, 2, 3, 4), keep_last=2, best_metric="loss")
    assert checkpoints.train_steps(RUN) == [1, 3, 4]
    folders = {name.split("/")[4] for name in store.names("bucket/runs/a/checkpoints/")}
    assert folders == {"1", "3", "4"}
    state, examples_seen = checkpoints.restore_newest(RUN, sharding.abstract_sharded(init, mesh))
    assert (int(state.train_step), examples_seen) == (4, 4)
    np.testing.assert_array_equal(state.params["w"], np.arange(8))
    for directory in (RUN, f"{RUN}/checkpoints", f"{RUN}/checkpoints/3"):
        np.testing.assert_array_equal(checkpoints.restore_ema(directory)["w"], np.arange(8))
    assert json.loads(checkpoints.read_config(RUN)) == {"a": 1}


def test_an_unfinished_checkpoint_never_counts(store, mesh):
    save(mesh, (1, 2), keep_last=3)
    store.delete("bucket/runs/a/checkpoints/2/commit_success.txt")
    assert checkpoints.train_steps(RUN) == [1]
    save(mesh, (2, 3), keep_last=3)
    assert checkpoints.train_steps(RUN) == [1, 2, 3]


def test_falls_back(store, mesh):
    save(mesh, (1, 2), keep_last=3)
    store.delete("bucket/runs/a/checkpoints/2/data/data.json")
    state, _ = checkpoints.restore_newest(RUN, sharding.abstract_sharded(init, mesh))
    assert int(state.train_step) == 1
    folders = {name.split("/")[4] for name in store.names("bucket/runs/a/checkpoints/")}
    assert folders == {"1", "2.damaged"}
    assert "bucket/runs/a/checkpoints/2.damaged/metadata/metadata.json" in store.names()


def test_metric_log(store):
    with MetricLog(RUN) as log:
        for train_step in range(1, 5):
            log.write(train_step, {"loss": 1 / train_step})
        log.flush()
        assert len(read_metrics(RUN)) == 4
        log.image(4, "samples", np.zeros((4, 4, 1), np.uint8))
    with MetricLog(RUN, 2) as log:
        log.write(3, {"loss": 9.0})
    assert [line["loss"] for line in read_metrics(f"{RUN}/metrics.jsonl")] == [1, 1 / 2, 9]
    tags = [
        value.tag
        for name in store.names("bucket/runs/a/tensorboard/")
        for event in events(store.get(name))
        for value in event.summary.value
    ]
    assert tags.count("loss") == 5 and tags.count("samples") == 1
    with pytest.raises(UserError, match="cannot read the metrics gs://bucket/runs/b"):
        read_metrics("gs://bucket/runs/b")


def events(content):
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_autoencoder(store):
    module = AutoencoderKL(
        channels=2, channel_multipliers=(1,), latent_channels=1, scale=0.5, num_groups=1
    )
    params = module.init(jax.random.key(0), jnp.zeros((1, 1, 1, 3)))["params"]
    folder = f"{RUN}/autoencoder"
    for number in (1, 2):
        checksum = autoencoder_results.write_folder(folder, module, params, {"number": number})
    autoencoder_results.write_picture(f"{RUN}/picture.png", np.zeros((2, 3, 1), np.uint8))
    loaded = autoencoder_files.load(folder)
    assert (loaded.module, loaded.checksum) == (module, checksum)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert json.loads(store.get("bucket/runs/a/autoencoder/training.json")) == {"number": 2}
    assert store.get("bucket/runs/a/picture.png").startswith(b"\x89PNG")


def test_paths(store):
    assert str(paths.absolute(RUN)) == RUN
    program.check_workdir_writable(RUN)
    assert store.names() == []
    for read in (paths.absolute, program.check_workdir_writable, checkpoint_folders.find):
        with pytest.raises(UserError, match="unknown kind of storage 'gcs'; did you mean 'gs'"):
            read("gcs://bucket/runs/a")
        with pytest.raises(UserError, match=r"s3://bucket/a needs one more package: .*s3fs"):
            read("s3://bucket/a")
    with pytest.raises(UserError, match="there is no folder gs://bucket/nowhere"):
        checkpoints.restore_ema("gs://bucket/nowhere")


@pytest.mark.long
def test_program_trains_and_resumes(store, tmp_path):
    options = {"fault": ("cloud", tmp_path / "objects"), "workdir_flag": RUN}
    options |= {"train__checkpoint_every": 2, "train__log_every": 1}
    for number, last in enumerate((3, 5)):
        with runs.Run(tmp_path / "logs", train__num_train_steps=last, **options) as run:
            assert run.codes() == [0], run.said()
            said = run.said()
        assert ("resuming after train step 3" in said) == (number == 1)
    assert checkpoints.train_steps(RUN) == [3, 4, 5]
    assert [line["train_step"] for line in read_metrics(RUN)] == [1, 2, 3, 4, 5]
    assert {path.name.split(".")[0] for path in (tmp_path / "logs").iterdir()} == {"log"}
