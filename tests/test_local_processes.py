"""launch/local_processes.sh: flags, failures, the notice of a preemption, starting again."""

import contextlib
import os
import shlex
import signal
import subprocess
import time

import pytest
from fake_clone import REPOSITORY

# Says that it runs, and on SIGTERM "saves" and asks to be started again.
SAVES = """
trap 'echo saving; sleep 0.3; echo saved; exit 75' TERM
echo started
for i in $(seq 200); do sleep 0.05; done
"""


@contextlib.contextmanager
def start_processes(tmp_path, number, program, *arguments, dry_run=False, **variables):
    (tmp_path / "program.sh").write_text(program)
    command = ["bash", str(REPOSITORY / "launch/local_processes.sh")]
    command += ["--dry-run"] * dry_run + [number, "bash", "program.sh", *(arguments or "x")]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"DEVICES": "2", "XLA_FLAGS": ""} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run_processes(*arguments, **options):
    """Returns the exit code, stdout and stderr."""
    with start_processes(*arguments, **options) as process:
        output, errors = process.communicate(timeout=30)
        return process.returncode, output, errors


def test_processes_get_their_flags(tmp_path):
    code, output, errors = run_processes(tmp_path, "3", 'echo "$JAX_PLATFORMS $XLA_FLAGS $*"')
    assert code == 0, errors
    lines = sorted(output.splitlines())
    address = lines[0].split("--coordinator_address=")[1].split()[0]
    assert address.startswith("localhost:")
    assert lines == [
        f"[{i}] cpu --xla_force_host_platform_device_count=2 x --coordinator_address={address}"
        f" --num_processes=3 --process_id={i}"
        for i in range(3)
    ]


def test_processes_stop_together(tmp_path):
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
    code, output, _ = run_processes(tmp_path, "2", program)
    assert code == 7 and "woke" not in output
    assert time.monotonic() - began < 20
    pid = (tmp_path / "pid").read_text().strip()
    while subprocess.run(["kill", "-0", pid], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() - began < 20, "the other process goes on"
        time.sleep(0.1)


@pytest.mark.parametrize("number", ["0", "two"])
def test_bad_number_is_refused(tmp_path, number):
    code, _, errors = run_processes(tmp_path, number, "true")
    assert code == 2 and "usage:" in errors


@pytest.mark.parametrize("name", ["DEVICES", "RESTARTS", "GRACE_SECONDS"])
def test_bad_variable_is_refused_by_name(tmp_path, name):
    code, output, errors = run_processes(tmp_path, "2", "echo ran", **{name: "two"})
    assert code == 2 and f"{name}=two must be a whole number" in errors and output == ""


def test_dry_run_shows_commands_that_say_what_runs(tmp_path):
    """Each line, typed into a shell, is what the launcher would have run."""
    arguments = ("--a=two words", "--b=it's", "--c=$HOME")
    program = 'printf "%s|" "$JAX_PLATFORMS" "$XLA_FLAGS" "$@" >>ran; echo >>ran'
    code, output, errors = run_processes(tmp_path, "2", program, *arguments, dry_run=True)
    assert code == 0, errors
    assert not (tmp_path / "ran").exists()
    lines = output.splitlines()
    assert [line.split()[-1] for line in lines] == ["--process_id=0", "--process_id=1"]
    subprocess.run(["bash", "-c", output], cwd=tmp_path, check=True)
    device_flag = "--xla_force_host_platform_device_count=2"
    for line, ran in zip(lines, (tmp_path / "ran").read_text().splitlines(), strict=True):
        shown = shlex.split(line)
        assert shown[:3] == ["env", "JAX_PLATFORMS=cpu", f"XLA_FLAGS={device_flag}"]
        assert ran.split("|")[:-1] == ["cpu", device_flag, *shown[5:]]
        assert shown[5:8] == list(arguments)


def terminate_when(process, num_started):
    """Sends SIGTERM once so many processes have said that they started; what they said."""
    seen = []
    while sum("started" in line for line in seen) < num_started:
        line = process.stdout.readline()
        assert line, "all ended before they were told to"
        seen.append(line)
    process.send_signal(signal.SIGTERM)
    return seen


def test_sigterm_is_passed_on_and_the_last_words_are_shown(tmp_path):
    with start_processes(tmp_path, "2", SAVES) as process:
        terminate_when(process, 2)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert sorted(line for line in output.splitlines() if "saved" in line) == [
        "[0] saved",
        "[1] saved",
    ]


def test_processes_that_ask_for_it_are_started_again(tmp_path):
    with start_processes(tmp_path, "2", SAVES, RESTARTS="1") as process:
        terminate_when(process, 2)
        terminate_when(process, 2)  # both started again; this time it is the exit code
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert "starting again (1 of 1)" in errors


def test_started_again_to_a_good_end(tmp_path):
    program = 'saved="saved${*: -1}"; [ ! -e "$saved" ] || exit 0; touch "$saved"; exit 75'
    code, _, errors = run_processes(tmp_path, "2", program, RESTARTS="3")
    assert code == 0 and errors.count("starting again") == 1


@pytest.mark.parametrize("is_told", [False, True])
def test_who_does_not_end_is_killed(tmp_path, is_told):
    """After the grace, when another process has saved, or when all were told to end."""
    program = f"""
    if [ "${{*: -1}}" = --process_id=1 ] && [ {int(is_told)} = 0 ]; then exit 75; fi
    trap '' TERM
    echo started
    sleep 20
    """
    with start_processes(tmp_path, "2", program, GRACE_SECONDS="1") as process:
        if is_told:
            terminate_when(process, 2)
        process.communicate(timeout=30)
    assert process.returncode == (137 if is_told else 75)


def test_another_failure_is_not_started_again(tmp_path):
    program = 'echo ran; [ "${*: -1}" = --process_id=0 ] && exit 3; sleep 60'
    code, output, _ = run_processes(tmp_path, "2", program, RESTARTS="5")
    assert code == 3 and output.count("ran") <= 2


def test_processes_killed_at_the_same_time(tmp_path):
    """The launcher is held until all are dead, so that it learns of them in one moment."""
    program = 'echo $$ >"leader${*: -1}"; touch "started${*: -1}"; sleep 60'
    with start_processes(tmp_path, "3", program) as process:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("started*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        leaders = [int(path.read_text()) for path in tmp_path.glob("leader*")]
        assert len(leaders) == 3
        for leader in leaders:
            os.killpg(leader, signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=30)
    assert process.returncode == 137
