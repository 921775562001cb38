"""Two processes of 4 virtual devices each: mesh, batches, training, checkpoints, as on one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import multiprocess_worker
import numpy as np
import pytest

from cfjax import checkpoints, metric_log, sharding

REPOSITORY = Path(__file__).parent.parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.multiprocess
def test_two_processes_train_as_one(tmp_path):
    address = f"localhost:{free_port()}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                multiprocess_worker.__file__,
                f"--workdir={tmp_path / 'two'}",
                f"--coordinator_address={address}",
                "--num_processes=2",
                f"--process_id={process_id}",
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process_id in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    mesh = sharding.make_mesh(fsdp=4)
    state, losses = multiprocess_worker.train_and_save(mesh, tmp_path / "one")
    target = sharding.abstract_sharded(multiprocess_worker.create, mesh, jax.random.key(0))
    of_two, examples_seen = checkpoints.restore_state(tmp_path / "two", target)
    assert examples_seen == 32
    # The reduction over processes adds in another order, and Adam's first steps amplify that.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), of_two, state)
    lines = metric_log.read_metrics(tmp_path / "two")
    assert [line["train_step"] for line in lines] == [1, 2]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-5)
