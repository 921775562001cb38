"""Programs of cfjax in one or several processes; trainings with the tiny config, to be disturbed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tiny
from absl import flags

from cfjax import build, checkpoints, sharding
from cfjax.metric_log import read_metrics
from cfjax.optimizer import make_optimizer

FAULTY = str(Path(__file__).parent / "faulty_train.py")
# Generous, as the machine may be busy: what takes longer has hung.
TIMEOUT = 300
BATCH = 16
# Of programs in processes of their own: how many, and the devices of each.
ONE_DEVICE, TWO_PROCESSES = (1, 1), (2, 4)


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_in_process(program, arguments):
    """`program.main` with its flags, as the command line would."""
    before = list(flags.FLAGS)
    try:
        program.define_flags()
        flags.FLAGS(["program", *arguments])
        program.main([])
    finally:
        flags.FLAGS.unparse_flags()
        flags.FLAGS.remove_flag_values([name for name in flags.FLAGS if name not in before])


def launch(place, name, *flags):
    """Runs a program of cfjax by the launcher, which sets the processes and their devices."""
    num_processes, num_devices = place
    launcher = ["bash", "launch/local_processes.sh", str(num_processes)]
    done = subprocess.run(
        [*launcher, sys.executable, "-m", f"cfjax.{name}", *map(str, flags)],
        cwd=tiny.REPOSITORY,
        env=os.environ | {"XLA_FLAGS": "", "DEVICES": str(num_devices)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Run:
    """A context manager; its processes do not outlive it."""

    def __init__(
        self,
        workdir,
        *,
        num_processes=1,
        num_devices=1,
        fault=(),
        workdir_flag=None,
        flags_of=tiny.flags,
        **overrides,
    ):
        """Starts the processes, each with `num_devices` virtual ones.

        What they say goes to `workdir`, which is the program's too, unless `workdir_flag` is. The
        config is that of `flags_of` with overrides.
        """
        self.workdir = workdir
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(tiny.REPOSITORY), *sys.path]),
        }
        program = [FAULTY, *map(str, fault)] if fault else ["-m", "cfjax.train"]
        command = [sys.executable, *program, *flags_of(**overrides)]
        command.append(f"--workdir={workdir_flag or workdir}")
        address = f"--coordinator_address=localhost:{free_port()}"
        several = [address, f"--num_processes={num_processes}"] if num_processes > 1 else []
        workdir.mkdir(exist_ok=True)
        self._logs, self._readers, self.processes = [], [], []
        for process_id in range(num_processes):
            log = workdir / f"log.{time.monotonic_ns()}.{process_id}"
            own = [*several, f"--process_id={process_id}"] if several else []
            # By a pipe, as a limit on the size of files would hold for a file here too.
            process = subprocess.Popen(
                [*command, *own],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=tiny.REPOSITORY,
            )
            with log.open("w") as file:
                self._readers.append(subprocess.Popen(["cat"], stdin=process.stdout, stdout=file))
            process.stdout.close()
            self.processes.append(process)
            self._logs.append(log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in [*self.processes, *self._readers]:
            process.wait()

    def said(self):
        """What all processes wrote."""
        return "\n".join(log.read_text(errors="replace") for log in self._logs)

    def wait_until(self, condition):
        """Returns when `condition()` holds; the processes must live so long."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def wait_for_checkpoint(self, at_least=1):
        """Returns when there is a checkpoint of at least this train step."""
        self.wait_until(lambda: max(checkpoints.train_steps(self.workdir), default=0) >= at_least)

    def codes(self, timeout=TIMEOUT):
        """The exit codes; fails when a process has not ended in time."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)  # says where it is
                process.wait()
                raise AssertionError(f"still running after {timeout} s: {self.said()}") from None
        for reader in self._readers:
            reader.wait()
        return [process.returncode for process in self.processes]


def restored(workdir, train_step=None, **overrides):
    """The state and its examples seen, on the devices of this process."""
    config = tiny.config(**overrides)
    init = build.init_state(build.model(config), make_optimizer(build.optimizer_settings(config)))
    target = sharding.abstract_sharded(init, sharding.make_mesh(), jax.random.key(0))
    return checkpoints.restore_state(workdir, target, train_step)


def assert_nothing_lost(workdir, train_steps=None, **overrides):
    """Every checkpoint restores and is finite, and the log is whole; returns the newest."""
    saved = checkpoints.train_steps(workdir)
    assert saved and (train_steps is None or saved == train_steps)
    for train_step in saved:
        state, examples_seen = restored(workdir, train_step, **overrides)
        assert int(state.train_step) == train_step and examples_seen == BATCH * train_step
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    logged = [line["train_step"] for line in read_metrics(workdir)]
    assert logged == sorted(set(logged))
    return saved[-1]


def assert_resumes(workdir, newest, *, num_processes=1, num_devices=1, fault=(), **overrides):
    """Four more train steps from the checkpoint `newest`, to the end; what the run said."""
    last = newest + 4
    overrides |= {"train__num_train_steps": last}
    run = Run(
        workdir, num_processes=num_processes, num_devices=num_devices, fault=fault, **overrides
    )
    with run:
        assert run.codes() == [0] * num_processes, run.said()
        said = run.said()
    assert re.search(rf"resuming after train step {newest}\b", said), said
    assert assert_nothing_lost(workdir, **overrides) == last
    assert [line["train_step"] for line in read_metrics(workdir)][-1] == last
    return said
