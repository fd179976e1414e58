"""Runs with an adapter: every method, exact resume, both exports, continued adapters, and what a user gets wrong."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jaxalign import models
from jaxalign.cli import app
from jaxalign.config import parse_config
from jaxalign.models.peft import WEIGHTS_FILE
from jaxalign.run import evaluate_stage, pick_stage, prepare, run
from jaxalign.run import stage as stage_module
from jaxalign.run import start as start_module
from jaxalign.run.adapting import adapt
from tests.run.test_bad_input import changed_model
from tests.run.test_resume import lines, weights

PROMPTED = {"num_generations": 2, "max_completion_length": 6}


def trained(folder: Path) -> list[dict]:
    return [line for line in lines(folder) if "loss" in line]


@pytest.fixture
def lora(settings):
    """The run of one DPO stage, short, with an adapter of rank 4."""
    train = {**settings["train"], "max_steps": 4, "save_steps": 2}
    return settings | {"lora": {"r": 4}, "train": train, "log": {"logging_steps": 1}}


@pytest.mark.slow
def test_a_dpo_run_resumes_exactly_and_exports_both(lora, monkeypatch, tmp_path, capsys):
    """Stopped after its first save; only the adapter is in the checkpoint."""
    whole = run(parse_config(lora | {"name": "whole"}))
    first = trained(whole.folder)[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    save = stage_module.Checkpoints.save

    def save_and_stop(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        self.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_module.Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(parse_config(lora))
    monkeypatch.setattr(stage_module.Checkpoints, "save", save)
    folder = Path(lora["runs_dir"]) / "run"
    metadata = (folder / "checkpoints" / "2" / "state" / "_METADATA").read_text()
    assert "'lora'" in metadata and "embedding" not in metadata
    again = run(parse_config(lora))
    assert lines(folder) == lines(whole.folder)
    assert weights(folder) == weights(whole.folder)
    # The export is the base with the adapter merged, which is what the adapter's own folder means.
    export, adapter = (models.load(folder / name)[1] for name in ("export", "adapter"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), export, adapter)
    base = models.load(lora["model"]["path"])[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), base["params"], export["params"])
    assert moved["embed"]["embedding"] == 0 and moved["segment_0"]["block_0"]["mlp"]["up"]["kernel"] > 0
    stage = pick_stage(parse_config(lora), None)
    judged = evaluate_stage(stage, str(again.stages[0].export), say=lambda line: None)
    last = next(line for line in reversed(lines(folder)) if "eval_loss" in line)
    assert judged["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)

    def command(*arguments):
        result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    monkeypatch.setattr("jaxalign.cli._keep_compiled", lambda: None)
    command("convert", folder / "adapter", tmp_path / "full")
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "full")[1], adapter)
    command("sample", folder / "adapter", "--prompt", "the cat", "--max-new-tokens", 3)


@pytest.mark.slow
def test_an_adapter_goes_on_from_a_folder(lora):
    """The reference then begins with it too; a base that is an adapter's folder has it merged."""
    first = run(parse_config(lora | {"name": "first"}))
    adapter = str(first.folder / "adapter")
    lora["lora"] = {"path": adapter}
    lora["method"] = {"name": "preference", "precompute_ref_log_probs": True}
    second = run(parse_config(lora | {"name": "second"}))
    assert trained(second.folder)[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert json.loads((second.folder / "adapter" / "adapter_config.json").read_text())["r"] == 4
    old, new = (
        load_file(Path(folder) / "adapter_model.safetensors") for folder in (adapter, second.folder / "adapter")
    )
    assert old.keys() == new.keys() and any((old[name] != new[name]).any() for name in old)
    stacked = lora | {"name": "stacked", "model": {"path": adapter}, "lora": {"r": 2}}
    third = run(parse_config(stacked))
    assert trained(third.folder)[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    with pytest.raises(ValueError, match=r"lora.r=8, but the adapter in .* has 4; leave it away"):
        run(parse_config(lora | {"name": "wrong", "lora": {"path": adapter, "r": 8}}))


def test_an_adapter_for_another_base(lora, tiny, tmp_path, caplog):
    """Of other shapes it is refused; where they fit, only the name tells."""
    ready = prepare(parse_config(lora).stages[0])
    variables = adapt(ready.stage, ready.model.config, models.load(tiny)[1], jax.random.key(0))
    folder = models.save_adapter(tmp_path / "adapter", ready.model.config, variables, base_model="someone/else")
    with pytest.raises(ValueError, match=r"lora\.path: .* in the base .*: the adapter was made for another base"):
        other = changed_model(tiny, tmp_path, config={"intermediate_size": 48})
        prepare(parse_config(lora | {"lora": {"path": str(folder)}, "model": {"path": other}}).stages[0])
    assert not caplog.records
    prepare(parse_config(lora | {"lora": {"path": str(folder)}}).stages[0])
    assert "was made for someone/else, and model.path is" in caplog.text
    rewrite = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace("mlp.up_proj", "mlp.w3"): each for name, each in rewrite.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"lora\.path: .*model\.layers\.0\.mlp\.w3 is no linear module of this base"):
        prepare(parse_config(lora | {"lora": {"path": str(folder)}}).stages[0])


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_over_quantised_weights(kind, lora):
    lora["model"] |= {"quantization": kind}
    result = run(parse_config(lora))
    first = trained(result.folder)[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    # The export is in full, equal to what was trained with: it is judged as the stage judged itself.
    stage = pick_stage(parse_config(lora | {"model": {"path": lora["model"]["path"]}}), None)
    judged = evaluate_stage(stage, str(result.stages[0].export), say=lambda line: None)
    last = next(line for line in reversed(lines(result.folder)) if "eval_loss" in line)
    # The rewards differ by the reference, which here is not quantised; the policy's own log-probs do not.
    assert judged["logps/chosen"] == pytest.approx(last["eval_logps/chosen"], rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "reward"},
        {"name": "grpo", "beta": 0.1, "num_iterations": 2, **PROMPTED},
        {"name": "ppo", "num_ppo_epochs": 2, **PROMPTED},
        {"name": "ppo", "critic": "shared", "num_ppo_epochs": 1, **PROMPTED},
        {"name": "online_preference", **PROMPTED},
    ],
    ids=["reward", "grpo", "ppo", "ppo shared", "online_preference"],
)
def test_other_methods(method, lora, tmp_path, monkeypatch):
    """They train an adapter, load the base once, resume with it, and export a whole model that has moved."""
    loads = []
    load = start_module.load_policy
    monkeypatch.setattr(start_module, "load_policy", lambda ready, path: loads.append(path) or load(ready, path))
    lora["method"] = method
    if method["name"] != "reward":
        # Completions of the tiny model are of one length: what is rewarded must tell them apart.
        rewards = tmp_path / "rewards.py"
        rewards.write_text(
            "def varied(completion_ids, **columns):\n    return [sum(ids) % 11 for ids in completion_ids]\n"
        )
        lora |= {"rollout": {"rewards": [{"name": f"{rewards}:varied"}]}}
        lora["train"] = {"batch_size": 2, "max_steps": 2, "save_steps": 1}
        lora["data"] = {**lora["data"], "eval_ratio": None}
    lora["train"] = {**lora["train"], "max_steps": 2}
    result = run(parse_config(lora))
    assert len(loads) == 1
    config = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == (["score"] if method["name"] == "reward" else None)
    shutil.rmtree(result.folder / "export")
    again = run(parse_config(lora)).stages[0].export
    assert again is not None and len(loads) == 2  # the base is no part of a checkpoint
    after, before = models.load(again)[1]["params"], models.load(lora["model"]["path"])[1]["params"]
    up = [params["segment_0"]["block_0"]["mlp"]["up"]["kernel"] for params in (before, after)]
    assert np.abs(up[0] - up[1]).max() > 0
    np.testing.assert_array_equal(before["embed"]["embedding"], after["embed"]["embedding"])


def test_some_parameters_train(lora):
    del lora["lora"]
    lora["model"] |= {"trainable": ["model.layers.1.*"]}
    result = run(parse_config(lora))
    assert trained(result.folder)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    shutil.rmtree(result.folder / "export")
    run(parse_config(lora))
    before, after = (models.load(path)[1]["params"] for path in (lora["model"]["path"], result.folder / "export"))
    moved = jax.tree.map(lambda a, b: np.abs(a - b), before, after)
    kernel = moved["segment_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel[0].max() == 0 and kernel[1].max() > 0 and moved["embed"]["embedding"].max() == 0
    metadata = (result.folder / "checkpoints" / "4" / "state" / "_METADATA").read_text()
    assert "embedding" not in metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lora": {"target_modules": ["q_porj"]}},
            "lora.target_modules: 'q_porj' is no module .* is 'q_proj'",
        ),
        ({"lora": {"target_modules": ["lm_head"]}}, "lora.target_modules: 'lm_head' has no adapter here"),
        ({"lora": {"rank": 4}}, "lora.rank: unknown key"),
        ({"lora": {"lora_alpha": 4}}, "lora.lora_alpha: unknown key; here it is lora.alpha"),
        ({"lora": {"r": 0}}, "r=0 must be at least 1"),
        ({"lora": {"path": "nowhere"}}, "lora.path: nowhere has no adapter_config.json"),
        (
            {"lora": None, "model": {"quantization": "nf4"}},
            "model.quantization: .* is quantised, and quantised",
        ),
        ({"lora": None, "model": {"quantization": "int4"}}, "model.quantization"),
        (
            {"lora": None, "model": {"trainable": ["model.layer.*"]}},
            "model.trainable: .* matches no param",
        ),
        ({"lora": None, "model": {"trainable": []}}, "trainable: at least one pattern"),
        ({"model": {"trainable": ["*"]}}, "model.trainable: with the section lora the adapter trains"),
    ],
)
def test_mistakes_show_before_anything_is_loaded(change, message, lora):
    lora |= {key: {**lora[key], **value} if key == "model" else value for key, value in change.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(parse_config(lora))
    assert not (Path(lora["runs_dir"]) / "run").exists()
