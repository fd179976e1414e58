"""Sums that split anywhere, JSON lines that survive a kill, and the trackers' names."""

import json
import math
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.training import metrics
from jaxalign.training.metrics import Interval, JsonLines
from jaxalign.types import Max, Mean, Min, Sum

NUMBERS = st.floats(width=32)
PARTS = st.one_of(
    st.builds(Mean, NUMBERS, st.floats(0, 8, width=32)),
    st.builds(Min, NUMBERS),
    st.builds(Max, NUMBERS),
    NUMBERS,
)


def bits(interval: Interval) -> dict:
    return interval.to_json()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"a": st.builds(Mean, NUMBERS, NUMBERS), "b": st.builds(Min, NUMBERS), "c": NUMBERS}, optional={"d": PARTS}
        ),
        max_size=6,
    ),
    st.integers(0, 6),
)
def test_a_kill_at_any_step_of_an_interval_changes_no_bit(steps, cut):
    whole, first = Interval(), Interval()
    for step in steps:
        whole = whole.add(step)
    for step in steps[:cut]:
        first = first.add(step)
    resumed = Interval.from_json(json.loads(json.dumps(first.to_json(), allow_nan=False)))
    for step in steps[cut:]:
        resumed = resumed.add(step)
    assert bits(resumed) == bits(whole)


def test_parts_are_merged_in_float64_on_the_host():
    interval = Interval()
    for value in (1.0, 2.0**-30, 2.0**-30):
        step = {
            "loss": Mean(jnp.float32(value), jnp.float32(1)),
            "low": Min(jnp.float32(value)),
            "high": Max(jnp.float32(value)),
        }
        interval = interval.add(step).add({"epoch": np.float32(value), "absent": None})
    assert interval.values() == {"epoch": 2.0**-30, "high": 1.0, "loss": (1 + 2.0**-29) / 3, "low": 2.0**-30}
    assert all(type(value) is float for value in interval.values().values())


def test_what_was_computed_over_nothing_is_absent_and_nan_is_not():
    nothing = {"a": Mean(0.0, 0.0), "b": Min(math.inf), "c": Max(-math.inf)}
    assert Interval().add(nothing).values() == {}
    values = Interval().add({"a": Mean(math.nan, 1.0), "b": Min(math.nan), "c": Max(math.inf)}).values()
    assert math.isnan(values["a"]) and math.isnan(values["b"]) and values["c"] == math.inf
    assert math.isnan(Interval().add({"b": Min(math.nan)}).add({"b": Min(1.0)}).values()["b"])


def written(path: Path) -> list[dict]:
    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


def test_lines_are_legal_json_flushed_one_by_one(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write(1, {"loss": 0.1, "bad": math.nan, "none": None})
    assert written(path) == [{"step": 1, "loss": 0.1, "bad": None}]
    lines.write(2, {"worse": math.inf, "numbers": np.array([1.5, np.nan]), "one": np.float32(0.5), "text": "ø\n"})
    assert written(path)[1] == {"step": 2, "worse": None, "numbers": [1.5, None], "one": 0.5, "text": "ø\n"}
    lines.write(3, {"messages": [{"role": "user", "scores": (1.0, -math.inf)}], "device": jnp.arange(2)})
    assert written(path)[2]["messages"] == [{"role": "user", "scores": [1.0, None]}]
    lines.close()


@pytest.mark.parametrize(
    ("resume", "kept"), [(None, []), (0, []), (2, [2]), (3, [2]), (4, [2, 4, 4]), (9, [2, 4, 4, 6])]
)
@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}', "\0\0\0"])
def test_resuming_cuts_later_lines_and_a_torn_last_one(tmp_path, resume, kept, torn):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in (2, 4, 4, 6):
        lines.write(step, {"loss": step / 7})
    lines.close()
    with path.open("a") as file:
        file.write(torn)
    lines = JsonLines(path, resume)
    lines.write(7, {})
    lines.close()
    assert [record["step"] for record in written(path)] == [*kept, 7]


def test_the_summary_of_a_finished_run_is_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for resume in (None, 5, 5):
        lines = JsonLines(path, resume)
        if resume is None:
            lines.write(5, {"loss": 1.0})
        lines.write(5, {"train_loss": 2.0, "train_runtime": 3.0})
        lines.close()
    assert [set(record) - {"step"} for record in written(path)] == [{"loss"}, {"train_loss", "train_runtime"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [("nonsense", "line 2 is no JSON"), ("[1]", "line 2 has no step"), ('{"step": "a"}', "has no step")],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=message) as error:
        JsonLines(path, 9)
    assert str(path) in str(error.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_named():
    lines = JsonLines("/dev/full")
    with pytest.raises(OSError, match=r"cannot write: No space left on device.*free space.*'/dev/full'"):
        lines.write(1, {"loss": 1.0})
    with pytest.raises(OSError, match=r"No space.*'/dev/full'"):
        lines.close()


def test_names_on_dashboards_are_those_of_the_trainer():
    record = {"loss": 1.0, "rewards/chosen": 2, "eval_loss": np.float32(3), "note": "text", "none": None}
    assert metrics.dashboard_names(record) == {"train/loss": 1.0, "train/rewards/chosen": 2.0, "eval/loss": 3.0}


def events(folder: Path) -> list[tuple]:
    """What TensorBoard shows: scalars by step, those purged by a later process gone."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found: list[tuple] = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            length = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            if event.HasField("session_log"):
                found = [entry for entry in found if entry[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


@pytest.mark.parametrize("starts", [((None, (1, 2, 3)), (2, (3, 4))), ((None, (1, 2)), (None, (1, 2, 3, 4)))])
def test_tensorboard_hides_what_a_killed_process_wrote_after_the_checkpoint(tmp_path, starts):
    for resume, steps in starts:
        writers = metrics.open_writers(tmp_path, ["tensorboard"], resume_step=resume)
        for writer in writers:
            for step in steps:
                writer.write(step, {"loss": float(step), "eval_loss": 0.5})
            writer.close()
    assert [entry for entry in events(tmp_path / "tensorboard") if entry[1] == "train/loss"] == [
        (step, "train/loss", float(step)) for step in (1, 2, 3, 4)
    ]
    assert [record["step"] for record in written(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_wandb_continues_under_its_id(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, record, step):
            calls.append((record, step))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.init = lambda **settings: calls.append(settings) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume in (None, 3):
        writers = metrics.open_writers(tmp_path, ["wandb"], resume_step=resume, name="trial", config={"beta": 0.1})
        for writer in writers:
            writer.write(3, {"eval_loss": 1.0})
            writer.close(failed=resume is None)
    first, logged, failed, second, _, finished = calls
    assert logged == ({"eval/loss": 1.0, "train/global_step": 3}, 3)
    assert (failed, finished) == (("finish", 1), ("finish", 0))
    assert first["project"] == "jaxalign" and first["name"] == "trial"
    assert first == second and first["resume"] == "allow" and first["config"] == {"beta": 0.1}
    assert first["id"] == (tmp_path / "wandb_id").read_text()


def test_trackers_that_are_unknown_or_missing_are_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tensorbord is unknown; choose from tensorboard, wandb"):
        metrics.open_writers(tmp_path, ["tensorbord"])
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb, which is not installed"):
        metrics.open_writers(tmp_path, ["wandb"])


def test_sums_of_means_merge_exactly():
    """Per pair and per token: (3 + 1) / 4 pairs + (10 + 2) / 8 tokens, not the mean of the parts' sums."""
    parts = [Sum((Mean(3.0, 1.0), Mean(10.0, 4.0))), Sum((Mean(1.0, 3.0), Mean(2.0, 4.0)))]
    interval = Interval().add({"loss": parts[0]})
    interval = Interval.from_json(json.loads(json.dumps(interval.to_json()))).add({"loss": parts[1]})
    assert interval.values() == {"loss": 2.5}
    assert Interval().add({"loss": Sum((Mean(0.0, 0.0), Mean(3.0, 2.0)))}).values() == {"loss": 1.5}
    assert Interval().add({"loss": Sum((Mean(0.0, 0.0),))}).values() == {}
