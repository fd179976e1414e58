"""Several processes as one run, on loopback, through the launcher for one machine: real processes, really killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxalign.run.processes import LOST, MEND, SAVED, Group, code_of, find_group
from tests.run.conftest import ROOT, begin, wait_until
from tests.run.test_resume import lines, saving, unfinished
from tests.together import run_together

SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_GPUS_ON_NODE": "2",
}
EXPLICIT = {"JAXALIGN_COORDINATOR": "h:80", "JAXALIGN_PROCESSES": "4", "JAXALIGN_PROCESS": "3"}


@pytest.mark.parametrize(
    ("environment", "chips", "expected"),
    [
        ({}, 0, None),
        (EXPLICIT, 0, Group("JAXALIGN_*", "h:80", 4, 3)),
        ({**EXPLICIT, **SLURM, "SLURM_PROCID": "0"}, 0, Group("JAXALIGN_COORDINATOR and SLURM", "h:80", 4, 3, (0, 1))),
        ({"JAXALIGN_COORDINATOR": "h:80", **SLURM}, 0, Group("JAXALIGN_COORDINATOR and SLURM", "h:80", 4, 3, (0, 1))),
        (SLURM, 0, Group("SLURM", local_devices=(0, 1))),
        # Two processes on a node: jax gives each one device.
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 0, Group("SLURM")),
        # A batch script itself, and a step of one process, are runs of one.
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, 0, None),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 0, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, 0, Group("Open MPI")),
        ({}, 4, Group("TPU")),
        ({"JAXALIGN_PROCESSES": "auto"}, 4, Group("JAXALIGN_PROCESSES=auto")),
        ({"JAXALIGN_PROCESSES": "1"}, 0, None),
        ({**EXPLICIT, "JAXALIGN_PROCESSES": "1", "JAXALIGN_PROCESS": "0"}, 4, None),
    ],
)
def test_who_the_processes_are(environment: dict[str, str], chips: int, expected: Group | None):
    assert find_group(environment, chips=chips) == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"JAXALIGN_COORDINATOR": ""}, "JAXALIGN_COORDINATOR: not set, but JAXALIGN_PROCESSES, JAXALIGN_PROCESS is"),
        ({"JAXALIGN_PROCESS": ""}, "JAXALIGN_PROCESS: not set"),
        ({"JAXALIGN_PROCESS": "4"}, "JAXALIGN_PROCESS=4: with JAXALIGN_PROCESSES=4 they are 0 to 3"),
        ({"JAXALIGN_PROCESSES": "four"}, "JAXALIGN_PROCESSES='four': a whole number from 1 up"),
        ({"JAXALIGN_COORDINATOR": "h"}, "JAXALIGN_COORDINATOR='h': write host:port"),
    ],
)
def test_a_contradiction_is_named(changes: dict[str, str], told: str):
    with pytest.raises(ValueError, match=re.escape(told)):
        find_group({**EXPLICIT, **changes})


def test_exit_codes():
    from jax.errors import JaxRuntimeError

    assert code_of(JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer [10.0.0.2]:99")) == LOST
    assert code_of(JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes")) == MEND
    unsaved, full = OSError("cannot save checkpoint 8 in /shared/run"), OSError(28, "cannot save checkpoint 8")
    unsaved.__cause__ = JaxRuntimeError("UNAVAILABLE: the coordination service is not there any more")
    full.__cause__ = OSError(28, "No space left on device")
    assert code_of(unsaved) == LOST and code_of(full) == MEND
    assert code_of(ValueError("data.path: no such file")) == MEND and code_of(KeyboardInterrupt()) == 130
    text = (ROOT / "docs" / "scale.md").read_text()
    assert {str(code) for code in (0, MEND, LOST, SAVED)} <= set(re.findall(r"^\| (\d+)", text, re.M))


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Path:
    """A folder with a `jaxalign` for PATH; what it compiles is kept between the tests."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "jaxalign").write_text(f'#!/bin/sh\nexec {sys.executable} -m jaxalign "$@"\n')
    (folder / "jaxalign").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def start(command) -> Callable[..., subprocess.Popen]:
    """Starts `launch/local.sh` with so many processes and CPU devices of each."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAXALIGN", "XLA_"))}
    environment = {
        **kept,
        # A tenth of the time to compile: what is compared are sums, not speed.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PATH": f"{command}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(command / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "COLUMNS": "300",
        "JAXALIGN_START_TIMEOUT": "120",
    }

    def run(processes: int, devices: int, *arguments: str | Path) -> subprocess.Popen:
        script = [ROOT / "launch/local.sh", "-n", processes, "-d", devices, "-r", 1]
        return begin([str(word) for word in (*script, *arguments)], environment)

    return run


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output
    return output


REWARD = """
import os, pathlib

def tenths(completions, **columns):
    with pathlib.Path(__file__).with_name("calls").open("a") as file:
        file.write(f"{os.getpid()} {len(completions)}\\n")
    return [sum(map(ord, str(completion))) % 11 / 10 for completion in completions]
"""


@pytest.fixture(scope="module")
def config(tiny, pairs, tmp_path_factory) -> Path:
    """SFT in two micro-batches, GRPO, and DPO with the reference's log-probs computed first; 10, 2 and 10 steps."""
    folder = tmp_path_factory.mktemp("processes")
    sft = {"name": "sft", "method": {"name": "sft"}, "data": {"columns": {"completion": "chosen"}}}
    dpo = {"name": "dpo", "method": {"name": "preference", "precompute_ref_log_probs": True}}
    dpo |= {"model": {"path": "sft.policy"}, "train": {"micro_batch_size": 16}}
    (folder / "own.py").write_text(REWARD)
    grpo = {
        "name": "grpo",
        "model": {"path": "sft.policy"},
        "method": {"name": "grpo", "num_generations": 3, "max_completion_length": 6, "beta": 0.1},
        "rollout": {"rewards": [{"name": f"{folder}/own.py:tenths"}]},
        "train": {"batch_size": 4, "micro_batch_size": 2, "max_steps": 2},
    }
    settings = {
        "runs_dir": str(folder / "runs"),
        "model": {"path": str(tiny)},
        "data": {"path": str(pairs), "max_length": 128},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"batch_size": 16, "micro_batch_size": 8, "max_steps": 10, "save_steps": 4},
        "log": {"logging_steps": 1},
        "stages": [sft, grpo, dpo],
    }
    path = folder / "config.json"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def whole(start, config) -> Path:
    """The run on one process with eight devices."""
    finish(start(1, 8, config, "name=whole"))
    return config.parent / "runs" / "whole"


def assert_same_losses(folder: Path, whole: Path, *stages: str) -> None:
    """Every step once, and in every number equal to 1e-4 relative."""
    for stage in stages:
        found, expected = lines(folder / stage), lines(whole / stage)
        assert [record["step"] for record in found] == [record["step"] for record in expected]
        assert sum("loss" in record for record in found) == (2 if stage == "grpo" else 10)
        for ours, theirs in zip(found, expected, strict=True):
            for name in ("loss", "grad_norm", "num_tokens", "rewards/margins", "reward", "kl", "train_loss"):
                if name in theirs:
                    np.testing.assert_allclose(
                        ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=f"{stage} {name}"
                    )
        assert (folder / stage / "export" / "model.safetensors").is_file()


def logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow
def test_two_by_four_stopped_goes_on_as_one_by_eight(start, config, whole):
    folder = config.parent / "runs" / "stopped"
    process = start(2, 4, config, "name=stopped")
    assert wait_until(lambda: logged(folder / "dpo") >= 3, process, 400)
    process.send_signal(signal.SIGTERM)
    output = finish(process, SAVED)
    assert output.count("all is saved; the same command continues") == 1
    assert 3 <= logged(folder / "dpo") < 10
    output = finish(start(1, 8, config, "name=stopped"))
    assert "begun on 8 device(s) in 2 process(es), goes on on 8 device(s) in 1 process(es)" in output
    assert_same_losses(folder, whole, "sft", "grpo", "dpo")
    # One process scored 4 prompts of 3 completions, of two processes each 2 prompts of its own.
    calls = [int(line.split()[1]) for line in (config.parent / "calls").read_text().splitlines()]
    assert calls == [12, 12, 6, 6, 6, 6]
    layouts = json.loads((folder / "manifest.json").read_text())["stages"]["dpo"]["layouts"]
    assert layouts == [{"devices": 8, "processes": 2}, {"devices": 8, "processes": 1}]


@pytest.mark.slow
def test_two_by_four_stopped_goes_on_as_eight_by_one(start, config, whole):
    folder, offline = config.parent / "runs" / "eight", config.with_name("offline.json")
    settings = json.loads(config.read_text())
    offline.write_text(json.dumps({**settings, "stages": settings["stages"][::2]}))
    process = start(2, 4, offline, "name=eight")
    assert wait_until(lambda: logged(folder / "dpo") >= 3, process, 400)
    process.send_signal(signal.SIGTERM)
    finish(process, SAVED)
    output = finish(start(8, 1, offline, "name=eight"))
    assert "begun on 8 device(s) in 2 process(es), goes on on 8 device(s) in 8 process(es)" in output
    assert_same_losses(folder, whole, "sft", "dpo")


def gradients(processes: int, path: Path, **sizes: int) -> np.ndarray:
    """Of `tests/run/gradients.py` on 8 devices in so many processes."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    run_together("tests.run.gradients", processes, 8 // processes, json.dumps(sizes), path, flags=flags)
    return np.load(path)


@pytest.mark.slow
def test_in_float64_processes_and_meshes_change_nothing_but_rounding(tmp_path):
    expected = gradients(1, tmp_path / "1.npy", data=8)
    layouts = ((2, {"fsdp": 4, "context": 2}), (4, {"data": 2, "fsdp": 2, "tensor": 2}), (8, {"fsdp": 8}))
    for processes, sizes in layouts:
        found = gradients(processes, tmp_path / f"{processes}.npy", **sizes)
        assert np.linalg.norm(found - expected) <= 1e-10 * np.linalg.norm(expected), (processes, sizes)


def worker(launcher: int, number: int) -> int:
    """The pid of a launcher's process of this number."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            environment, words = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            above = int((Path("/proc") / str(parent) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        ours = above == launcher and b"-m\0jaxalign\0run" in words  # local.sh, worker.sh, python
        if ours and f"JAXALIGN_PROCESS={number}\0".encode() in environment:
            return int(entry.name)
    raise LookupError(f"there is no process {number}")


@pytest.mark.slow
def test_one_of_two_killed_inside_a_save_leaves_one_that_is_reported_and_not_used(start, config):
    folder, alone = config.parent / "runs" / "half", config.with_name("sft.json")
    settings = json.loads(config.read_text())
    alone.write_text(json.dumps({**settings, "stages": settings["stages"][:1]}))
    process = start(2, 4, alone, "name=half", "train.micro_batch_size=16")
    saves = folder / "sft" / "checkpoints"
    assert wait_until(lambda: (saves / "4" / "SHA256SUMS").exists(), process, 400)
    victim = worker(process.pid, 1)
    assert wait_until(lambda: any(name.startswith("8") for name, _ in unfinished(folder / "sft")), process, 400)
    os.kill(victim, signal.SIGKILL)
    told = []
    assert process.stdout is not None
    for line in process.stdout:
        told.append(line)
        if "starting again" in line:
            break
    before = lines(folder / "sft")
    assert not (saves / "8" / "SHA256SUMS").exists() and len(before) >= 8
    output = finish(process)
    assert "checkpoints/8 is not used: the save did not finish" in output and "continuing after step 4" in output
    # What was computed after the last complete checkpoint is computed again, bit for bit.
    after = [record for record in lines(folder / "sft") if record["step"] <= 8]
    assert after == [record for record in before if record["step"] <= 8]


@pytest.mark.slow
def test_one_of_four_killed_is_named_and_the_next_start_goes_on_exactly(start, config, whole):
    folder = config.parent / "runs" / "killed"
    alone = config.with_name("sft.json")
    settings = json.loads(config.read_text())
    alone.write_text(json.dumps({**settings, "stages": settings["stages"][:1]}))
    process = start(4, 2, alone, "name=killed", "train.micro_batch_size=16")

    def ready() -> bool:
        return logged(folder / "sft") >= 6 and not saving(folder / "sft")

    assert wait_until(ready, process, 400)
    victim = worker(process.pid, 2)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    told = []
    assert process.stdout is not None
    for line in process.stdout:
        told.append(line)
        if "starting again" in line:
            break
    assert time.monotonic() - killed < 60
    before = [record for record in lines(folder / "sft") if record["step"] <= 10]
    text = "".join(told)
    assert text.count(f"pid {victim}) stopped the run: it died without a word") == 3, text
    assert f"ended with status {LOST}" in text
    finish(process)
    # What was logged after the last checkpoint is computed again, bit for bit.
    after = [record for record in lines(folder / "sft") if record["step"] <= len(before)]
    assert len(before) >= 6 and before == after[: len(before)]
    assert_same_losses(folder, whole, "sft")
