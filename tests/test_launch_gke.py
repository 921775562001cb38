"""launch/gke/: the manifest and every command, with a kubectl and a docker that record them."""

import shlex

import pytest
import yaml
from fake_clone import FLAGS, RECORDER, add_program, make_clone, run

JOB = {"JOB_NAME": "xl", "IMAGE": "host/i:1", "ACCELERATOR": "tpu-v5-lite-podslice"}
JOB |= {"TOPOLOGY": "16x16"}


@pytest.fixture
def clone(tmp_path):
    clone = make_clone(tmp_path)
    for name in ("kubectl", "docker"):
        add_program(clone, name, RECORDER)
    add_program(clone, "git", "#!/bin/bash\n")
    return clone


def manifest(output):
    lines = output.splitlines()
    assert lines[0] == "kubectl --namespace=default apply --filename=- <<'END'"
    assert lines[-1] == "END"
    return yaml.safe_load("\n".join(lines[1:-1]))


def test_gke_shows_the_filled_manifest(clone):
    environment = JOB | {"NUM_SLICES": "2", "SERVICE_ACCOUNT": "writer", "SPOT": "true"}
    arguments = ("--dry-run", "apply", *FLAGS, '--a="\\')
    code, output, log = run(clone, "launch/gke/jobset.sh", *arguments, **environment)
    assert code == 0 and log == [], output
    jobset = manifest(output)
    assert jobset["metadata"]["name"] == "xl"
    assert "@" not in str(jobset).replace("://", "")
    replicated = jobset["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 64, 64)
    pod = job["template"]["spec"]
    assert pod["serviceAccountName"] == "writer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    command = ["python", "-m", "cfjax.train", "--distributed", *FLAGS, '--a="\\']
    assert pod["containers"][0]["command"] == command
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}

    _, output, _ = run(clone, "launch/gke/jobset.sh", "--dry-run", "apply", "--a", **JOB)
    pod = manifest(output)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "serviceAccountName" not in pod
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]


def test_gke_starts_again_what_was_preempted(clone):
    """A pod that ends with 75, or is evicted, fails its Job for the reason that the JobSet knows."""
    _, output, _ = run(clone, "launch/gke/jobset.sh", "--dry-run", "apply", "--a", **JOB)
    spec = manifest(output)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 10
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    evicted, saved = job["podFailurePolicy"]["rules"]
    assert evicted["action"] == saved["action"] == "FailJob"
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    container = job["template"]["spec"]["containers"][0]["name"]
    assert saved["onExitCodes"] == {"containerName": container, "operator": "In", "values": [75]}
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"


def test_gke_runs_what_it_shows(clone):
    selector = "--selector=jobset.sigs.k8s.io/jobset-name=xl"
    first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    expected = {
        "log": [f"kubectl --namespace=n logs --follow --tail=50 {selector},{first}"],
        "status": [f"kubectl --namespace=n get jobsets,jobs,pods {selector} --output=wide"],
        "delete": ["kubectl --namespace=n delete jobset xl"],
        "build": [
            "git archive HEAD | docker build --tag=host/i:1 --file=launch/gke/Dockerfile -",
            "docker push host/i:1",
        ],
    }
    for action, commands in expected.items():
        arguments = ("--dry-run", action)
        code, output, log = run(clone, "launch/gke/jobset.sh", *arguments, NAMESPACE="n", **JOB)
        assert (code, output.splitlines(), log) == (0, commands, [])
        code, _, log = run(clone, "launch/gke/jobset.sh", action, NAMESPACE="n", **JOB)
        ran = [line for line in log if line.startswith(("kubectl", "docker"))]
        shown = [command.split(" | ")[-1] for command in commands]
        assert (code, [line.split("|")[:-1] for line in ran]) == (
            0,
            [shlex.split(c) for c in shown],
        )

    code, _, log = run(clone, "launch/gke/jobset.sh", "apply", "--a", **JOB)
    assert code == 0 and log[0] == "kubectl|--namespace=default|apply|--filename=-|"
    assert yaml.safe_load("\n".join(log[1:]))["kind"] == "JobSet"


@pytest.mark.parametrize("name", JOB)
def test_missing_variables_of_the_job_are_named(clone, name):
    environment = {key: value for key, value in JOB.items() if key != name}
    code, output, log = run(clone, "launch/gke/jobset.sh", "apply", "--a", **environment)
    assert code != 0 and f"{name}: set it to" in output and log == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JOB_NAME": "X L"}, "JOB_NAME=X L must be"),
        ({"TOPOLOGY": "16"}, "TOPOLOGY=16 must be"),
        ({"CHIPS_PER_HOST": "7"}, "CHIPS_PER_HOST=7 does not divide the 256 chips"),
        ({"NUM_SLICES": "two"}, "NUM_SLICES=two must be"),
        ({"SPOT": "1"}, "SPOT=1 must be"),
    ],
)
def test_bad_variables_of_the_job_are_refused(clone, variables, words):
    code, output, log = run(clone, "launch/gke/jobset.sh", "apply", "--a", **(JOB | variables))
    assert code == 2 and words in output and log == []
