"""Runs over mixtures and streams: killed and resumed exactly; what is left out, in files and on the command line."""

import contextlib
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from jaxalign.cli import app
from jaxalign.config import parse_config
from jaxalign.data import MixtureOrder
from jaxalign.methods.mixing import Order
from jaxalign.run import prepare, run
from tests.run.conftest import TEXT, finish, wait_until
from tests.run.test_resume import lines, logged, weights

TALK = "\n\nHuman: {}\n\nAssistant: {}"


@pytest.fixture
def parts(tmp_path) -> dict[str, str]:
    """Look-alikes of three sets, ragged: sums, dialogues (one of them twice), instructions (one of them broken)."""
    rng = np.random.default_rng(5)

    def words(low, high):
        return " ".join(rng.choice(TEXT.split(), rng.integers(low, high)))

    dialogues = [(words(2, 12), words(1, 9)) for _ in range(8)]
    rows = {
        "sums": [{"question": f"{i} and {i + 1}?", "answer": f"{words(0, 9)}\n#### {2 * i + 1}"} for i in range(20)],
        "dialogues": [
            {"chosen": TALK.format(asked, said), "rejected": TALK.format(asked, "no")}
            for asked, said in [*dialogues, (dialogues[2][0].upper(), dialogues[2][1])]
        ],
        "instructions": [
            {"instruction": words(1, 6), "input": words(0, 3), "output": words(1, 12) if i != 3 else ""}
            for i in range(7)
        ],
    }
    paths = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def mixed(settings, parts) -> dict:
    """An SFT run over the three, half of it sums."""
    columns = {"prompt": "question", "completion": "answer"}
    settings["data"] = {
        "max_length": 128,
        "on_bad": "drop",
        "mixture": [
            {"path": parts["sums"], "weight": 0.5, "label": "sums", "format": "chat", "columns": columns},
            {"path": parts["dialogues"], "weight": 0.25, "label": "dialogues", "format": "hh"},
            {"path": parts["instructions"], "weight": 0.25, "label": "instructions"},
        ],
    }
    settings["method"] = {"name": "sft"}
    settings["train"] = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 8, "save_steps": 2}
    settings["log"]["logging_steps"] = 1
    return settings


class Killed(Exception):
    """As if the process had ended."""


def killer(at: int):
    """A progress bar that ends the run after a step."""

    @contextlib.contextmanager
    def make(steps, done, title):
        def progress(step, metrics):
            if step == at:
                raise Killed

        yield progress

    return make


def removed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_mixture_of_three_kinds_is_resumed_exactly(mixed, streaming):
    if streaming:
        mixed["data"] |= {"streaming": True, "shuffle_window": 10}
    else:
        mixed["data"]["filters"] = {"deduplicate": "example"}
    whole = run(parse_config({**mixed, "name": "whole"})).folder
    broken = parse_config({**mixed, "name": "broken"})
    with pytest.raises(Killed):
        run(broken, make_progress=killer(5))
    again = run(broken).folder
    assert lines(again) == lines(whole) and weights(again) == weights(whole)
    assert (again / "removed.jsonl").read_bytes() == (whole / "removed.jsonl").read_bytes()
    parts = json.loads((whole / "manifest.json").read_text())["stages"]["whole"]["parts"]
    if streaming:
        # 64 examples, of them 16 instructions, of which a pass has 6: at least two passes met the broken one.
        found = removed(whole)
        assert {(Path(each["file"]).name, each["line"], each["filter"]) for each in found} == {
            ("instructions.jsonl", 4, "problem")
        }
        assert [line["dropped_rows"] for line in lines(whole) if "loss" in line][-1] == len(found) >= 2
    else:
        # Good ones are 20, 8 (the ninth was a duplicate) and 6; n/p is 40, 32 and 24, so an epoch has 20 + 10 + 10.
        assert {name: (each["used"], each["per_epoch"]) for name, each in parts.items()} == {
            "sums": (20, 20),
            "dialogues": (8, 10),
            "instructions": (6, 10),
        }
        assert [(Path(each["file"]).name, each["line"], each["filter"]) for each in removed(whole)] == [
            ("instructions.jsonl", 4, "problem"),
            ("dialogues.jsonl", 9, "duplicates"),
        ]
        assert [line["epoch"] for line in lines(whole) if "loss" in line][:5] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_data_check(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    mixed["data"] |= {"filters": {"deduplicate": "example"}}
    config, out = tmp_path / "mixed.yaml", tmp_path / "removed.jsonl"
    config.write_text(yaml.safe_dump(mixed))
    result = CliRunner().invoke(app, ["data", "check", str(config), "--removed", str(out)])
    assert result.exit_code == 1, result.output
    for line in (
        "train: 34 of 35 examples can be used",
        "filter duplicates: 1 training examples removed",
        "part sums: 20 of 20 examples, 50.0% of training, 20 per epoch",
        "part dialogues: 8 of 9 examples, 25.0% of training, 10 per epoch",
        "part instructions: 6 of 7 examples, 25.0% of training, 10 per epoch",
        "instructions.jsonl:4: empty completion: `completion` has no text",
        "1 rows cannot be trained on",
    ):
        assert line in result.output
    assert result.output.count("instructions.jsonl:4") == 1
    assert [line for line in result.output.splitlines() if "|" in line and "token(s) per bar, at most" in line]
    (only,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (Path(only["file"]).name, only["line"], only["filter"]) == ("dialogues.jsonl", 9, "duplicates")
    assert only["reason"].endswith("dialogues.jsonl:3 again") and only["row"]["chosen"].isupper() is False
    pairs = {"path": mixed["data"]["mixture"][1]["path"], "format": "hh", "max_length": 128}
    config.write_text(yaml.safe_dump({**mixed, "data": pairs, "method": {"name": "preference"}}))
    result = CliRunner().invoke(app, ["data", "check", str(config)])
    assert result.exit_code == 0 and "length bias: chosen is longer in " in result.output


def test_prompts_of_a_mixture_come_in_its_order():
    """Online methods: 6 and 2 prompts with equal weights make epochs of 6 + 6; the rollouts go through two of them."""
    order = MixtureOrder(np.repeat([0, 1], [6, 2]), [1, 1], seed=3)
    places, taken = Order(8, mixture=order), []
    for count in (5, 4, 9, 3):
        taken += places.take(len(taken), count).tolist()
    assert taken == [order[place] for place in range(21)]
    assert np.bincount(taken[:12], minlength=8).tolist() == [1] * 6 + [3, 3]


REFUSED = [
    ({"train": {"max_steps": -1}}, r"train\.max_steps is needed with data\.streaming"),
    (
        {"method": {"name": "preference", "precompute_ref_log_probs": True}, "data": {}},
        r"precompute_ref_log_probs does",
    ),
    (
        {"method": {"name": "reward", "normalize": True}, "data": {}},
        r"method\.normalize does not go with data\.streaming",
    ),
    ({"data": {"eval_ratio": 0.1}}, "eval_ratio does not go with streaming"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_a_stream_refuses(mixed, pairs, changes, message):
    mixed["data"] |= {"streaming": True}
    if "method" in changes:
        mixed["data"] = {"path": str(pairs), "streaming": True, "max_length": 128}
    for section, change in changes.items():
        mixed[section] = {**({} if section == "method" else mixed[section]), **change}
    with pytest.raises(ValueError, match=message):
        prepare(parse_config(mixed).stages[0])


def test_evaluation_steps_of_a_stream(mixed, parts):
    columns = {"prompt": "question", "completion": "answer"}
    mixed["data"] = {"path": parts["sums"], "eval_path": parts["sums"], "format": "chat", "columns": columns}
    mixed["data"] |= {"streaming": True, "max_length": 128}
    with pytest.raises(ValueError, match=r"train\.eval_steps is needed with data\.streaming"):
        prepare(parse_config(mixed).stages[0])
    mixed["train"]["eval_steps"] = 3
    ready = prepare(parse_config(mixed).stages[0])
    assert ready.layout.length >= 128 and ready.data.stream is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixture": [{"path": "a", "wieght": 1}]}, r"data\.mixture\[0\]\.wieght: unknown key; did you mean 'weight'"),
        (
            {"path": "a", "filters": {"min_margins": 1}},
            r"data\.filters\.min_margins: unknown key; did you mean 'min_ma",
        ),
        ({"path": "a", "filters": {"ngram": 0}}, r"data\.filters: ngram=0 must be at least 1"),
        ({"mixture": [{"path": "a", "weight": -1}]}, r"data\.mixture\[0\]: weight=-1\.0 must be positive"),
        ({"mixture": [{"weight": 1}]}, r"data\.mixture\[0\]\.path: "),
    ],
)
def test_mistakes_in_the_config(mixed, data, message):
    with pytest.raises(ValueError, match=message):
        parse_config({**mixed, "data": data})


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_the_process_is_killed_and_goes_on_exactly(mixed, streaming, write_config, cli):
    """SIGKILL at any moment, three times: parameters and metrics are those of a run that nothing disturbed."""
    if streaming:
        mixed["data"] |= {"streaming": True, "shuffle_window": 10}
    mixed["train"] |= {"max_steps": 30, "save_steps": 3}
    config, runs, chance = write_config(mixed), Path(mixed["runs_dir"]), random.Random(streaming)
    finish(cli("run", config, "name=whole"))
    folder, kills = runs / "killed", 0
    for _ in range(3):
        process, seen = cli("run", config, "name=killed"), logged(folder)
        got_there = wait_until(lambda seen=seen: logged(folder) > seen + 3, process)
        time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += got_there and process.returncode == -signal.SIGKILL
    assert kills >= 2, "the run ended before it could be killed"
    assert "continuing after step" in finish(cli("run", config, "name=killed"))
    assert lines(folder) == lines(runs / "whole") and weights(folder) == weights(runs / "whole")
    assert (folder / "removed.jsonl").read_bytes() == (runs / "whole" / "removed.jsonl").read_bytes()
