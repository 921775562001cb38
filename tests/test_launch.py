"""The scripts of launch/, with a Python that only records what it is asked: nothing is installed."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [*REPOSITORY.glob("launch/*.sh"), REPOSITORY / ".ci/run"]
)

# Acts as Python VERSION (empty: a pyenv shim without its Python), and as the one in .venv.
FAKE_PYTHON = """#!/bin/bash
version=${VERSION-3.12}
[ -n "$version" ] || exit 127
case "$1 $2" in
  "--version "*) echo "Python $version" ;;
  "-c "*) [ "$version" = 3.11 ] || [ "$version" = 3.12 ] ;;
  "-m venv")
    [ -z "${NO_VENV:-}" ] || { mkdir -p "${@: -1}/bin"; exit 1; }
    mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"
    echo "$0 $*" >>"$LOG" ;;
  "-m pip") [ "$3" = --version ] || echo "$*" >>"$LOG"; [ "$3" != "${FAIL_PIP:-}" ] ;;
  *)
    printf '%s|' "$PWD" "${CFJAX_REQUIRE_ORACLES:-}" "$@" >>"$LOG"
    echo >>"$LOG"
    [ "$2" != "${FAIL_MODULE:-none}" ] ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """What the scripts read, in a path with a space."""
    clone = tmp_path / "a clone"
    for name in ("launch", ".ci"):
        shutil.copytree(REPOSITORY / name, clone / name)
    for path in [*REPOSITORY.glob("requirements*.txt"), REPOSITORY / "setup.py"]:
        shutil.copy(path, clone)
    shutil.copy(REPOSITORY / "pyproject.toml", clone)
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python3.11", "python3.12"):
        (tmp_path / "bin" / name).write_text(FAKE_PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)
    return clone


def run(clone, script, *arguments, **environment):
    """Runs a script from another folder; returns its exit code, its output and new log lines."""
    log = clone.parent / "log"
    log.write_text("")
    variables = {"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "LOG": str(log)} | environment
    finished = subprocess.run(
        ["bash", str(clone / script), *arguments],
        cwd=clone.parent,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return finished.returncode, finished.stdout, log.read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)


def test_tests_install_once(clone):
    code, output, log = run(clone, "launch/test.sh", "-k", "two words")
    assert code == 0, output
    assert log[0] == f"{clone.parent}/bin/python3.12 -m venv --clear .venv"
    assert log[1].endswith("-r requirements-test.txt") and log[2].endswith("--no-deps -e .")
    pytest_call = f"{clone}||-m|pytest|-m|not slow and not oracle|-k|two words|"
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
    assert log[-1] == f"{clone}|1|-m|pytest|tests/test_a.py|"


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


def test_ci_checks_style_then_runs_all_tests(clone):
    code, output, log = run(clone, ".ci/run")
    assert code == 0, output
    calls = [line.split("|", 2)[2] for line in log if "|" in line]
    assert calls == ["-m|ruff|check|.|", "-m|ruff|format|--check|.|", "-m|pytest|"]
    assert run(clone, ".ci/run", FAIL_MODULE="ruff")[0] == 1
    assert run(clone, ".ci/run", FAIL_MODULE="pytest")[0] == 1


def run_processes(tmp_path, number, program):
    (tmp_path / "program.sh").write_text(program)
    command = ["bash", REPOSITORY / "launch/local_processes.sh", number, "bash", "program.sh", "x"]
    environment = os.environ | {"DEVICES": "2", "XLA_FLAGS": ""}
    return subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_local_processes_get_their_flags(tmp_path):
    finished = run_processes(tmp_path, "3", 'echo "$JAX_PLATFORMS $XLA_FLAGS $*"')
    assert finished.returncode == 0, finished.stderr
    lines = sorted(finished.stdout.splitlines())
    address = lines[0].split("--coordinator_address=")[1].split()[0]
    assert address.startswith("localhost:")
    assert lines == [
        f"[{i}] cpu  --xla_force_host_platform_device_count=2 x --coordinator_address={address}"
        f" --num_processes=3 --process_id={i}"
        for i in range(3)
    ]


def test_local_processes_stop_together(tmp_path):
    program = """
    if [ "${*: -1}" = --process_id=1 ]; then
      until [ -s pid ]; do sleep 0.1; done
      exit 7
    fi
    trap "" TERM
    echo $$ >pid
    sleep 60
    echo woke
    """
    began = time.monotonic()
    finished = run_processes(tmp_path, "2", program)
    assert finished.returncode == 7 and "woke" not in finished.stdout
    assert time.monotonic() - began < 20
    pid = (tmp_path / "pid").read_text().strip()
    while subprocess.run(["kill", "-0", pid], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() - began < 20, "the other process goes on"
        time.sleep(0.1)


@pytest.mark.parametrize("number", ["0", "two"])
def test_local_processes_refuse_a_bad_number(tmp_path, number):
    finished = run_processes(tmp_path, number, "true")
    assert finished.returncode == 2 and "usage:" in finished.stderr


FAKE_GCLOUD = '#!/bin/bash\nprintf "%s|" "$@" >>"$LOG"; echo >>"$LOG"\n'


def test_tpu_vm_trains_on_all_workers(clone):
    (clone.parent / "bin/gcloud").write_text(FAKE_GCLOUD)
    (clone.parent / "bin/gcloud").chmod(0o755)
    place = {"TPU_NAME": "pod", "ZONE": "z", "PROJECT": "p"}
    arguments = ("train", "--config", "configs/a.py:xl", "--config.x=(1, 2)")
    code, output, log = run(clone, "launch/tpu_vm.sh", *arguments, **place)
    assert code == 0, output
    call = "\n".join(log)
    assert call.startswith("compute|tpus|tpu-vm|ssh|pod|--zone=z|--project=p|--worker=all|")
    assert r"--distributed --config configs/a.py:xl --config.x=\(1\,\ 2\) " in call

    assert run(clone, "launch/tpu_vm.sh", "dance", **place)[0] == 2
    code, output, log = run(clone, "launch/tpu_vm.sh", "train", TPU_NAME="pod", ZONE="z")
    assert code != 0 and "PROJECT: set it" in output and log == []
