"""SIGTERM as a notice, in one process; `test_faults.py` has real runs and several processes."""

import os
import subprocess
import sys

from cfjax import preemption

PROGRAM = """
import atexit, os, signal, sys
from cfjax import preemption, program

def notice():
    os.kill(os.getpid(), signal.SIGTERM)

def main(argv):
    preemption.listen()
    assert not preemption.is_due(1)
    notice()
    assert preemption.is_due(2) and preemption.is_due(3)
    atexit.register(notice)  # while the program ends
    raise preemption.Preempted("Train step 2 is saved.")

program.run(main)
"""


def test_a_noticed_program_asks_to_be_started_again():
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == preemption.EXIT_CODE == 75, ended.stderr
    assert ended.stderr.endswith("Train step 2 is saved.\n")
