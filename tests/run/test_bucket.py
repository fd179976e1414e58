"""A run whose folder is in a bucket, for which fsspec's memory file system stands in: it goes on elsewhere."""

import contextlib
import json

import fsspec
import pytest

from jaxalign import models
from jaxalign.buckets import listing
from jaxalign.config import parse_config
from jaxalign.run import run
from jaxalign.run.bucket import Mirror
from jaxalign.training.timings import TIMINGS


@pytest.fixture
def memory():
    """The memory file system, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def staged(settings, pairs, memory):
    """Two stages of SFT, data and runs in the bucket."""
    memory.put(str(pairs), "/b/data/pairs.jsonl")
    data = {"path": "memory://b/data/*.jsonl", "columns": {"completion": "chosen"}, "max_length": 128}
    train = {"batch_size": 12, "micro_batch_size": 6, "max_steps": 5, "save_steps": 2, "save_total_limit": 1}
    both = {"method": {"name": "sft"}, "data": data, "train": train, "log": {"logging_steps": 1}}
    both["mesh"] = {"data": 2, "fsdp": 2, "tensor": 2}
    stages = [{"name": "one", **both}, {"name": "two", **both, "model": {"path": "one.policy"}}]
    return {"name": "run", "runs_dir": "memory://b/runs", "model": settings["model"], "stages": stages}


class GoneError(Exception):
    """The machine, in the test."""


def dies_after(title: str, last: int):
    """A progress bar under which the machine goes away in a stage."""

    @contextlib.contextmanager
    def make(total: int, start: int, stage: str):
        def progress(step: int, metrics) -> None:
            if (stage, step) == (title, last):
                raise GoneError

        yield progress

    return make


def records(memory, stage: str) -> list[dict]:
    text = memory.cat_file(f"/b/runs/run/{stage}/metrics.jsonl").decode()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in text.splitlines()]


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine(staged, memory, tmp_path, monkeypatch):
    config = parse_config(staged)
    monkeypatch.setenv("JAXALIGN_SCRATCH", str(tmp_path / "whole"))
    whole = run(parse_config({**staged, "runs_dir": str(tmp_path / "runs")}))
    monkeypatch.setenv("JAXALIGN_SCRATCH", str(tmp_path / "first"))
    with pytest.raises(GoneError):
        run(config, make_progress=dies_after("two", 4))
    monkeypatch.setenv("JAXALIGN_SCRATCH", str(tmp_path / "second"))
    said: list[str] = []
    result = run(config, say=said.append)
    assert [line for line in said if line.startswith("run: ")] == ["run: memory://b/runs/run (continued)"]
    assert "one: done before, its policy is in memory://b/runs/run/one/export" in said
    assert "continuing after step 2" in said
    for stage in ("one", "two"):
        expected = [json.loads(line) for line in (whole.folder / stage / "metrics.jsonl").read_text().splitlines()]
        assert records(memory, stage) == [{k: v for k, v in each.items() if k not in TIMINGS} for each in expected]
        ours, theirs = (
            models.fingerprint(path)
            for path in (f"memory://b/runs/run/{stage}/export", whole.folder / stage / "export")
        )
        assert ours == theirs
    assert [str(stage.export) for stage in result.stages] == [f"memory://b/runs/run/{x}/export" for x in ("one", "two")]
    there = set(listing("memory://b/runs/run"))
    assert {"config.yaml", "manifest.json"} <= there and not [name for name in there if ".lock" in name]
    # The last checkpoint alone is kept, whole.
    steps = {name.split("/")[2] for name in there if name.startswith("two/checkpoints/")}
    assert steps == {"5"} and "two/checkpoints/5/SHA256SUMS" in there
    with pytest.raises(ValueError, match="holds another run"):
        run(parse_config({**staged, "model": {**staged["model"], "remat": "none"}}))


def test_half_a_checkpoint_in_the_bucket_is_not_taken(memory, tmp_path):
    for name in ("checkpoints/4/state/x", "checkpoints/4/SHA256SUMS", "checkpoints/8/state/x", "metrics.jsonl"):
        memory.pipe_file(f"/b/runs/run/{name}", b"")
    Mirror("memory://b/runs/run", tmp_path).pull()
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["checkpoints/4/SHA256SUMS", "checkpoints/4/state/x", "metrics.jsonl"]


def test_without_permission_nothing_is_begun(staged, memory, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("403: no storage.objects.create")

    monkeypatch.setenv("JAXALIGN_SCRATCH", str(tmp_path))
    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    with pytest.raises(OSError, match=r"memory://b/runs cannot be written: .*403: no storage.objects.create"):
        run(parse_config(staged))
    assert not listing("memory://b/runs")
