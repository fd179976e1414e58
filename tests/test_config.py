"""YAML and overrides become a run, or a message that says which key is wrong and what it should be."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxalign.config import (
    SECTIONS,
    config_text,
    difference,
    load_config,
    parse_config,
    read_config_text,
    shipped_configs,
)
from jaxalign.foreign_names import FOREIGN_NAMES
from jaxalign.methods import METHODS

RAW = {
    "model": {"path": "some/model"},
    "data": {"path": "train.jsonl"},
    "method": {"name": "preference", "beta": 0.2},
    "optimizer": {"learning_rate": "1e-5"},  # YAML 1.1 reads 1e-5 as text
}
STAGES = {
    "model": {"path": "some/model"},
    "data": {"path": "train.jsonl"},
    "train": {"batch_size": 4},
    "stages": [
        {"name": "sft", "method": {"name": "sft"}, "train": {"num_train_epochs": 2}},
        {"name": "dpo", "method": {"name": "preference"}, "model": {"path": "sft.policy"}},
    ],
}


def change(raw, where, value):
    *parents, last = where.split(".")
    copy = {**raw}
    inner = copy
    for name in parents:
        inner[name] = dict(inner.get(name, {}))
        inner = inner[name]
    inner[last] = value
    return copy


def test_defaults_and_types():
    stage = parse_config(RAW).stages[0]
    assert (stage.method.beta, stage.method.loss_type, stage.optimizer.learning_rate) == (0.2, "sigmoid", 1e-5)
    assert parse_config(change(RAW, "optimizer", {})).stages[0].optimizer.learning_rate == 1e-6  # preference's own
    assert parse_config(change(RAW, "method", {"name": "sft"})).stages[0].optimizer.learning_rate == 1e-5


def test_stages_inherit_and_override():
    first, second = parse_config(STAGES).stages
    assert (first.train.batch_size, first.train.num_train_epochs) == (4, 2)
    assert (second.train.batch_size, second.train.num_train_epochs) == (4, 3)
    assert second.model.path == "sft.policy"


def test_resolved_config_is_itself_a_config():
    for raw in (RAW, STAGES):
        once = parse_config(raw)
        again = parse_config(read_config_text(config_text(once.resolved)))
        assert again == once
        assert difference(once.resolved, again.resolved) == []


def test_differences_are_named():
    other = parse_config(change(RAW, "method.beta", 0.3))
    assert difference(parse_config(RAW).resolved, other.resolved) == ["method.beta: 0.2 there, 0.3 here"]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("method.betta", 1, r"method\.betta: unknown key; did you mean 'beta'"),
        ("modle", {}, r"modle: unknown key; did you mean 'model'"),
        ("train.learning_rate", 1, r"train\.learning_rate: unknown key; it belongs to optimizer"),
        ("train.per_device_train_batch_size", 1, r"here it is train\.batch_size"),
        ("method.cliprange", 0.2, r"method\.cliprange: unknown key; here it is method\.epsilon$"),
        ("method.scale_rewards", "group", r"here it is method\.advantage$"),
        ("method.reward_funcs", [], r"here it is rollout\.rewards"),
        ("train.total_episodes", 1000, r"here it is train\.max_steps"),
        ("method.name", "ppo2", r"method\.name: 'ppo2' is not a method; known: sft, preference"),
        ("method.loss_type", "sigmoidal", r"method.*loss_type 'sigmoidal' is unknown; known: sigmoid"),
        ("method.beta", "much", r"method\.beta: .*'much'"),
        ("method.beta", -1, r"beta=-1.0 must be greater than 0"),
        ("train.batch_size", "eight", r"train\.batch_size: .*'eight'"),
        ("train.micro_batch_size", 3, r"train\.micro_batch_size=3 must divide train\.batch_size=8"),
        ("model.param_dtype", "float8", r"model\.param_dtype: .*float32"),
        ("model", {}, r"model\.path"),
        ("data", "train.jsonl", r"data: a mapping of keys"),
        ("log.report_to", ["mlflow"], r"log\.report_to"),
        ("method", "sft", r"method: a mapping of keys"),
        ("optimizer", "adamw", r"optimizer: a mapping of keys"),
        ("train.save_total_limit", 0, r"train\.save_total_limit=0 must be at least 1"),
        ("log.sample_prompts", 0, r"log\.sample_prompts=0 must be at least 1"),
    ],
)
def test_wrong_settings(where, value, message):
    with pytest.raises(ValueError, match=message):
        parse_config(change(RAW, where, value))


def test_names_of_other_trainers_lead_to_keys_that_there_are():
    """No such name is a key of a section or a method itself, or it would be refused where it is right."""
    ours = {section: {each.name for each in dataclasses.fields(kind)} for section, kind in SECTIONS.items()}
    ours["method"] = {each.name for method in METHODS.values() for each in dataclasses.fields(method.Config)}
    for name, here in FOREIGN_NAMES.items():
        where = [section for section, keys in ours.items() if name in keys]
        assert where == (["export"] if name == "dtype" else []), name
        named = re.findall(r"\b(\w+)\.(\w+)", here)
        assert named or here.startswith(("nothing", "the section", "name")), here
        for section, key in named:
            assert section == "runs_dir" or key in ours[section], (name, here)
    for name in ("cliprange_value", "lam", "response_length", "stop_token", "reward_model_path", "sft_model_path"):
        with pytest.raises(
            ValueError, match=f"method.{name}: unknown key; here it is {re.escape(FOREIGN_NAMES[name])}"
        ):
            parse_config(change(RAW, f"method.{name}", 1))


def test_stages_must_have_names_and_name_earlier_ones():
    with pytest.raises(ValueError, match=r"stages\[1\]\.name"):
        parse_config({**STAGES, "stages": [STAGES["stages"][0], {**STAGES["stages"][1], "name": "sft"}]})
    with pytest.raises(ValueError, match=r"stages\.dpo\.model\.path: 'sft\.policy' names no earlier stage"):
        parse_config({**STAGES, "stages": STAGES["stages"][1:]})


def test_files_and_overrides(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(config_text(STAGES))
    config = load_config(path, ["train.batch_size=16", "stages.dpo.method.beta=0.5", "name=other"])
    assert [stage.train.batch_size for stage in config.stages] == [16, 16]
    assert config.stages[1].method.beta == 0.5
    assert config.name == "other"
    assert load_config(path).name == "run"
    with pytest.raises(ValueError, match=r"there is no stage 'ppo'"):
        load_config(path, ["stages.ppo.method.beta=1"])
    with pytest.raises(ValueError, match=r"run\.yaml: train\.batch_sise: unknown key; did you mean 'batch_size'"):
        load_config(path, ["train.batch_sise=16"])
    with pytest.raises(ValueError, match=r"written a\.b=value"):
        load_config(path, ["--batch_size"])
    with pytest.raises(FileNotFoundError, match="no such config"):
        load_config(tmp_path / "absent.yaml")
    path.write_text("model: [unclosed")
    with pytest.raises(ValueError, match=r"run\.yaml: not YAML"):
        load_config(path)


def test_shipped_configs_are_found():
    names = shipped_configs()
    assert "quickstart" in names
