"""The metric log: what it writes, and that a resumed log reads as if never stopped."""

import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from cfjax.errors import UserError
from cfjax.metric_log import MetricLog, read_metrics


def read_events(workdir):
    """TensorBoard events: records of length (8 bytes), checksum (4), content, checksum (4)."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_writes_what_it_is_told(tmp_path):
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": jnp.float32(0.5), "rate": np.float64(2.25), "count": 3})
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5
        log.write(2, {"loss": jnp.array([0.25])[0]})
        log.image(2, "samples", np.zeros((8, 6, 3), np.uint8))
    lines = read_metrics(tmp_path)
    assert lines == [
        {"train_step": 1, "loss": 0.5, "rate": 2.25, "count": 3.0},
        {"train_step": 2, "loss": 0.25},
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    events = read_events(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert (1, "loss", 0.5) in scalars and (2, "loss", 0.25) in scalars
    (image,) = [v.image for e in events for v in e.summary.value if v.HasField("image")]
    assert (image.height, image.width) == (8, 6)


def test_not_finite_values_stay_valid_json(tmp_path):
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": math.nan, "norm": math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "train_step": 1,
        "loss": None,
        "norm": None,
    }
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["loss"]) and math.isnan(line["norm"])


def test_resumed_log_reads_as_if_never_stopped(tmp_path):
    def run(workdir, train_steps, start):
        with MetricLog(workdir, start) as log:
            for train_step in train_steps:
                log.write(train_step, {"loss": 1 / (train_step + 1)})

    run(tmp_path / "straight", range(10), 0)
    run(tmp_path / "resumed", range(8), 0)
    run(tmp_path / "resumed", range(6, 10), 5)
    straight = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == straight
    starts = [e.step for e in read_events(tmp_path / "resumed") if e.HasField("session_log")]
    assert starts == [0, 6]
    names = {path.name for path in (tmp_path / "resumed").iterdir()}
    assert names == {"metrics.jsonl", "tensorboard"}


def test_new_run_empties_the_log(tmp_path):
    for _ in range(2):
        with MetricLog(tmp_path, 0) as log:
            log.write(0, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1


def test_half_a_line_is_passed_over_and_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train_step": 1, "loss": 1.0}\n{"train_step": 2, "lo')
    assert read_metrics(path) == [{"train_step": 1, "loss": 1.0}]
    with MetricLog(tmp_path, 1) as log:
        log.write(2, {"loss": 2.0})
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 2.0]


def test_unreadable_log_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: No such file"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"train_step": 1}\nrubbish\n{"train_step": 3}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is not JSON"):
        MetricLog(tmp_path, 1)


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        log.image(1, "samples", np.zeros((4, 4, 1), np.uint8))
    assert list(tmp_path.iterdir()) == []
