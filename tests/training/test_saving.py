"""Checkpoints of several processes: read together, decided alike, and complete before anybody leaves."""

import json
from pathlib import Path

from jaxalign.training.sums import SUMS
from tests.together import run_together


def together(processes: int, folder: Path) -> list[dict]:
    """What each of so many processes of `tests/training/saving.py` saw."""
    # jax aborts them all where one leaves long before the others.
    outputs = run_together("tests.training.saving", processes, folder)
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("SEEN ")]
    return [json.loads(line.removeprefix("SEEN ")) for line in lines]


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
