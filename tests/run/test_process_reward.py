"""A process reward model through a run: from a policy to a token classifier, and what makes no sense for one."""

import json

import numpy as np
import pytest

from jaxalign import data, models
from jaxalign.config import parse_config
from jaxalign.methods.process_reward import score_steps
from jaxalign.run import run
from tests.run.conftest import TEXT
from tests.run.test_run import COMMON, lines

METRICS = {"accuracy", "accuracy/right", "accuracy/wrong"}


@pytest.fixture(scope="session")
def steps(tmp_path_factory):
    """40 completions of 1 to 4 steps; a step is right where it speaks of the cat."""
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(40):
        labels = (rng.random(rng.integers(1, 5)) < 0.5).tolist()
        texts = [" ".join([*rng.choice(TEXT.split()[6:], 3), "cat" if label else "river"]) for label in labels]
        rows.append({"prompt": "the old house", "completions": texts, "labels": labels})
    path = tmp_path_factory.mktemp("data") / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_from_a_policy_to_a_token_classifier(settings, steps):
    settings["data"]["path"] = str(steps)
    settings["method"] = {"name": "process_reward", "train_on_last_step_only": False}
    settings["train"] |= {"max_steps": 16, "eval_steps": 16, "metric_for_best_model": "eval_accuracy"}
    result = run(parse_config(settings))
    trained, evaluated = lines(result.folder)[0], next(line for line in lines(result.folder) if "eval_loss" in line)
    assert trained.keys() >= METRICS | COMMON and evaluated.keys() >= {f"eval_{name}" for name in METRICS}
    folder = result.folder / "export"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForTokenClassification"]
    assert evaluated["eval_accuracy"] > 0.9
    examples = data.load(data.DataConfig(str(steps)), models.load_tokenizer(folder), "stepwise").train
    right = score_steps(*models.load(folder), list(examples))
    hits = [(p > 0.5) == (e["labels"] == 1) for p, e in zip(right, examples, strict=True)]
    assert np.concatenate(hits).mean() > 0.9
    # It goes on as what it is, and as nothing else.
    settings |= {"name": "other", "model": {"path": str(folder)}, "method": {"name": "reward"}}
    with pytest.raises(ValueError, match="num_labels=2; reward trains one with 1"):
        run(parse_config(settings))


def test_bad_steps_are_named_by_file_and_line(settings, tmp_path):
    path = tmp_path / "steps.jsonl"
    rows = [
        {"prompt": "the", "completions": ["cat"], "labels": [True]},
        {"prompt": "the", "completions": ["cat", "mat"], "labels": [True]},
        {"prompt": "the", "completions": ["cat"], "labels": ["yes"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["data"] = {"path": str(path), "max_length": 128}
    settings["method"] = {"name": "process_reward"}
    with pytest.raises(ValueError, match=r"steps.jsonl:2: wrong number: .*\n.*steps.jsonl:3: wrong type"):
        run(parse_config(settings))


@pytest.mark.parametrize(("label", "words"), [(True, r"right \(true\)"), (False, r"wrong \(false\)")])
def test_steps_that_are_all_alike_teach_nothing(settings, tmp_path, label, words):
    path = tmp_path / "steps.jsonl"
    rows = [{"prompt": "the", "completions": ["cat", "mat"][:n], "labels": [label] * n} for n in (1, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["data"] = {"path": str(path), "max_length": 128}
    settings["method"] = {"name": "process_reward"}
    with pytest.raises(
        ValueError, match=rf"steps of all 2 examples are {words}, the first is .*steps\.jsonl:1; .*labels"
    ):
        run(parse_config(settings))
