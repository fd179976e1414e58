"""Guarantee 3 on the real process: killed at any moment, a run goes on bit for bit."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

from jaxalign.training.timings import TIMINGS
from tests.run.conftest import finish, wait_until

SFT = {"method": {"name": "sft"}, "columns": {"completion": "chosen"}}


def lines(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def weights(folder: Path) -> bytes:
    return (folder / "export" / "model.safetensors").read_bytes()


def logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def saving(folder: Path) -> bool:
    """Whether a save has begun and is not complete: a step's folder, temporary or not, without checksums."""
    found = folder / "checkpoints"
    return found.is_dir() and any(each.is_dir() and not (each / "SHA256SUMS").exists() for each in found.iterdir())


@pytest.mark.parametrize(
    ("method", "times"),
    [
        ("sft", 1),
        pytest.param("sft", 5, marks=pytest.mark.slow),
        pytest.param("preference", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(method, times, settings, write_config, cli):
    settings["train"] |= {"max_steps": 40, "eval_steps": 10}
    if method == "sft":
        settings["method"] = {"name": "sft"}
        settings["data"] |= {"columns": {"completion": "chosen"}}
    config = write_config(settings)
    runs = Path(settings["runs_dir"])
    finish(cli("run", config, "name=whole"))
    folder, chance = runs / "killed", random.Random(method)
    kills = 0
    for attempt in range(times):
        process = cli("run", config, "name=killed")
        if attempt == 2:
            got_there = wait_until(lambda: saving(folder), process)
        else:
            seen = logged(folder)
            got_there = wait_until(lambda seen=seen: logged(folder) > seen, process)
            time.sleep(chance.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += got_there and process.returncode == -signal.SIGKILL
    assert kills >= min(times, 4), "the run ended before it could be killed"
    finish(cli("run", config, "name=killed"))
    assert lines(folder) == lines(runs / "whole")
    assert weights(folder) == weights(runs / "whole")


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(settings, write_config, cli):
    settings["train"] |= {"max_steps": 40, "save_steps": 1000, "eval_steps": 1000}
    config, runs = write_config(settings), Path(settings["runs_dir"])
    finish(cli("run", config, "name=whole"))
    process = cli("run", config, "name=stopped")
    assert wait_until(lambda: logged(runs / "stopped") >= 3, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 143)
    assert "the same command continues" in output
    assert "continuing after step" in finish(cli("run", config, "name=stopped"))
    assert lines(runs / "stopped") == lines(runs / "whole")
    assert weights(runs / "stopped") == weights(runs / "whole")
    assert "done before" in finish(cli("run", config, "name=stopped"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(settings, write_config, cli):
    settings["train"] |= {"max_steps": 9, "save_steps": 3, "eval_steps": 1000}
    config, runs = write_config(settings), Path(settings["runs_dir"])
    finish(cli("run", config, "name=whole"))
    folder = runs / "damaged"
    finish(cli("run", config, "name=damaged"))
    (folder / "export" / "config.json").unlink()  # as if killed before the export
    for path in (folder / "export").iterdir():
        path.unlink()
    (folder / "export").rmdir()
    victim = max(
        (folder / "checkpoints" / "9").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    output = finish(cli("run", config, "name=damaged"))
    assert "checkpoints/9 is not used" in output.replace("\n", "")
    assert lines(folder) == lines(runs / "whole")
    assert weights(folder) == weights(runs / "whole")
