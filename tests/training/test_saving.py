"""Checkpoints of several processes: read together, decided alike, and complete before anybody leaves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from jaxalign.training.sums import SUMS

ROOT = Path(__file__).resolve().parents[2]


def together(processes: int, folder: Path) -> list[dict]:
    """What each of so many processes of `tests/training/saving.py` saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAXALIGN", "XLA_"))}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.saving", str(port), str(processes), str(number), str(folder)],
            env={**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for number in range(processes)
    ]
    seen = []
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output  # jax aborts them all where one leaves long before the others
        seen += [json.loads(line.removeprefix("SEEN ")) for line in output.splitlines() if line.startswith("SEEN ")]
    return seen


def test_two_processes_share_the_work_decide_alike_and_leave_together(tmp_path):
    first, second = together(2, tmp_path / "run")
    assert first["steps"] == second["steps"] == [1, 2]
    # Every file was read once, by one of them, when it was saved and when it was verified.
    for phase, steps in (("read", ("1", "2")), ("verified", ("1", "2"))):
        files = sorted(
            str(path.relative_to(tmp_path / "run"))
            for step in steps
            for path in (tmp_path / "run" / step).rglob("*")
            if path.is_file() and path.name != SUMS
        )
        assert sorted(first[phase] + second[phase]) == files
        large = max(files, key=lambda name: (tmp_path / "run" / name).stat().st_size)
        assert (large in first[phase]) != (large in second[phase]) and min(len(first[phase]), len(second[phase])) > 2
    assert first["restored"] == second["restored"] == 1
    assert first["rejected"] == second["rejected"] and first["rejected"][0][0] == 2
    assert "is not what was saved (its SHA-256 differs)" in first["rejected"][0][1]
    for told in (first["failed"], second["failed"]):
        assert "cannot save checkpoint 3" in told and "cannot be read" in told
    assert "process 1" in first["failed"]
    assert first["last"] == second["last"] == [1, 2, 4]
