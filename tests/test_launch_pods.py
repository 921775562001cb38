"""launch/tpu_vm.sh and worker.sh: every command, with a gcloud that records it and answers."""

import subprocess
import time

import pytest
from fake_clone import FLAGS, RECORDER, add_program, make_clone, run

POD = {"TPU_NAME": "pod", "ZONE": "z", "PROJECT": "p", "POLL_SECONDS": "0"}
NEW_POD = POD | {"ACCELERATOR_TYPE": "v5litepod-256", "RUNTIME_VERSION": "v2-alpha-tpuv5-lite"}
# Records its arguments, a line a call. What it says of the queued resource and of the training are
# the lines of two files, the last of them for ever.
FAKE_GCLOUD = """#!/bin/bash
printf '%s|' "$@" >>"$LOG"; echo >>"$LOG"
next() { head -n 1 "$1"; [ "$(wc -l <"$1")" -eq 1 ] || sed -i 1d "$1"; }
case "$*" in
  *" list "*)
    state=$(next "$(dirname "$LOG")/resource")
    [ "$state" != fails ] || exit 1
    printf 'other\\tACTIVE\\n'
    [ "$state" = none ] || printf 'pod\\t%s\\n' "$state" ;;
  *"worker.sh state"*)
    said=$(next "$(dirname "$LOG")/training")
    [ "$said" != unreachable ] || exit 255
    tr ',' '\\n' <<<"$said" ;;
  *" create "*) [ -z "${FAIL_CREATE:-}" ] ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    clone = make_clone(tmp_path)
    add_program(clone, "gcloud", FAKE_GCLOUD)
    add_program(clone, "git", '#!/bin/bash\necho "git $*" >>"$LOG"\n')
    add_program(clone, "sudo", RECORDER)
    say(clone, resource=["ACTIVE"], training=["state: running"])
    return clone


def say(clone, **answers):
    for name, lines in answers.items():
        (clone.parent / name).write_text("".join(f"{line}\n" for line in lines))


def short(calls):
    """The names of what gcloud was asked: `create`, `list`, or the command of an ssh."""
    names = []
    for call in calls:
        if call.startswith("compute|tpus|queued-resources|"):
            name, *arguments = call.split("|")[3:]
            command = [a.removeprefix("--command=") for a in arguments if "--command=" in a]
            names.append(command[0].split("worker.sh ")[-1].split()[0] if command else name)
    return names


STARTED = ["true", "scp", "setup", "stop", "start"]


def test_each_action_shows_its_commands(clone):
    """Not one of them is run, and typed into a shell they say what they showed."""
    environment = NEW_POD | {
        "CREATE_FLAGS": "--spot --description='two words'",
        "SSH_FLAGS": "--tunnel-through-iap",
        "TMPDIR": "/a tmp",
    }
    gcloud = "gcloud compute tpus queued-resources"
    place, iap = "--zone=z --project=p", "--tunnel-through-iap --node=all --worker=all"
    listed = f"{gcloud} list {place} '--format=value(name.basename(),state.state)'"
    ssh = f"{gcloud} ssh pod {place} {iap}"
    expected = {
        "create": [
            f"{gcloud} create pod {place} --accelerator-type=v5litepod-256"
            " --runtime-version=v2-alpha-tpuv5-lite --node-id=pod --spot '--description=two words'"
        ],
        "wait": [listed],
        "setup": [
            "git archive --format=tar.gz '--output=/a tmp/cfjax-pod.tar.gz' HEAD",
            f"{ssh} --command=true",
            f"{gcloud} scp '/a tmp/cfjax-pod.tar.gz' pod:cfjax.tar.gz {place} {iap}",
            f"{ssh} '--command=mkdir -p cfjax && tar -xzf cfjax.tar.gz -C cfjax &&"
            " bash cfjax/launch/worker.sh setup'",
        ],
        "train --workdir gs://b/w": [
            f"{ssh} '--command=bash cfjax/launch/worker.sh start --workdir gs://b/w'"
        ],
        "status": [listed, f"{ssh} '--command=bash cfjax/launch/worker.sh state'"],
        "log": [
            f"{gcloud} ssh pod {place} --tunnel-through-iap --node=0 --worker=0"
            " '--command=bash cfjax/launch/worker.sh log'"
        ],
        "stop": [f"{ssh} '--command=bash cfjax/launch/worker.sh stop'"],
        "delete": [f"{gcloud} delete pod {place} --force --quiet"],
    }
    for action, commands in expected.items():
        arguments = ["--dry-run", *action.split()]
        code, output, log = run(clone, "launch/tpu_vm.sh", *arguments, **environment)
        shown = [line for line in output.splitlines() if line.startswith(("gcloud", "git"))]
        assert (code, shown) == (0, commands), output
        assert not [line for line in log if not line.startswith("git status")]

    arguments = ["--dry-run", "watch", "--workdir", "gs://b/w"]
    code, output, log = run(clone, "launch/tpu_vm.sh", *arguments, **environment)
    shown = [line for line in output.splitlines() if line.startswith(("gcloud", "git"))]
    state = f"{ssh} '--command=bash cfjax/launch/worker.sh state || echo state: new'"
    started = [*expected["setup"], *expected["stop"], *expected["train --workdir gs://b/w"]]
    assert shown == [
        *(listed, *expected["create"], listed, *started, listed, state, *expected["delete"])
    ]
    assert code == 0 and not short(log)


def test_several_slices_are_asked_for_together(clone):
    code, output, log = run(clone, "launch/tpu_vm.sh", "create", NUM_SLICES="2", **NEW_POD)
    assert code == 0, output
    assert log[0].endswith("|--node-count=2|--node-prefix=pod|")


def test_flags_reach_cfjax_as_they_were_given(clone):
    """Through this shell, ssh's and the worker's."""
    code, output, log = run(clone, "launch/tpu_vm.sh", "train", *FLAGS, **POD)
    assert code == 0, output
    command = log[0].split("|--command=")[1].removesuffix("|")
    (clone.parent / "cfjax/launch").mkdir(parents=True)
    (clone.parent / "cfjax/launch/worker.sh").write_text("printf '%s\\n' \"$@\"")
    ran = subprocess.run(
        ["bash", "-c", command], cwd=clone.parent, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["start", *FLAGS]


@pytest.mark.parametrize(
    "name", ["TPU_NAME", "ZONE", "PROJECT", "ACCELERATOR_TYPE", "RUNTIME_VERSION"]
)
def test_missing_variables_of_the_pod_are_named(clone, name):
    environment = {key: value for key, value in NEW_POD.items() if key != name}
    code, output, log = run(clone, "launch/tpu_vm.sh", "create", **environment)
    assert code != 0 and f"{name}: set it to" in output and log == []


def test_bad_actions_and_numbers_are_refused(clone):
    assert run(clone, "launch/tpu_vm.sh", "dance", **POD)[0] == 2
    for arguments, environment, words in [
        (["train"], {}, "train needs the flags"),
        (["watch"], {}, "watch needs the flags"),
        (["create"], {"NUM_SLICES": "two"}, "NUM_SLICES=two must be a whole number"),
    ]:
        code, output, log = run(clone, "launch/tpu_vm.sh", *arguments, **(NEW_POD | environment))
        assert code == 2 and words in output and log == []


def watch(clone, resource, training, **environment):
    say(clone, resource=resource, training=training)
    code, output, log = run(clone, "launch/tpu_vm.sh", "watch", *FLAGS, **(NEW_POD | environment))
    return code, output, short(log)


def test_watch_does_it_all(clone):
    resource = ["none", "WAITING_FOR_RESOURCES", "fails", "PROVISIONING", "ACTIVE"]
    training = ["unreachable", "state: running,state: running", "state: ended 0,state: ended 0"]
    code, output, calls = watch(clone, resource, training)
    assert code == 0, output
    assert calls == [
        *("list", "create", "list", "list", "list", "list", *STARTED),
        *("list", "state", "list", "state", "list", "state"),
    ]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_watch_makes_a_preempted_tpu_anew(clone, state):
    """Training ended with 75, and then the resource is gone."""
    resource = ["none", "ACTIVE", "ACTIVE", state, "none", "none", "ACTIVE"]
    training = ["state: running,state: ended 75", "state: ended 0"]
    code, output, calls = watch(clone, resource, training)
    assert code == 0, output
    assert calls == [
        *("list", "create", "list", *STARTED, "list", "state"),
        *("list", "delete", "list", "list", "create", "list", *STARTED, "list", "state"),
    ]


def test_watch_notices_a_tpu_that_vanishes(clone):
    """No exit code is seen: it is the resource that is no longer there."""
    resource = ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "none", "none", "ACTIVE"]
    training = ["state: none", "state: running", "state: ended 0"]
    code, output, calls = watch(clone, resource, training)
    assert code == 0, output
    assert calls.count("create") == calls.count("delete") == 1
    assert calls.count("start") == 2


@pytest.mark.parametrize("said", ["state: ended 75", "state: lost", "state: running,state: new"])
def test_watch_starts_again_where_the_tpu_is_still_there(clone, said):
    code, output, calls = watch(clone, ["none", "ACTIVE"], [said, "state: ended 0"])
    assert code == 0, output
    assert calls.count("start") == 2 and "delete" not in calls


def test_watch_ends_with_a_failure(clone):
    """And leaves the TPU for a look; unless it was the TPU that failed."""
    code, output, calls = watch(clone, ["none", "ACTIVE"], ["state: ended 2,state: running"])
    assert code == 2 and "exit code 2" in output
    assert calls.count("start") == 1 and "delete" not in calls

    resource = ["none", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "none", "none", "ACTIVE"]
    code, output, calls = watch(clone, resource, ["state: ended 134", "state: ended 0"])
    assert code == 0, output
    assert calls.count("start") == 2 and "delete" in calls


def test_watch_goes_on_where_it_was_interrupted(clone):
    code, _, calls = watch(
        clone, ["ACTIVE"], ["state: running", "state: running", "state: ended 0"]
    )
    assert code == 0 and "start" not in calls


def test_watch_gives_up_in_the_end(clone):
    code, output, calls = watch(clone, ["none", "ACTIVE"], ["state: ended 75"], RESTARTS="2")
    assert code == 75 and "Started over 2 times" in output
    assert calls.count("start") == 3
    code, output, calls = watch(clone, ["none"], [""], FAIL_CREATE="1")
    assert code == 2 and "could not be created 5 times" in output


# As `python -m cfjax.train`: records its arguments, and saves when it is told to end.
FAKE_TRAINING = """#!/bin/bash
printf '%s|' "$@" >>"$LOG"; echo >>"$LOG"
[ "${*: -1}" != --fail ] || exit 3
trap 'echo saved; exit 75' TERM
echo training
for i in $(seq 200); do sleep 0.05; done
"""


def worker(clone, *arguments, **environment):
    variables = {"TPU_LOCKFILE": str(clone.parent / "lock"), "GRACE_SECONDS": "10"}
    return run(clone, "launch/worker.sh", *arguments, **(variables | environment))


def wait_for(clone, state):
    deadline = time.monotonic() + 20
    while worker(clone, "state")[1] != f"state: {state}\n":
        assert time.monotonic() < deadline, worker(clone, "state")[1]
        time.sleep(0.05)


def test_worker_trains_saves_and_says_what_became_of_it(clone):
    python = clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_TRAINING)
    python.chmod(0o755)
    (clone.parent / "lock").touch()
    assert worker(clone, "state")[1] == "state: none\n"
    code, output, _ = worker(clone, "start", *FLAGS)
    assert code == 0, output
    wait_for(clone, "running")
    code, output, _ = worker(clone, "start", *FLAGS)
    assert code == 2 and "runs on" in output and "stop it first" in output
    while "training" not in (clone / "train.log").read_text():
        time.sleep(0.05)
    assert worker(clone, "stop")[0] == 0
    wait_for(clone, "ended 75")
    assert (clone / "train.log").read_text().splitlines()[-1] == "saved"
    assert not (clone.parent / "lock").exists()

    worker(clone, "start", "--fail")
    wait_for(clone, "ended 3")
    _, _, log = worker(clone, "train", *FLAGS[:2], "--fail")
    assert log == ["|".join(["-m", "cfjax.train", "--distributed", *FLAGS[:2], "--fail", ""])]
    (clone / "train.exit").unlink()
    (clone / "train.pid").write_text("999999999")
    assert worker(clone, "state")[1] == "state: lost\n"


def test_worker_kills_what_does_not_end(clone):
    python = clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_TRAINING.replace("trap 'echo saved; exit 75'", "trap ''"))
    python.chmod(0o755)
    worker(clone, "start", *FLAGS)
    wait_for(clone, "running")
    assert worker(clone, "stop", GRACE_SECONDS="1")[0] == 0
    assert worker(clone, "state")[1] == "state: ended 137\n"


def test_worker_sets_up(clone):
    code, output, log = worker(clone, "setup")
    assert code == 0 and "Set up on" in output
    assert log[1].endswith("-r requirements.txt") and log[-1].endswith("requirements.txt jax[tpu]")
    _, _, log = worker(clone, "setup")
    assert len(log) == 1  # jax[tpu] alone, which pip finds there

    subprocess.run(["rm", "-r", str(clone / ".venv")], check=True)
    code, output, log = worker(clone, "setup", VERSION="3.10")
    assert "python3.11-venv" in log[1] and log[1].startswith("sudo|apt-get|")
    assert code == 2 and "no Python 3.11 or 3.12" in output  # the recorder installs none
