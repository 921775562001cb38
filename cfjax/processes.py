"""Waiting for the other processes of a run."""

import jax
from orbax.checkpoint import multihost

# A process that dies is noticed much sooner, by its heartbeat.
_TIMEOUT_SECONDS = 24 * 3600


def wait_for_all(name: str) -> None:
    """Returns when all processes have called this.

    Before devices of several processes meet for the first time, as those of CPUs wait there for 30 s
    only: after compiling, or where one process has worked alone.

    Args:
      name: what is waited for, in error messages.
    """
    if jax.process_count() > 1:
        multihost.sync_global_processes(
            multihost.unique_barrier_key(name),
            timeout=_TIMEOUT_SECONDS,
            processes=set(range(jax.process_count())),
        )
