"""The launchers of clusters, SLURM and GKE, without a cluster."""

import copy
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.launching import CONFIG, LAUNCH, ROOT, Cloud


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


# slurm.sbatch

# Runs its tasks, one after the other, and tells the highest of their statuses, as srun does.
SRUN = """#!{python} -S
import json, os, subprocess, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps({{"call": ["srun", *sys.argv[1:]], "env": dict(os.environ)}}) + "\\n")
task = sys.argv[sys.argv.index("bash"):]
codes = [
    subprocess.run(task, env={{**os.environ, "SLURM_PROCID": str(i)}}).returncode
    for i in range(len(os.environ["STATUSES"].split()))
]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
# Starts one task, signals all of its processes once jaxalign runs, and finds out whether it had saved when it ended.
SIGNALS = """#!{python} -S
import os, signal, subprocess, sys, time
child = subprocess.Popen(sys.argv[sys.argv.index("bash"):], start_new_session=True)
while not os.path.exists("{folder}/begun"):
    time.sleep(0.02)
os.killpg(child.pid, signal.SIGTERM)
code = child.wait()
sys.exit(code if os.path.exists("{folder}/saved") else 1)
"""
ENDS = '#!/bin/bash\nread -ra statuses <<< "$STATUSES"\nexit "${statuses[SLURM_PROCID]}"\n'


def slurm(cloud: Cloud, *statuses: int, **environment: str) -> tuple[int, str]:
    """Runs the batch script where jaxalign ends with these statuses, one per node."""
    cloud.answer(("^scontrol show", 0, "node7\nnode9\n"), ("^curl", 22, ""))
    cloud.write("srun", SRUN.format(python=sys.executable, calls=str(cloud.calls_file)))
    cloud.write("jaxalign", ENDS)
    names = {"SLURM_JOB_ID": "17999", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_SUBMIT_DIR": str(ROOT)}
    given = {**names, "STATUSES": " ".join(map(str, statuses)), **environment}
    return cloud.run("bash", "launch/slurm.sbatch", CONFIG, "train.seed=3", **given)


def test_slurm_starts_a_worker_per_node(cloud):
    code, _ = slurm(cloud, 0, 0)
    (record,) = [each for each in cloud.records() if each["call"][0] == "srun"]
    assert code == 0 and record["call"][-3:] == [str(LAUNCH), CONFIG, "train.seed=3"]
    # A task that ends must not end those that still save.
    assert "--kill-on-bad-exit=0" in record["call"]
    assert not cloud.calls("requeue")
    # The last port of all jobs, and the one after it that a run takes too: Linux gives out 32768 and above.
    assert record["env"]["JAXALIGN_COORDINATOR"] == "node7:31998"


@pytest.mark.parametrize(
    ("statuses", "before", "code", "requeued"),
    [
        ((143, 143), 0, 143, 1),
        ((75, 137), 3, 137, 1),
        ((143, 143), 20, 143, 0),
        ((1, 1), 0, 1, 0),
        ((1, 137), 0, 1, 0),
        ((143, 2), 0, 1, 0),
    ],
)
def test_slurm_puts_the_job_into_the_queue_again(cloud, statuses, before: int, code: int, requeued: int):
    found, _ = slurm(cloud, *statuses, SLURM_RESTART_COUNT=str(before))
    assert found == code and cloud.calls("requeue") == ["scontrol requeue 17999"] * requeued


def test_slurm_waits_for_a_save(cloud, tmp_path):
    """The signal before the time is up goes to every process of a task; the task ends after its worker has saved."""
    cloud.write("srun", SIGNALS.format(python=sys.executable, folder=tmp_path))
    save = f"sleep 0.3; touch {tmp_path}/saved; exit 143"
    cloud.write("jaxalign", f"#!/bin/bash\ntrap '{save}' TERM\ntouch {tmp_path}/begun\nwhile :; do sleep 0.05; done\n")
    cloud.answer(("^scontrol show", 0, "node7\n"), ("^curl", 22, ""))
    names = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node7", "SLURM_SUBMIT_DIR": str(ROOT)}
    code, output = cloud.run("bash", "launch/slurm.sbatch", CONFIG, **names)
    assert code == 143, output
    assert cloud.calls("requeue") == ["scontrol requeue 1"]


# gke.sh


def closed(required: list[str], **properties: dict) -> dict:
    """A JSON schema of an object with these fields and no others."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def listed(items: dict) -> dict:
    return {"type": "array", "items": items}


TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
# What jobset.x-k8s.io/v1alpha2 says of the fields used here and of their neighbours, by kubernetes-sigs/jobset at
# 08dfbdfd (August 2026), config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml. For the Job inside a replicated job
# there is the schema of Kubernetes.
JOB_SET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(["name"], name=TEXT, annotations={"type": "object", "additionalProperties": TEXT}),
    spec=closed(
        ["replicatedJobs"],
        failurePolicy=closed(
            [],
            maxRestarts={"type": "integer"},
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules=listed(
                closed(
                    ["name", "action"],
                    name=TEXT,
                    action={
                        "enum": [
                            *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                            *("RestartJob", "RestartJobAndIgnoreMaxRestarts"),
                        ]
                    },
                    onJobFailureReasons=listed(TEXT),
                    onJobFailureMessagePatterns=listed(TEXT),
                    targetReplicatedJobs=listed(TEXT),
                )
            ),
        ),
        replicatedJobs=listed(closed(["name", "template"], name=TEXT, replicas=COUNT, template={"type": "object"})),
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
    ),
)

STATE, PODS = "get jobset", "get pods"
COMPLETED = (STATE, 0, "StartupPolicyCompleted: all started\nCompleted: jobset completed successfully\n")
NAMES = ("--name", "dpo", "--image", "i:1", "--bucket", "gs://b/runs")


def gke(cloud: Cloud, *more: str) -> tuple[int, str]:
    return cloud.run(
        "launch/gke.sh", *NAMES, *more, CONFIG, "method.beta=0.2", "name=it's", JAXALIGN_POLL="0", JAXALIGN_TRIES="2"
    )


def test_gke_applies_a_valid_job_set(cloud):
    cloud.answer(COMPLETED)
    code, output = gke(cloud, "--topology", "2x4", "--machines", "2", "--slices", "3")
    assert code == 0, output
    make, config, apply, *_ = cloud.records()
    assert make["call"][:4] == ["kubectl", "create", "configmap", "dpo-config"]
    assert f"--from-file=config.yaml={CONFIG}" in make["call"]
    assert config["call"] == apply["call"] == ["kubectl", "apply", "-f", "-"]
    assert "${" not in apply["stdin"]
    found = yaml.safe_load(apply["stdin"])
    jsonschema.validate(found, JOB_SET)
    (slices,) = found["spec"]["replicatedJobs"]
    assert slices["replicas"] == 3
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "dpo"}, **slices["template"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["/etc/jaxalign/config.yaml", "runs_dir=gs://b/runs", "method.beta=0.2", "name=it's"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    # Wrong fields are found: the schemas are not a formality.
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)
    for path, value in [("action", "FailJob"), ("onExitCodes", [1])]:
        wrong = copy.deepcopy(found)
        wrong["spec"]["failurePolicy"]["rules"][0][path] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, JOB_SET)


def test_gke_follows_from_before_the_first_pod_to_the_end(cloud):
    """No pod yet, a connection that breaks, a pod after a restart: what counts is how the JobSet ends."""
    cloud.answer(
        *[(STATE, 1, "Unable to connect\n")] * 2,
        *[(STATE, 0, "StartupPolicyCompleted: all started\n")] * 6,
        COMPLETED,
        *[(PODS, 0, ""), (PODS, 0, "dpo-0-a Pending ImagePullBackOff\n"), (PODS, 1, "Unable to connect\n")],
        *[(PODS, 0, "dpo-0-a Running \n")] * 2,
        (PODS, 0, "dpo-0-a Failed \ndpo-0-b Running \n"),
        ("logs", 1, "step 1\n"),
        ("logs", 0, "step 2\n"),
        ("logs", 0, "step 3\n"),
    )
    code, output = gke(cloud)
    assert code == 0, output
    assert "gke: no pod yet" in output and "dpo-0-a Pending ImagePullBackOff" in output
    assert cloud.calls("logs") == [
        "kubectl logs --follow --tail=-1 dpo-0-a",
        "kubectl logs --follow --tail=10 dpo-0-a",
        "kubectl logs --follow --tail=-1 dpo-0-b",
    ]
    (labels,) = {
        each["call"][each["call"].index("--selector") + 1] for each in cloud.records() if "pods" in each["call"]
    }
    assert labels == (
        "jobset.sigs.k8s.io/jobset-name=dpo,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    )


def test_gke_fails_where_the_job_set_does(cloud):
    """A pod that failed before it was ready: its log is shown, and the status is the JobSet's, not that of the log."""
    failed = (STATE, 0, "Failed: jobset failed due to FailJobSet action\n")
    cloud.answer((STATE, 0, ""), failed, (PODS, 0, "dpo-0-a Failed \n"), ("logs", 0, "train.seed: no number\n"))
    code, output = gke(cloud)
    assert code == 1 and "train.seed: no number" in output and "FailJobSet action" in output


def test_gke_says_when_the_cluster_refuses_or_is_out_of_reach(cloud):
    cloud.answer(("apply", 1, 'error: no matches for kind "JobSet"\n'))
    code, output = gke(cloud)
    assert code == 1 and "no matches for kind" in output and not cloud.calls("get |logs")
    cloud.answer((STATE, 1, "Unable to connect\n"))
    code, output = gke(cloud)
    assert code == 1 and "the cluster does not answer" in output
