"""What every program shares: one sentence for bad input, quiet libraries, several processes."""

import faulthandler
import logging as python_logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from cfjax import preemption
from cfjax.config_loading import parse_flags
from cfjax.errors import UserError
from cfjax.paths import absolute, is_cloud

_PACKAGE = str(Path(__file__).parent) + os.sep
# A process that has not been heard of for so long is dead, and ends the others.
_HEARTBEAT_TIMEOUT_SECONDS = 30
# A process that fails leaves after so long, in which the others can say that they failed too.
_FAREWELL_SECONDS = 3


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a program's `main(argv)` after parsing the flags; does not return.

    A `UserError`, and flags that are not understood, end it with `error: <one sentence>` on stderr
    and exit code 2; `Preempted` with `preemption.EXIT_CODE`, 75. Of `absl.logging`, messages of
    cfjax are shown from INFO on, those of libraries from WARNING on.

    When one of several processes fails or is killed, the others end within a minute.
    """

    def guarded(argv: Sequence[str]) -> None:
        _quiet_libraries()
        _exit_on_error(main, argv)

    app.run(guarded, flags_parser=lambda argv: _exit_on_error(_parse_all, argv))


def _parse_all(argv: Sequence[str]) -> list[str]:
    rest = parse_flags(argv)
    if len(rest) > 1:
        raise UserError(f"the argument {rest[1]!r} is not understood; flags start with '--'.")
    return rest


def _exit_on_error(function: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> Any:
    try:
        return function(argv)
    except preemption.Preempted as preempted:
        preemption.ignore_from_now_on()
        logging.info("%s", preempted)
        sys.exit(preemption.EXIT_CODE)
    except UserError as error:
        sys.stderr.write(f"error: {_one_line(error)}\n")
        _leave(2)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if "Gloo" in str(error):  # which carries what CPUs send each other
            sys.stderr.write(
                f"error: lost another process of this run ({_one_line(error)}); see what it said, and"
                " run all of them again to go on from the last checkpoint.\n"
            )
        else:
            sys.excepthook(*sys.exc_info())
        _leave(1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _leave(code: int) -> NoReturn:
    """Exits; from among several processes without waiting for those that did not fail.

    They would never come to the meeting at which jax.distributed ends, as they wait for this
    process elsewhere. When it has gone, they end too.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    # The first goes last: with it goes the service by which the others know of each other.
    time.sleep(_FAREWELL_SECONDS * (1 if jax.process_index() else 2))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _quiet_libraries() -> None:
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_is_shown)
    # When one array of a checkpoint fails, orbax drops the others, whose complaints from other
    # threads say nothing that its error does not.
    show = sys.unraisablehook
    dropped = ("Event loop is closed", "Encountered error while reading array")
    sys.unraisablehook = lambda it: str(it.exc_value).startswith(dropped) or show(it)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _is_shown(record: python_logging.LogRecord) -> bool:
    if record.pathname.startswith(_PACKAGE):
        return True
    if record.name == "asyncio" or f"{os.sep}orbax{os.sep}" in record.pathname:
        return False  # their errors reach us as exceptions
    return record.levelno >= python_logging.WARNING


def check_workdir_writable(workdir: str | PathLike) -> None:
    """Makes the workdir if it is missing; to be called when all other input is checked.

    Cloud storage (`gs://...`) is left to the first write.

    Raises:
      UserError: it is read-only, or not a folder, or in cloud storage that is not known.
    """
    if is_cloud(workdir):
        absolute(workdir)
        return
    path = Path(workdir).absolute()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(
            f"the workdir {workdir} cannot be made, as {nearest} is a file; pass another."
        )
    # The write bits bind everybody but root, of whom we expect the same.
    if not nearest.stat().st_mode & 0o222 or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"the folder {nearest} is read-only; allow writing or pass another workdir."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the workdir {workdir}: {error.strerror}.") from error


def keep_compiled(workdir: str | PathLike) -> None:
    """On TPUs, keeps compiled programs in the workdir, so that a restart need not compile them again.

    Not elsewhere: what is compiled for one CPU may not run on another. `JAX_COMPILATION_CACHE_DIR`
    names another place. To be called before anything is compiled.
    """
    if jax.default_backend() == "tpu" and jax.config.jax_compilation_cache_dir is None:
        folder = absolute(workdir) / "compilation_cache"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def define_distributed_flags() -> None:
    """Defines the flags that `initialize_distributed` reads."""
    flags.DEFINE_bool(
        "distributed", False, "Several hosts that find each other: TPU pods, Slurm, MPI."
    )
    flags.DEFINE_string(
        "coordinator_address", None, "Several processes by hand: HOST:PORT of the first."
    )
    flags.DEFINE_integer("num_processes", None, "Several processes by hand: how many.")
    flags.DEFINE_integer("process_id", None, "Several processes by hand: which, from 0.")


def initialize_distributed() -> None:
    """Joins the processes of a run; before anything touches a device.

    Raises:
      UserError: the flags contradict each other or are incomplete.
    """
    by_hand = {
        name: flags.FLAGS[name].value
        for name in ("coordinator_address", "num_processes", "process_id")
    }
    missing = [f"--{name}" for name, value in by_hand.items() if value is None]
    if not missing:
        if flags.FLAGS.distributed:
            raise UserError("--distributed finds the coordinator itself; drop one of the two.")
        if not 0 <= by_hand["process_id"] < by_hand["num_processes"]:
            raise UserError(
                f"--process_id={by_hand['process_id']} must be at least 0 and less than"
                f" --num_processes={by_hand['num_processes']}."
            )
        _join(**by_hand)
    elif len(missing) < len(by_hand):
        raise UserError(f"several processes by hand need {' and '.join(missing)} too.")
    elif flags.FLAGS.distributed:
        _join()


def _join(**by_hand: Any) -> None:
    jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS, **by_hand)
    # When a process dies, jax.distributed says so and aborts the others: the stacks of all their
    # threads would bury what it said.
    faulthandler.enable(all_threads=False)
    if jax.process_index() != 0:
        logging.set_verbosity(logging.WARNING)
