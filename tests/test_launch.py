"""The launchers without a cloud: what every machine runs, this machine alone, SkyPilot, the image, the document."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from jaxalign.config import load_config
from jaxalign.planning.targets import FLAGS
from tests.launching import CONFIG, LAUNCH, ROOT, Cloud

SCRIPTS = ["worker.sh", "restarts.sh", "local.sh", "tpu_vm.sh", "gke.sh", "slurm.sbatch"]


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


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


def test_a_plan_compiles_with_the_workers_flags():
    script = (ROOT / "launch" / "worker.sh").read_text()
    assert tuple(re.findall(r"--xla_(?:tpu|jf)_\S+", script)) == FLAGS


def test_without_an_accelerator_there_are_no_flags(cloud):
    cloud.run("launch/worker.sh", CONFIG)
    (record,) = [each for each in cloud.records() if each["call"][0] == "jaxalign"]
    assert not {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(record["env"])


@pytest.mark.parametrize("package", ["", "libtpu", "jax_plugins.xla_cuda13"])
def test_memory_comes_in_large_pages_where_the_cpu_computes(cloud, tmp_path, package):
    """What the user set stays, also where that is nothing."""
    if package:
        folder = tmp_path.joinpath("site", *package.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    path = {"PYTHONPATH": str(tmp_path / "site")}
    for users in ({}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, {"GLIBC_TUNABLES": ""}):
        code, output = cloud.run("launch/worker.sh", CONFIG, **path, **users)
        assert code == 0, output
    found = [each["env"].get("GLIBC_TUNABLES") for each in cloud.records() if each["call"][0] == "jaxalign"]
    assert found == [None if package else "glibc.malloc.hugetlb=1", "glibc.malloc.arena_max=2", ""]


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


def test_sigterm_after_the_end_is_no_error(cloud, tmp_path):
    """`kill` fails where the process has just ended; the worker still waits for it, and gives its status."""
    cloud.write("jaxalign", SAVES)
    (tmp_path / "gone").write_text('kill() { builtin kill "$@"; return 1; }\n')
    process = cloud.start("launch/worker.sh", CONFIG, BASH_ENV=str(tmp_path / "gone"))
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "saved" in output


# local.sh


def test_sigterm_before_a_start_stops_it(cloud, tmp_path):
    asked, go = tmp_path / "asked", tmp_path / "go"
    cloud.write("slow-python", f"#!/bin/bash\ntouch {asked}\nwhile [ ! -e {go} ]; do sleep 0.02; done\necho 20000\n")
    process = cloud.start("launch/local.sh", "-n", "2", CONFIG, JAX_PLATFORMS="cpu", PYTHON="slow-python")
    while not asked.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    go.touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert not cloud.calls("^jaxalign")


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


@pytest.mark.parametrize(
    ("given", "dealt"), [("2,7,GPU-1b2,5", {"2,7", "GPU-1b2,5"}), ("3,1", {"3", "1"}), ("-1", {"-1"}), ("", {""})]
)
def test_local_deals_out_what_may_be_used(cloud, given: str, dealt: set[str]):
    cloud.answer(("^nvidia-smi", 0, "GPU 0\nGPU 1\nGPU 2\nGPU 3\n"), ("^curl", 22, ""))
    code, _ = cloud.run("launch/local.sh", "-n", "2", CONFIG, CUDA_VISIBLE_DEVICES=given)
    found = [each["env"]["CUDA_VISIBLE_DEVICES"] for each in cloud.records() if each["call"][0] == "jaxalign"]
    assert code == 0 and len(found) == 2 and set(found) == dealt


# skypilot.yaml

# What SkyPilot's schema says of the fields used here (skypilot-org/skypilot at 00052dfe, sky/utils/schemas.py).
SKY_TASK = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        **{name: {"type": "string"} for name in ("name", "workdir", "setup", "run")},
        "num_nodes": {"type": "integer"},
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "integer", "number", "null"]}},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": ["string", "object", "array"]},
                "use_spot": {"type": "boolean"},
                "disk_size": {"type": "integer"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                            "uniqueItems": True,
                        },
                    },
                },
            },
        },
    },
}


def sky(folder: Path, worker: str) -> subprocess.CompletedProcess[str]:
    """Runs the task's `run` as the second of two nodes, with this worker."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (folder / "launch").mkdir(exist_ok=True)
    (folder / "launch/worker.sh").write_text("#!/bin/bash\n" + worker)
    (folder / "launch/worker.sh").chmod(0o755)
    shutil.copy(LAUNCH / "restarts.sh", folder / "launch")
    given = {"CONFIG": "c.yaml", "RUNS_DIR": "gs://b/r", "OVERRIDES": "a=1 b=2"}
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NODE_RANK": "1"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **given, **nodes}
    command = ["bash", "-euc", task["run"]]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_skypilot_tells_nodes_of_each_other(tmp_path):
    assert sky(tmp_path, 'env | grep ^JAXALIGN_ | sort\nprintf "%s\\n" "$@"\n').stdout.splitlines() == [
        *("JAXALIGN_COORDINATOR=10.0.0.4:8476", "JAXALIGN_PROCESS=1", "JAXALIGN_PROCESSES=2"),
        *("c.yaml", "runs_dir=gs://b/r", "a=1", "b=2"),
    ]


def test_skypilots_task_is_valid():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, SKY_TASK)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**task, "resources": {**task["resources"], "spot": True}}, SKY_TASK)


# Exit statuses


def table() -> dict[int, bool]:
    """Whether the table of docs/scale.md starts again after a status; 3 and 135 are among the others."""
    section = (ROOT / "docs/scale.md").read_text().split("## Exit status\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    found = {}
    for statuses, _, answer in rows[2:]:
        assert answer in ("yes", "no")
        for status in [3, 134, 135, 137, 139] if statuses == "other" else map(int, statuses.split(", ")):
            found[status] = answer == "yes"
    return found


def test_every_launcher_starts_again_after_the_same_statuses(tmp_path):
    assert set(table()) >= {0, 1, 2, 75, 130, 143, 135}
    listed = yaml.safe_load(re.sub(r"\$\{\w+\}", "1", (LAUNCH / "gke_jobset.yaml").read_text()))["spec"]
    (mend,) = listed["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    recovery = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["resources"]["job_recovery"]
    assert "max_restarts_on_errors" not in recovery  # it would count, and start again, after 1 too
    for status, again in table().items():
        command = f"source launch/restarts.sh; again {status}"
        assert (subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0) == again, status
        assert (status not in (0, *mend["onExitCodes"]["values"])) == again, status
        ended = sky(tmp_path, f"exit {status}\n").returncode
        assert (ended in recovery["recover_on_exit_codes"]) == again and (again or ended == status), status
    assert mend["action"] == "FailJob"
    assert listed["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


# Dockerfile and README.md


def test_the_image_has_what_it_names():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and not [path for path in copied if not (ROOT / path).exists()]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"tpu", "cuda", "gcs", "s3"} <= set(extras)
    assert f'ENTRYPOINT ["{LAUNCH.name}/worker.sh"]' in lines


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_documented_commands_find_their_model_and_data():
    """What a config in launch/README.md names is on every machine: data by git and the image, models from the Hub."""
    tracked, docker = git("ls-files").stdout.split("\n"), (LAUNCH / "Dockerfile").read_text()
    text = re.sub(r"\s*\\?\n\s*", " ", (LAUNCH / "README.md").read_text())
    commands = re.findall(r"(configs/[\w./-]+)((?: (?:--env )?[\w.]+=[\w.=:/-]+)*)", text)
    assert len(commands) >= 7
    for config, more in commands:
        overrides = [
            word.removeprefix("OVERRIDES=") for word in more.split() if not word.startswith(("--env", "RUNS_"))
        ]
        stages = load_config(ROOT / config, overrides).stages
        made = {f"{stage.name}.policy" for stage in stages}
        for stage in stages:
            for path in (config, stage.data.path, stage.data.eval_path):
                assert path in tracked and f"COPY {Path(path).parts[0]} " in docker, (config, path)
            # A file that git ignores is on no machine but this one.
            assert stage.model.path in made or git("check-ignore", stage.model.path).returncode == 1, (config, more)
