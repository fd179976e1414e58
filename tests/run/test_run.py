"""From folder to folder: stages, references, evaluation, best checkpoint, early stopping, export, eval, convert."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxalign import models
from jaxalign.cli import app
from jaxalign.config import parse_config
from jaxalign.run import evaluate_stage, exported, pick_stage, run

DPO = {f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
DPO |= {"rewards/accuracies", "rewards/margins", "entropy", "mean_token_accuracy"}
COMMON = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens"}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sft_then_dpo(settings):
    settings["stages"] = [
        {"name": "sft", "method": {"name": "sft"}, "data": {"columns": {"completion": "chosen"}}},
        {"name": "dpo", "method": {"name": "preference"}, "model": {"path": "sft.policy"}},
    ]
    del settings["method"]
    settings["log"]["sample_steps"] = 4
    result = run(parse_config(settings))
    sft, dpo = (stage.folder for stage in result.stages)
    trained, evaluated = lines(dpo)[0], next(line for line in lines(dpo) if "eval_loss" in line)
    assert trained.keys() >= DPO | COMMON
    assert evaluated.keys() >= {f"eval_{name}" for name in DPO}
    assert lines(sft)[0].keys() >= COMMON | {"entropy", "mean_token_accuracy"}
    # The first two steps see the policy before it has moved much from the reference: SFT's policy, not the base.
    assert trained["loss"] == pytest.approx(np.log(2), abs=0.1)
    samples = [json.loads(line) for line in (dpo / "samples.jsonl").read_text().splitlines()]
    assert [each["step"] for each in samples] == [4] * 3 + [8] * 3
    assert all("<|im_start|>assistant" in each["prompt"] for each in samples)
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["stages"]["dpo"]["policy"]["from"] == str(sft / "export")
    assert manifest["stages"]["dpo"]["policy"]["sha256"] == models.fingerprint(sft / "export")
    model, variables = models.load(exported(str(result.folder)))
    assert jax.tree.structure(models.load(settings["model"]["path"])[1]) == jax.tree.structure(variables)
    assert model.config.eos_ids == (2,)
    card = (dpo / "export" / "README.md").read_text()
    assert f"# {result.folder.name}\n" in card and str(result.folder.parent) not in card and "base_model" not in card


def test_precomputed_and_live_references_agree_and_the_cache_is_used(settings, tmp_path):
    live = run(parse_config(settings))
    settings |= {"name": "precomputed", "method": {"name": "preference", "precompute_ref_log_probs": True}}
    settings["model"]["reference_cache"] = str(tmp_path / "shared")
    cached = run(parse_config(settings))
    for one, other in zip(lines(live.folder), lines(cached.folder), strict=True):
        # While the policy still is the reference, which of two equal rewards is larger is a matter of rounding.
        moved = {"rewards/accuracies"} if one["step"] < 4 else set()
        for name in ((DPO | {"loss"}) & one.keys()) - moved:
            assert other[name] == pytest.approx(one[name], abs=2e-4), name
    assert len(list((tmp_path / "shared").iterdir())) == 2  # training and evaluation data


@pytest.mark.slow
def test_meshes_train_alike(settings):
    losses = []
    for name, mesh in {"a": {"data": 8}, "b": {"data": 1, "fsdp": 4, "tensor": 2}}.items():
        result = run(parse_config({**settings, "name": name, "mesh": mesh}))
        losses.append([line["loss"] for line in lines(result.folder) if "loss" in line])
    np.testing.assert_allclose(*losses, atol=1e-4)


def test_early_stopping_gives_back_the_best(settings):
    settings["optimizer"]["learning_rate"] = 0.5  # makes everything worse
    settings["train"] |= {
        "max_steps": 30,
        "eval_steps": 1,
        "early_stopping_patience": 2,
        "metric_for_best_model": "eval_loss",
    }
    result = run(parse_config(settings))
    assert result.stages[0].reason == "early_stopped"
    evaluations = {line["step"]: line["eval_loss"] for line in lines(result.folder) if "eval_loss" in line}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert len(evaluations) == best + 2
    stage = pick_stage(parse_config(settings), None)
    again = evaluate_stage(stage, str(result.stages[0].export), say=lambda line: None)
    assert again["loss"] == pytest.approx(evaluations[best], rel=1e-4)


def test_commands(settings, write_config, tmp_path, tiny, pairs, monkeypatch):
    monkeypatch.setattr("jaxalign.cli._keep_compiled", lambda: None)
    config, runner = str(write_config(settings)), CliRunner()

    def command(*arguments):
        result = runner.invoke(app, [str(each) for each in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "every row can be trained on" in command("data", "check", config)
    assert "completed" in command("run", config, "train.max_steps=2")
    metrics = tmp_path / "metrics.json"
    command("eval", config, "--model", tmp_path / "runs" / "run", "--output", metrics)
    assert json.loads(metrics.read_text()).keys() >= DPO | {"loss"}
    command("convert", tmp_path / "runs" / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert models.load(tmp_path / "out")[0].config == models.load(tiny)[0].config
    command("sample", tiny, "--prompts", pairs, "--max-new-tokens", 5, "--output", tmp_path / "answers.jsonl")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 45
    assert command("sample", tiny, "--prompt", "the cat", "--max-new-tokens", 5, "--temperature", 0, "--stop", "zzz")
    assert "quickstart" in command("configs", "list")
    command("configs", "copy", "quickstart", tmp_path)
    assert (tmp_path / "quickstart.yaml").is_file()
