"""Guarantee 3 on the real process: killed at any moment, a run goes on bit for bit."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jaxalign.training.checkpoint import saved_any
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


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """Saves that are not complete: a step's folders, temporary or not, without checksums, and when they changed.

    Checksums go first where an old checkpoint is deleted; that is no save, and a later one is complete.
    """
    found = folder / "checkpoints"
    last = max((int(each.parent.name) for each in found.glob("*/SHA256SUMS")), default=0)
    with contextlib.suppress(FileNotFoundError):  # one that is just being renamed
        return {
            (each.name, each.stat().st_ctime_ns)
            for each in (found.iterdir() if found.is_dir() else ())
            if each.name.partition(".")[0].isdecimal() and int(each.name.partition(".")[0]) > last
        }
    return set()


def saving(folder: Path) -> bool:
    """Whether a save has begun and is not complete."""
    return bool(unfinished(folder))


@pytest.mark.parametrize(
    ("method", "times"),
    [
        ("sft", 2),
        pytest.param("sft", 5, marks=pytest.mark.slow),
        pytest.param("preference", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(method, times, settings, write_config, cli):
    settings["train"] |= {"max_steps": 40 if times > 2 else 20, "eval_steps": 10}
    if method == "sft":
        settings["method"] = {"name": "sft"}
        settings["data"] |= {"columns": {"completion": "chosen"}}
    config = write_config(settings)
    runs, begun = Path(settings["runs_dir"]), time.monotonic()
    finish(cli("run", config, "name=whole"))
    length = time.monotonic() - begun
    folder, chance = runs / "killed", random.Random(method)
    kills = tries = 0
    while kills < times:
        tries += 1
        assert tries <= 3 * times + 3, "the run ended before it could be killed"
        inside, left, begun = kills == min(times, 3) - 1, unfinished(folder), time.monotonic()
        process = cli("run", config, "name=killed")
        if inside:
            wait_until(lambda left=left: saved_any(folder / "checkpoints") and unfinished(folder) - left, process)
        else:  # the start, the first compilation and the export are as likely as a step
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=chance.uniform(0, length))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0
            length = time.monotonic() - begun  # less than the first run, which had to compile
            shutil.rmtree(folder)
        elif not inside or unfinished(folder) - left:
            kills += 1
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
