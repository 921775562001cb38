"""Preemption: SIGTERM says that this machine will be taken away; a run saves and ends in time.

The exit code `EXIT_CODE` says that the same command, run again, goes on.
"""

import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again

_noticed = threading.Event()


class Preempted(Exception):
    """The run was asked to end and has saved; programs exit with `EXIT_CODE`."""


def listen() -> None:
    """Takes SIGTERM for the notice of a preemption, as often as it comes, from now on.

    To be called by the main thread, before `jax.distributed` is initialized, whose own handler of
    SIGTERM then takes over.
    """
    signal.signal(signal.SIGTERM, lambda *_: _noticed.set())


def is_due(count: int) -> bool:
    """Whether to save now and end; all processes agree.

    To be called by every process after each train step. When one of them is noticed, the answer is
    yes on all of them at the same, nearest train step.

    Args:
      count: train steps since the start of the program, from 1.
    """
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(count)
    return _noticed.is_set()


def ignore_from_now_on() -> None:
    """Drops further notices, which would kill a program that is about to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
