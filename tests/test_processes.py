"""Waiting for other processes."""

import os
import subprocess
import sys

import pytest
import runs
import tiny

# The other waits for longer than devices of CPUs do when they meet for the first time.
WORK_ALONE = """
import sys, time
import jax
from jax.experimental import multihost_utils
from cfjax import processes
address, process_id = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, process_id)
time.sleep(0 if process_id else 35)
processes.wait_for_all("work")
print(multihost_utils.process_allgather(jax.numpy.int32(process_id)).tolist(), flush=True)
"""


@pytest.mark.long
@pytest.mark.multiprocess
def test_one_process_may_work_alone():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(tiny.REPOSITORY), *sys.path]),
    }
    command = [sys.executable, "-c", WORK_ALONE, f"localhost:{runs.free_port()}"]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    assert all("[0, 1]" in output.splitlines() for output in outputs), outputs
