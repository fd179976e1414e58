"""`jaxalign plan`: the programs are those of the run, and its figures are what can be worked out by hand."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from jaxalign.cli import app
from jaxalign.models import load_config as load_model_config
from jaxalign.planning import plan_stage, prepare_plan
from jaxalign.planning.program import Program, device_bytes
from jaxalign.planning.programs import stage_programs
from jaxalign.planning.work import Work, forward_of_batch, generation_of
from jaxalign.types import Batch, Predictions, TokenRows
from tests.planned import (
    DIM,
    HEADS,
    KV,
    LAYERS,
    MATRICES,
    MLP,
    NORMS,
    PARAMETERS,
    VOCAB,
    WIDTH,
    offline,
    online,
    stage_of,
)


def test_memory_by_hand(bare, tmp_path):
    plan = plan_stage(stage_of(tmp_path, offline(bare, {"name": "preference"})))
    reference, step = plan.programs
    assert (reference.name, step.name) == ("reference pass", "train step")
    assert step.memory.parameters == PARAMETERS
    # AdamW: two moments; its two counters, the step's number and the key.
    assert step.memory.optimizer == 2 * PARAMETERS + 2 * 4 + 4 + 8
    # The reference is a copy of its own, there while the policy trains.
    assert step.memory.models == reference.memory.models == PARAMETERS
    # A batch of 2 micro-batches, one row of 192 tokens a device (64 of prompt and 2 x 63 read, in multiples of 32) ...
    assert plan.shape == (2, 8, 192)
    tokens, predictions = 2 * 1 * 192 * 4 * 4, 2 * 1 * 128 * 4 * 4
    # ... and every device knows which completions there are (2 x 16). The step is given what the reference says of each
    assert reference.memory.arguments == tokens + predictions + 2 * 16 * 4
    # prediction, and does not read their `steps`, so that these are no argument of it.
    assert step.memory.arguments == reference.memory.arguments
    assert step.memory.temporary > PARAMETERS  # gradients, at least
    # The head's product takes the gathered table and the hidden states of a row's chunk, at least.
    assert step.memory.workspace > 4 * VOCAB * WIDTH
    parts = ("parameters", "optimizer", "models", "arguments", "temporary", "workspace")
    assert step.memory.total == sum(getattr(step.memory, name) for name in parts)
    assert plan.peak == max(each.memory.total for each in plan.programs)


def test_flops_by_hand(bare):
    config = load_model_config(bare)
    # Two documents of 3 and 2 tokens and three cells of padding; a prediction for each of three tokens.
    documents, positions = np.array([[[1, 1, 1, 2, 2, 0, 0, 0]]]), np.array([[[0, 1, 2, 0, 1, 0, 0, 0]]])
    completions = np.array([[[0, 0, 1, -1]]])
    rows = TokenRows(documents, positions, documents, documents * 0)
    batch = Batch(rows, Predictions(completions, completions, completions, completions), np.ones((1, 2)))
    blocks = LAYERS * (WIDTH * DIM * (2 * HEADS + 2 * KV) + 3 * WIDTH * MLP)
    attended = (1 + 2 + 3) + (1 + 2)
    by_hand = 2 * blocks * 5 + 4 * LAYERS * HEADS * DIM * attended + 2 * VOCAB * WIDTH * 3
    assert forward_of_batch(config, batch).flops == by_hand
    windowed = replace(config, windows=(None, 2))
    assert forward_of_batch(windowed, batch).flops == by_hand - 4 * HEADS * DIM * 1  # one token sees a key less
    # A prompt of 3, two completions of 2: prefill reads 2 tokens, drawing reads 4, at 3 and 4 keys each.
    drawn = 2 * blocks * 6 + 4 * LAYERS * HEADS * DIM * (1 + 2 + 2 * (3 + 4)) + 2 * VOCAB * WIDTH * 4
    assert generation_of(config, np.array([3]), 2, 2).flops == drawn


def test_work_of_a_step(bare, tmp_path):
    full = stage_programs(prepare_plan(stage_of(tmp_path, offline(bare, {"name": "sft"})))[0])
    blocks = LAYERS * (WIDTH * DIM * (2 * HEADS + 2 * KV) + 3 * WIDTH * MLP)
    # 16 examples: 64 of 128 tokens are targets; the last is only a target and is not read.
    read, attended, targets = 16 * 127, 16 * 127 * 128 // 2, 16 * 64
    forward = 2 * blocks * read + 4 * LAYERS * HEADS * DIM * attended + 2 * VOCAB * WIDTH * targets
    assert full.programs[0].work == Work(3 * forward, 4 * forward, read)
    lora = {**offline(bare, {"name": "sft"}), "lora": {"r": 4}}
    lora["model"]["remat"] = "none"
    adapter = stage_programs(prepare_plan(stage_of(tmp_path, lora))[0])
    assert adapter.programs[0].work == Work(2 * forward, 2 * forward, read)
    # Adapters lie whole on every device, 4 numbers for each input and each output of the seven projections.
    ends = 2 * (WIDTH + HEADS * DIM) + 2 * (WIDTH + KV * DIM) + 3 * (WIDTH + MLP)
    assert device_bytes(adapter.held["parameters"]) == PARAMETERS + 4 * LAYERS * 4 * ends
    assert device_bytes(adapter.held["optimizer"]) == 2 * 4 * LAYERS * 4 * ends + 20


@pytest.mark.slow
def test_ppo_with_critic_and_reward_model(bare, tmp_path):
    scorer = str(bare.parent / "scorer")
    settings = online(bare, {"name": "ppo", "critic": "separate"}, rollout={"rewards": [{"model": scorer}]})
    settings["model"]["critic"] = scorer
    plan = plan_stage(stage_of(tmp_path, settings))
    names = ["decoding copy", "rollout", "reward model pass", "values pass", "ref_logps pass", "train step"]
    assert sorted(each.name for each in plan.programs) == sorted(names)
    found = {each.name: each for each in plan.programs}
    critic = PARAMETERS - 4 * VOCAB * WIDTH // 4 + 4 * WIDTH // 4  # a score head in the LM head's place
    assert found["train step"].memory.parameters == PARAMETERS + critic
    # Reference and reward model; while drawing also a whole copy of the policy, for each data shard decodes by itself.
    assert found["train step"].memory.models == PARAMETERS + critic
    assert found["rollout"].memory.models == PARAMETERS + critic + 4 * (MATRICES + NORMS)
    # A rollout of 8 prompts serves 4 epochs; keys and values of 16 cells a layer lie among the temporaries.
    assert found["rollout"].runs == 1 / 4
    assert found["rollout"].tokens == 8 * 16
    # One slot a shard, and a pool of one prompt; a position of 4 bytes beside each cell.
    cache = 2 * LAYERS * KV * DIM * 4 * (32 + 16 + 32) + 4 * (32 + 16 + 32)
    assert found["rollout"].memory.cache == cache < found["rollout"].memory.temporary
    assert found["train step"].memory.cache == 0
    assert sum(found["rollout"].parts.values()) == found["rollout"].flops
    # 31 tokens of each of 8 prompts are read, and attend to 496 keys a layer.
    block = WIDTH * DIM * (2 * HEADS + 2 * KV) + 3 * WIDTH * MLP
    assert found["rollout"].parts["prefill"] == LAYERS * (2 * block * 8 * 31 + 4 * HEADS * DIM * 8 * 496)


@pytest.mark.slow
def test_grpo_decodes_as_often_as_it_says(bare, tmp_path):
    rewards = {"rewards": [{"name": "regex", "options": {"pattern": "a"}}]}
    mesh = {"data": 1, "tensor": 4, "fsdp": 2}
    found = []
    for steps in (16, 32):
        method = {"name": "grpo", "num_generations": 2, "max_completion_length": steps}
        stage = stage_of(tmp_path, online(bare, method, rollout=rewards, mesh=mesh))
        found += plan_stage(stage, only={"rollout"}).programs
    short, long = found
    # The sums over `tensor` run per layer and token: twice the tokens, twice the sums, but for the prompt's.
    counts = [each.traffic.collectives["all-reduce"][0] for each in found]
    assert counts[1] > 1.7 * counts[0]
    assert long.traffic.moved - short.traffic.moved > 16 * PARAMETERS / 4


def test_command(bare, tmp_path):
    path, output = tmp_path / "plan.yaml", tmp_path / "plan.json"
    path.write_text(yaml.safe_dump(offline(bare, {"name": "sft"})))
    shown = CliRunner().invoke(app, ["plan", str(path), "--json", str(output)], catch_exceptions=False)
    assert shown.exit_code == 0
    written = json.loads(output.read_text())
    assert written["fits"] is True
    assert written["stages"][0]["programs"][0]["memory"]["parameters"] == PARAMETERS
    assert "no data: examples of data.max_length=128 tokens" in shown.output


def test_shardings_of_all_that_is_held_without_compiling(bare, tmp_path, monkeypatch):
    path, scorer = tmp_path / "plan.yaml", str(bare.parent / "scorer")
    method = {"name": "ppo", "kl_coef": 0.1}
    path.write_text(yaml.safe_dump(online(bare, method, rollout={"rewards": [{"model": scorer}]})))
    monkeypatch.setattr(Program, "timed", property(lambda self: pytest.fail(f"{self.name} was compiled")))
    table = CliRunner().invoke(app, ["plan", str(path), "--shardings"], catch_exceptions=False).output
    for name in ("params/policy", "opt_state/", "reference/params/embed/embedding", "reward model/params/score/kernel"):
        assert name in table, name
    copied = next(line for line in table.splitlines() if "decoding copy/params/embed/embedding" in line)
    size = f"{4 * VOCAB * WIDTH / 2**20:,.2f}"
    assert copied.split()[-2:] == [size, size]  # every data shard has it whole


def test_what_no_axis_divides_is_said(bare, tmp_path):
    settings = offline(bare, {"name": "sft"})
    settings["mesh"] = {"data": 1, "fsdp": 1, "tensor": 8}
    found = plan_stage(stage_of(tmp_path, settings), only=()).assumptions
    (line,) = [line for line in found if "does not divide" in line]
    # Four heads and two of keys and values, on eight devices; the vocabulary and the feed-forward width are shared.
    size = 4 * LAYERS * WIDTH * DIM * (2 * HEADS + 2 * KV)
    assert line.startswith("tensor=8 does not divide ") and f" {size:,} bytes in all" in line
    assert "attention/query/kernel" in line or "attention/key/kernel" in line


@pytest.mark.parametrize(
    ("changes", "arguments", "told"),
    [
        ({}, ["--topology", "v5p"], "written as version and shape"),
        ({}, ["--mfu", "1.5"], "--mfu 1.5: a share of the peak"),
        ({"mesh": {"data": 3}}, [], "mesh: data=3 fsdp=1 tensor=1 needs 3 devices, but there are 8"),
        ({"model": None}, [], "model"),
        ({"model": {"path": "/nowhere/model"}}, [], "/nowhere/model does not exist"),
    ],
)
def test_bad_input(bare, tmp_path, changes, arguments, told):
    settings = {**offline(bare, {"name": "sft"}), **changes}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    with pytest.raises((ValueError, FileNotFoundError), match=told.replace("(", r"\(")):
        CliRunner().invoke(app, ["plan", str(path), *arguments], catch_exceptions=False)


def test_without_libtpu(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    stage = stage_of(tmp_path, offline(bare, {"name": "sft"}))
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu\]'"):
        plan_stage(stage, "v5e:2x4")


@pytest.mark.parity
@pytest.mark.usefixtures("libtpu")
def test_a_slice_that_is_not_here(bare, tmp_path):
    stage = stage_of(tmp_path, offline(bare, {"name": "sft"}))
    plan = plan_stage(stage, "v5e:2x4")
    assert (plan.devices, plan.kind) == (8, "TPU v5 lite")
    step = plan.programs[0]
    assert step.memory.parameters == PARAMETERS
    assert step.traffic is not None and step.traffic.collectives["all-gather"][0] > 0
    assert plan.shape == (2, 8, 128)  # rows are multiples of 128 on TPU
    least, likely = plan.step_seconds(), plan.step_seconds(plan.mfu)
    assert least is not None and likely is not None and 0 < least <= likely
    with pytest.raises(ValueError, match="libtpu knows no such slice"):
        plan_stage(stage, "v5e:3x17")
