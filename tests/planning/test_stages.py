"""A run of several stages: each is planned from what those before it will export, which is not there."""

import json
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from jaxalign import models
from jaxalign.cli import app
from jaxalign.config import load_config
from jaxalign.planning import plan, planned_stages
from tests.planned import PARAMETERS, offline


def write(tmp_path, bare, *stages):
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump({**offline(bare, None), "method": None, "stages": list(stages)}))
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if v is not None}))
    return path


SFT = {"name": "sft", "method": {"name": "sft"}, "data": {"path": "(none)"}}
REWARD = {"name": "judge", "model": {"path": "sft.policy"}, "method": {"name": "reward"}, "data": {"path": "(none)"}}
PPO = {
    "name": "ppo",
    "model": {"path": "sft.policy", "critic": "judge.reward"},
    "method": {"name": "ppo", "max_completion_length": 16},
    "data": {"path": "(none)", "max_length": 64, "max_prompt_length": 32},
    "rollout": {"rewards": [{"model": "judge.reward"}]},
    "export": {"critic": True},
}
AGAIN = {**PPO, "name": "again", "model": {"path": "ppo.policy", "critic": "ppo.critic"}}


def test_a_stage_takes_the_shapes_of_those_before(bare, tmp_path):
    config = load_config(write(tmp_path, bare, SFT, REWARD, PPO, AGAIN), data_needed=False)
    (tmp_path / "all").mkdir()
    made = {stage.name: (stage, ready) for stage, ready, _ in planned_stages(config, None, tmp_path / "all")}
    assert list(made) == ["sft", "judge", "ppo", "again"]
    stage, ready = made["ppo"]
    assert stage.model.path == str(tmp_path / "all" / "sft" / "export")
    assert ready.model.config == replace(made["sft"][1].model.config, lora=None)
    for path in (stage.rollout.rewards[0].model, stage.model.critic, made["again"][0].model.critic):
        scorer = models.load_config(path or "")
        assert scorer.score_head and not scorer.lm_head
        assert scorer.embed_dim == ready.model.config.embed_dim
    # A stage alone needs only what it builds on.
    (tmp_path / "one").mkdir()
    assert [stage.name for stage, *_ in planned_stages(config, None, tmp_path / "one", "judge")] == ["judge"]
    assert [each.name for each in (tmp_path / "one").iterdir()] == ["sft"]
    with pytest.raises(ValueError, match="there is no stage 'dpo'; there are: sft, judge, ppo, again"):
        list(planned_stages(config, None, tmp_path / "one", "dpo"))


def test_the_verdict_is_that_of_all_stages(bare, tmp_path, monkeypatch):
    """The second stage has a reference beside the policy, for which there is no room."""
    dpo = {"name": "dpo", "model": {"path": "sft.policy"}, "method": {"name": "preference"}, "data": {"path": "(none)"}}
    path, output = write(tmp_path, bare, SFT, dpo), tmp_path / "plan.json"
    command = ["plan", str(path), "--json", str(output), "--neighbours", "0"]
    known = plan.chip_of

    def run(*more):
        return CliRunner().invoke(app, [*command, *more], catch_exceptions=False).exit_code, json.loads(
            output.read_text()
        )

    status, whole = run()
    assert (status, whole["fits"]) == (0, True)
    assert [each["stage"] for each in whole["stages"]] == ["sft", "dpo"]
    assert whole["stages"][1]["programs"][-1]["memory"]["models"] == PARAMETERS
    peaks = [each["peak"] for each in whole["stages"]]
    assert peaks[0] < peaks[1]
    monkeypatch.setattr(plan, "chip_of", lambda device: replace(known(device), memory=sum(peaks) / 2))
    status, found = run()
    assert (status, found["fits"]) == (1, False)
    assert [each["fits"] for each in found["stages"]] == [True, False]
    status, found = run("--stage", "sft")
    assert (status, [each["stage"] for each in found["stages"]]) == (0, ["sft"])
