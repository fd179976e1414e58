"""The launchers without a cloud: its tools are replaced by stand-ins on PATH that record how they were called."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ["worker.sh", "restarts.sh", "local.sh", "tpu_vm.sh", "gke.sh", "slurm.sbatch"]
CONFIG = "configs/quickstart.yaml"

# Answers of a stand-in come from a file of rules, [pattern of the call, exit status, output]: the first rule whose
# pattern is found counts, and is used up, unless it is the last with this pattern.
STAND_IN = r"""#!{python} -S
import json, os, re, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
names = ("JAXALIGN_", "XLA_", "LIBTPU_", "CUDA_VISIBLE", "JAX_PLATFORMS")
record = {{"call": call, "env": {{k: v for k, v in os.environ.items() if k.startswith(names)}}}}
if call[0] == "kubectl" and call[-1] == "-":
    record["stdin"] = sys.stdin.read()
with open({calls!r}, "a") as file:
    file.write(json.dumps(record) + "\n")
rules = json.load(open({rules!r}))
text = " ".join(call)
for i, (pattern, status, output) in enumerate(rules):
    if re.search(pattern, text):
        if any(other[0] == pattern for other in rules[i + 1:]):
            del rules[i]
            json.dump(rules, open({rules!r}, "w"))
        sys.stdout.write(output)
        sys.exit(status)
"""


class Cloud:
    """Stand-ins, their rules, and what they were called with."""

    def __init__(self, folder: Path):
        self.bin, self.calls_file, self.rules = folder / "bin", folder / "calls.jsonl", folder / "rules.json"
        self.bin.mkdir()
        self.calls_file.touch()
        self.rules.write_text("[]")

    def replace(self, *tools: str) -> None:
        text = STAND_IN.format(python=sys.executable, calls=str(self.calls_file), rules=str(self.rules))
        for tool in tools:
            (self.bin / tool).write_text(text)
            (self.bin / tool).chmod(0o755)

    def write(self, tool: str, text: str) -> None:
        (self.bin / tool).write_text(text)
        (self.bin / tool).chmod(0o755)

    def answer(self, *rules: tuple[str, int, str]) -> None:
        self.rules.write_text(json.dumps(rules))

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAXALIGN", "XLA", "JAX_", "SLURM", "LIBTPU"))}
        return subprocess.Popen(
            [str(word) for word in command],
            # Nothing of the machine's own cloud tools can be reached but through the stand-ins before them.
            env={**kept, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": sys.executable, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    def run(self, *command: str | Path, **environment: str) -> tuple[int, str]:
        process = self.start(*command, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def calls(self, pattern: str = "") -> list[str]:
        texts = [" ".join(record["call"]) for record in self.records()]
        return [text for text in texts if re.search(pattern, text)]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    found = Cloud(tmp_path)
    found.replace("gcloud", "kubectl", "sbatch", "srun", "scontrol", "sky", "curl", "jaxalign", "nvidia-smi")
    found.answer(("^curl", 22, ""))
    return found


def test_shellcheck():
    tool = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run(
        [tool, "-x", *(f"launch/{name}" for name in SCRIPTS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert sorted(SCRIPTS) == sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


# worker.sh


def test_the_worker_gives_only_flags_that_the_library_knows(cloud, tmp_path):
    package = tmp_path / "site" / "libtpu"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "libtpu.so").write_bytes(
        b"\0xla_tpu_overlap_compute_collective_tc\0\xff\0xla_tpu_enable_data_parallel_all_reduce_opt\0"
    )
    users = "--xla_tpu_overlap_compute_collective_tc=false"
    environment = {"PYTHONPATH": str(package.parent), "LIBTPU_INIT_ARGS": users}
    code, output = cloud.run("launch/worker.sh", CONFIG, "a.b=c d", **environment)
    (record,) = [each for each in cloud.records() if each["call"][0] == "jaxalign"]
    assert code == 0 and record["call"][1:] == ["run", CONFIG, "a.b=c d"]
    assert record["env"]["LIBTPU_INIT_ARGS"].split() == ["--xla_tpu_enable_data_parallel_all_reduce_opt=true", users]
    assert "xla_tpu_data_parallel_opt_different_sized_ops is not known" in output


def test_without_an_accelerator_there_are_no_flags(cloud):
    cloud.run("launch/worker.sh", CONFIG)
    (record,) = [each for each in cloud.records() if each["call"][0] == "jaxalign"]
    assert not {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(record["env"])


SAVES = """#!/bin/bash
trap 'echo saved; exit 143' TERM
echo begun
while :; do sleep 0.05; done
"""


def test_sigterm_reaches_jaxalign_and_its_status_comes_back(cloud):
    cloud.write("jaxalign", SAVES)
    process = cloud.start("launch/worker.sh", CONFIG)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "saved" in output


def test_the_clouds_notice_becomes_sigterm(cloud):
    cloud.write("jaxalign", SAVES)
    # Asked twice at the start and once more: then the machine is taken away.
    no = ("preempted", 0, "FALSE")
    cloud.answer(no, no, no, ("preempted", 0, "TRUE"), ("maintenance", 0, "NONE"))
    code, output = cloud.run("launch/worker.sh", CONFIG, JAXALIGN_NOTICE_SECONDS="0.1")
    assert code == 143 and "being taken away" in output and "saved" in output


# local.sh


def test_local_starts_again_after_what_mends_by_itself(cloud):
    cloud.answer(("^jaxalign", 75, ""), ("^jaxalign", 143, ""), ("^jaxalign", 0, ""), ("^curl", 22, ""))
    code, output = cloud.run("launch/local.sh", CONFIG)
    assert code == 0 and len(cloud.calls("^jaxalign run")) == 3 and "starting again (2 of 3)" in output


@pytest.mark.parametrize(("status", "starts"), [(1, 1), (2, 1), (137, 2)])
def test_local_does_not_start_again_for_ever(cloud, status: int, starts: int):
    cloud.answer(("^jaxalign", status, ""), ("^curl", 22, ""))
    code, _ = cloud.run("launch/local.sh", "-r", "1", CONFIG)
    assert code == status and len(cloud.calls("^jaxalign")) == starts


def test_local_tells_processes_of_each_other_and_deals_out_gpus(cloud):
    cloud.answer(("^nvidia-smi", 0, "GPU 0\nGPU 1\nGPU 2\nGPU 3\n"), ("^curl", 22, ""))
    code, _ = cloud.run("launch/local.sh", "-n", "2", CONFIG)
    found = [each["env"] for each in cloud.records() if each["call"][0] == "jaxalign"]
    assert code == 0 and sorted(each["JAXALIGN_PROCESS"] for each in found) == ["0", "1"]
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {"0,1", "2,3"}
    assert len({each["JAXALIGN_COORDINATOR"] for each in found}) == 1
    assert {each["JAXALIGN_PROCESSES"] for each in found} == {"2"}
    code, output = cloud.run("launch/local.sh", "-n", "3", CONFIG)
    assert code == 2 and "4 GPUs cannot be dealt out evenly to 3 processes" in output


# slurm.sbatch


def slurm(cloud, status: int, **environment: str) -> tuple[int, str]:
    cloud.answer(("^scontrol show", 0, "node7\nnode9\n"), ("^srun", status, ""))
    names = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_SUBMIT_DIR": str(ROOT)}
    return cloud.run("bash", "launch/slurm.sbatch", CONFIG, "train.seed=3", **{**names, **environment})


def test_slurm_starts_a_worker_per_node(cloud):
    code, _ = slurm(cloud, 0)
    (record,) = [each for each in cloud.records() if each["call"][0] == "srun"]
    assert code == 0 and record["call"][-3:] == [str(LAUNCH / "worker.sh"), CONFIG, "train.seed=3"]
    assert record["env"]["JAXALIGN_COORDINATOR"] == f"node7:{20000 + 12345 % 10000 * 2}"
    assert not cloud.calls("requeue")


@pytest.mark.parametrize(("status", "before", "requeued"), [(143, 0, 1), (75, 3, 1), (1, 0, 0), (143, 20, 0)])
def test_slurm_puts_the_job_into_the_queue_again(cloud, status: int, before: int, requeued: int):
    code, _ = slurm(cloud, status, SLURM_RESTART_COUNT=str(before))
    assert code == status and cloud.calls("requeue") == ["scontrol requeue 12345"] * requeued


# tpu_vm.sh

READY = [("queued-resources describe", 0, "ACTIVE\n"), ("tpu-vm describe", 0, "READY\n")]
NOT_THERE = ("queued-resources describe", 1, "ERROR: NOT_FOUND: Resource was not found\n")


def tpu(cloud, *more: str) -> tuple[int, str]:
    command = ["launch/tpu_vm.sh", "--name", "n", "--zone", "z", "--type", "v5p-16", "--bucket", "gs://b/runs/", *more]
    return cloud.run(*command, CONFIG, "log.report_to=[wandb]", JAXALIGN_POLL="0")


def test_tpu_gets_a_slice_installs_starts_and_follows(cloud):
    wait = ("queued-resources describe", 0, "PROVISIONING\n")
    cloud.answer(NOT_THERE, wait, *READY, ("ended ", 0, "ended 0\nended 0\n"))
    code, output = tpu(cloud, "--spot", "--project", "p")
    assert code == 0, output
    (created,) = cloud.calls("queued-resources create")
    assert created == (
        "gcloud compute tpus queued-resources create n --zone z --project p --node-id n --accelerator-type v5p-16 "
        "--runtime-version v2-alpha-tpuv5 --spot"
    )
    (copied,) = cloud.calls("tpu-vm scp")
    assert "--worker=all" in copied and "jaxalign.tgz" in copied
    install, start, follow, status = [each["call"] for each in cloud.records() if "ssh" in each["call"]]
    assert [each[-2] for each in (install, start, follow, status)] == [
        *("--worker=all", "--worker=all", "--worker=0", "--worker=all")
    ]
    assert "jaxalign-src[tpu,gcs]" in install[-1] and "tail -n +1 -F run.log" in follow[-1]
    assert "JAXALIGN_PROCESSES=auto" in start[-1] and "runs_dir=gs://b/runs" in start[-1]
    assert "log.report_to=\\[wandb\\]" in start[-1]
    assert not cloud.calls("delete") and "the slice stays" in output


def test_tpu_refused_by_quota_stops_at_once(cloud):
    cloud.answer(NOT_THERE, ("create", 1, "ERROR: RESOURCE_EXHAUSTED: Quota 'TPUV5PPerProject' exceeded\n"))
    code, output = tpu(cloud)
    assert code == 1 and "Quota 'TPUV5PPerProject' exceeded" in output and "nothing was created" in output
    assert len(cloud.calls("create")) == 1 and not cloud.calls("ssh")


def test_tpu_without_a_login_stops_at_once(cloud):
    cloud.answer(("describe", 1, "ERROR: (gcloud) You do not currently have an active account selected.\n"))
    code, output = tpu(cloud)
    assert code == 1 and "active account" in output and not cloud.calls("create|ssh")


def test_tpu_taken_away_is_recreated_and_the_run_continues(cloud):
    state = "queued-resources describe"
    cloud.answer(
        (state, 0, "ACTIVE\n"),
        (state, 0, "ACTIVE\n"),
        *(NOT_THERE, (state, 0, "ACTIVE\n")),
        ("tpu-vm describe", 0, "READY\n"),
        ("tpu-vm describe", 0, "PREEMPTED\n"),
        ("tpu-vm describe", 0, "READY\n"),
        ("tail -n .1 -F", 255, "Connection closed\n"),
        ("tail -n .1 -F", 0, ""),
        ("ended ", 255, ""),
        ("ended ", 0, "ended 0\n"),
    )
    code, output = tpu(cloud)
    assert code == 0, output
    steps = cloud.calls("delete|create|nohup")
    assert [re.findall("delete|create|nohup", step)[0] for step in steps] == ["nohup", "delete", "create", "nohup"]
    assert "--force --quiet" in steps[1] and "the slice is PREEMPTED" in output


@pytest.mark.parametrize(("answer", "code"), [("ended 1\nended 75\n", 1), ("ended 143\nended 143\n", 143)])
def test_tpu_starts_again_only_where_that_helps(cloud, answer: str, code: int):
    cloud.answer(*READY, ("ended ", 0, answer))
    assert tpu(cloud, "--restarts", "2", "--delete")[0] == code
    assert len(cloud.calls("nohup")) == (1 if code == 1 else 3) and len(cloud.calls("delete n")) == 1


def test_what_tpu_machines_run(cloud, tmp_path):
    """The commands themselves, on a machine of two that is this one: start detached, leave alone, tell the status."""
    cloud.answer(*READY, ("ended ", 0, "ended 0\n"))
    tpu(cloud)
    commands = [each["call"][-1].removeprefix("--command=") for each in cloud.records() if "ssh" in each["call"]]
    _, start, follow, status = commands
    home = tmp_path / "home"
    (home / "jaxalign-src/launch").mkdir(parents=True)
    worker = home / "jaxalign-src/launch/worker.sh"
    worker.write_text('#!/bin/bash\necho "works on $*"\nwhile [ ! -e go ]; do sleep 0.05; done\nexit 143\n')
    worker.chmod(0o755)

    def remote(command: str) -> str:
        return subprocess.run(["bash", "-c", command], cwd=home, text=True, capture_output=True, timeout=30).stdout

    remote(start)
    assert remote(status).splitlines()[-1] == "running"
    remote(start)  # under way: not started twice
    (home / "go").touch()
    assert remote(follow).splitlines() == ["works on jaxalign.yaml runs_dir=gs://b/runs log.report_to=[wandb]"]
    assert remote(status) == "ended 143\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--name", "n"], "--zone and --type"),
        (["--name", "n", "--zone", "z", "--type", "t", "--bucket", "/disk", CONFIG], "share no disk"),
        (["--name", "n", "--zone", "z", "--type", "t", "--bucket", "gs://b", "no.yaml"], "no.yaml: no such file"),
        (["--nmae", "n"], "--nmae: no such option"),
    ],
)
def test_tpu_names_what_is_missing(cloud, arguments: list[str], told: str):
    code, output = cloud.run("launch/tpu_vm.sh", *arguments)
    assert code == 2 and told in output and not cloud.calls()


# gke.sh

# The fields that the published API of jobset.x-k8s.io/v1alpha2 has; of a Job inside, the schema of Kubernetes itself.
JOB_SET = {"failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy", "successPolicy", "suspend"}
RULE = {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}


def test_gke_applies_a_valid_job_set(cloud):
    code, output = cloud.run(
        *("launch/gke.sh", "--name", "dpo", "--image", "i:1", "--bucket", "gs://b/runs", "--topology", "2x4"),
        *("--machines", "2", CONFIG, "method.beta=0.2", "name=it's"),
    )
    assert code == 0, output
    make, config, apply, wait, logs = cloud.records()
    assert make["call"][:4] == ["kubectl", "create", "configmap", "dpo-config"]
    assert f"--from-file=config.yaml={CONFIG}" in make["call"]
    assert config["call"] == apply["call"] == ["kubectl", "apply", "-f", "-"]
    assert "jobset-name=dpo" in " ".join(wait["call"]) and "--follow" in logs["call"]
    found = yaml.safe_load(apply["stdin"])
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(found["spec"]) <= JOB_SET
    assert all(set(rule) <= RULE for rule in found["spec"]["failurePolicy"]["rules"])
    (slices,) = found["spec"]["replicatedJobs"]
    assert set(slices) == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "dpo"}, **slices["template"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["/etc/jaxalign/config.yaml", "runs_dir=gs://b/runs", "method.beta=0.2", "name=it's"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert "${" not in apply["stdin"]
    # A wrong field is found: the schema is not a formality.
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_gke_says_when_the_cluster_refuses(cloud):
    cloud.answer(("apply", 1, 'error: no matches for kind "JobSet"\n'))
    code, output = cloud.run("launch/gke.sh", "--name", "n", "--image", "i", "--bucket", "gs://b", CONFIG)
    assert code == 1 and "no matches for kind" in output and not cloud.calls("logs|wait")


# skypilot.yaml and Dockerfile


def test_skypilot_tells_nodes_of_each_other(cloud, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "envs", "setup", "run"}
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/worker.sh").write_text('#!/bin/bash\nenv | grep ^JAXALIGN_ | sort\nprintf "%s\\n" "$@"\n')
    (tmp_path / "launch/worker.sh").chmod(0o755)
    given = {"CONFIG": "c.yaml", "RUNS_DIR": "gs://b/r", "OVERRIDES": "a=1 b=2"}
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NODE_RANK": "1"}
    found = subprocess.run(
        ["bash", "-euc", task["run"]],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **given, **nodes},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.stdout.splitlines() == [
        *("JAXALIGN_COORDINATOR=10.0.0.4:8476", "JAXALIGN_PROCESS=1", "JAXALIGN_PROCESSES=2"),
        *("c.yaml", "runs_dir=gs://b/r", "a=1", "b=2"),
    ]


def test_every_launcher_starts_again_after_the_same_codes():
    text = (LAUNCH / "restarts.sh").read_text()
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (never,) = re.findall(r"^    ([\d |]+)\) return 1", text, re.M)
    mend = {int(code) for code in never.split("|")}
    assert not mend & set(task["resources"]["job_recovery"]["recover_on_exit_codes"])
    (listed,) = re.findall(r"values: \[([\d, ]+)\]", (LAUNCH / "gke_jobset.yaml").read_text())
    assert {int(code) for code in listed.split(",")} == mend - {0, 130}


def test_the_image_has_what_it_names():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and not [path for path in copied if not (ROOT / path).exists()]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"tpu", "cuda", "gcs", "s3"} <= set(extras)
    assert f'ENTRYPOINT ["{LAUNCH.name}/worker.sh"]' in lines
