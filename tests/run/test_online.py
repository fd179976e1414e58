"""Online runs: end to end, killed in the middle of a rollout buffer, and what a user gets wrong."""

import hashlib
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxalign import cli as command_line
from jaxalign import models
from jaxalign.config import config_text, difference, load_config, parse_config, read_config_text
from jaxalign.methods.online import OnlineSource
from jaxalign.rewards import RewardError
from jaxalign.run import evaluate_stage, pick_stage, prepare, rollout_scores, run
from jaxalign.run import online as online_module
from jaxalign.run import stage as stage_module
from jaxalign.run import start as start_module
from jaxalign.run.drawing import sampling_config
from jaxalign.run.online import draw_with, make_passes, prompt_width
from jaxalign.sampling.generate import STOP
from tests.run.conftest import TEXT, finish, wait_until
from tests.run.test_resume import lines, logged, saving, weights

# Scores of a tenth are no float32; the second reward has none for every third text or so; both need the column.
REWARDS = """
import pathlib

def tenths(completions, target, **columns):
    return [(sum(map(ord, text_of(c))) + len(t)) % 11 / 10 for c, t in zip(completions, target)]

def some(completions, completion_ids, *, flag=None, **columns):
    if flag and pathlib.Path(flag).exists():
        raise RuntimeError("out of order")
    return [None if sum(ids) % 3 == 0 else float(len(ids)) for ids in completion_ids]

def text_of(completion):
    assert [message["role"] for message in completion] == ["assistant"]
    return completion[0]["content"]
"""


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    """20 conversational prompts of ragged lengths, each with a column for the rewards."""
    rng = np.random.default_rng(1)
    rows = [
        {
            "prompt": [{"role": "user", "content": " ".join(rng.choice(TEXT.split(), rng.integers(1, 12)))}],
            "target": "x" * int(rng.integers(1, 9)),
            # A column of this name is none of the completions that are drawn.
            "completions": "never looked at",
        }
        for _ in range(20)
    ]
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """11 plain texts of ragged lengths."""
    rng = np.random.default_rng(2)
    rows = [{"text": " ".join(rng.choice(TEXT.split(), rng.integers(2, 14)))} for _ in range(11)]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def functions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def online(settings, prompts, functions) -> dict[str, Any]:
    """GRPO with a KL in the loss: rollouts of 4 prompts × 3 completions, each for 2 iterations × 2 batches."""
    return settings | {
        "data": {"path": str(prompts), "eval_ratio": 0.2, "max_length": 64},
        "method": {
            "name": "grpo",
            "num_generations": 3,
            "max_completion_length": 8,
            "num_iterations": 2,
            "steps_per_generation": 2,
            "beta": 0.05,
        },
        # Most completions of the tiny model end by none but these.
        "rollout": {
            "rewards": [{"name": f"{functions}:tenths"}, {"name": f"{functions}:some", "weight": 0.1}],
            "stop": ["e", "a"],
            "slots": 8,
        },
        "train": {"batch_size": 2, "max_steps": 6, "save_steps": 3, "eval_steps": 5},
        "log": {"logging_steps": 1, "sample_steps": 3, "sample_prompts": 2},
    }


def records(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def start(settings, **options):
    return run(parse_config(settings), **options)


def test_a_run_from_prompts_to_an_exported_folder(online, monkeypatch):
    loads = []
    load = start_module.load_policy
    monkeypatch.setattr(start_module, "load_policy", lambda ready, path: loads.append(path) or load(ready, path))
    result = start(online)
    assert loads == [online["model"]["path"]]  # policy and reference from the same file
    found = records(result.folder)
    trained = [line for line in found if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    fresh = {"reward", "reward_std", "frac_reward_zero_std", "rewards/tenths/mean", "rewards/some/std"}
    fresh |= {"completions/mean_length", "completions/clipped_ratio", "timing_s/sampling", "timing_s/passes"}
    for line in trained:
        assert {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "entropy", "kl"} <= line.keys()
        assert bool(fresh & line.keys()) == (fresh <= line.keys()) == (line["step"] in (1, 5))
    # The policy has not moved from its reference, nor from the sampler's numbers: it starts as both.
    assert abs(trained[0]["kl"]) < 1e-6 and trained[0]["clip_ratio/region_mean"] == 0
    assert trained[-1]["kl"] > 1e-6
    evaluated = [line for line in found if "eval_reward" in line]
    assert [line["step"] for line in evaluated] == [5, 6]
    assert {"eval_rewards/tenths/mean", "eval_completions/mean_length", "eval_runtime"} <= evaluated[0].keys()
    samples = records(result.folder, "samples")
    assert [each["step"] for each in samples] == [3, 3, 6, 6]
    assert all(each["prompt"].endswith("<|im_start|>assistant\n") and each["tokens"] >= 1 for each in samples)
    for each in samples:
        assert each["ended"] == any(end in each["completion"] for end in ("e", "a", "<|im_end|>"))
        assert each["ended"] or each["tokens"] == 8
    export = str(result.stages[0].export)
    before, after = (models.load(path)[1] for path in (online["model"]["path"], export))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert min(jax.tree.leaves(moved)) > 0
    # What was logged last is what its export scores.
    judged = evaluate_stage(pick_stage(parse_config(online), None), export, say=lambda line: None)
    assert judged["reward"] == pytest.approx(evaluated[-1]["eval_reward"], rel=1e-6)
    assert judged["completions/mean_length"] == evaluated[-1]["eval_completions/mean_length"]


def test_without_kl_no_reference_is_loaded(online, monkeypatch):
    """Not at the start, and on resuming nothing is loaded at all."""
    loads = []
    load = start_module.load_policy
    monkeypatch.setattr(start_module, "load_policy", lambda ready, path: loads.append(path) or load(ready, path))
    asked = []

    def counted(ready, reference, functions, frozen):
        found = make_passes(ready, lambda: asked.append(1) or reference(), functions, frozen)
        assert found == {}
        return found

    monkeypatch.setattr(start_module, "make_passes", counted)
    online["method"] |= {"beta": 0.0}
    online["train"] |= {"max_steps": 3, "eval_steps": 100}
    result = start(online)
    assert loads == [online["model"]["path"]] and asked == []
    shutil.rmtree(result.stages[0].folder / "export")  # as if stopped before the export
    assert start(online).stages[0].reason == "completed"
    assert len(loads) == 1 and asked == []


def breaking(flag: Path, monkeypatch, before: int) -> None:
    """From now on rewards are out of order before the update of this number."""
    following = OnlineSource.next

    def next_batch(self, state):
        if int(state.step) == before - 1:
            flag.touch()
        return following(self, state)

    monkeypatch.setattr(OnlineSource, "next", next_batch)


def test_a_reward_that_raises_loses_nothing(online, tmp_path, monkeypatch, capsys):
    """At the second rollout, between two saves; once it works again, all is as if nothing had been."""
    flag = tmp_path / "broken"
    online["mesh"] = {"data": 4, "fsdp": 2}
    online["rollout"]["rewards"][1]["options"] = {"flag": str(flag)}
    whole = start(online | {"name": "whole"})
    with monkeypatch.context() as patch:
        breaking(flag, patch, 5)
        with pytest.raises(RewardError, match=r"'some', sample 0 \(starts .*\): raised RuntimeError: out of order"):
            start(online)
    folder = Path(online["runs_dir"]) / "run"
    assert [line["step"] for line in records(folder)] == [1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "4"]
    # On the command line it is a message, not a traceback.
    config = tmp_path / "config.yaml"
    config.write_text(config_text(parse_config(online).resolved))
    monkeypatch.setattr(sys, "argv", ["jaxalign", "run", str(config)])
    monkeypatch.setattr(command_line, "_keep_compiled", lambda: None)
    with pytest.raises(SystemExit):
        command_line.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "error: reward 'some', sample 0" in printed and "Traceback" not in printed
    flag.unlink()
    # What is done about rewards that fail, and what is saved and shown, may change on the way.
    online["rollout"] |= {"reward_timeout": 90.0, "on_reward_error": "none"}
    online["train"] |= {"save_steps": 2}
    assert start(online).stages[0].reason == "completed"
    assert lines(folder) == lines(whole.folder)
    assert weights(folder) == weights(whole.folder)
    kept = read_config_text((folder / "config.yaml").read_text())
    assert kept["rollout"]["reward_timeout"] == 90 and kept["train"]["save_steps"] == 2


def test_a_reward_that_raises_in_evaluation_loses_nothing(online, tmp_path):
    """At step 5, where no checkpoint is due and 4 steps are not saved yet."""
    flag = tmp_path / "broken"
    online["train"] |= {"save_steps": 100}
    online["rollout"]["rewards"][1]["options"] = {"flag": str(flag)}
    whole = start(online | {"name": "whole"})
    judge = online_module.make_judge

    def make_judge(*arguments):
        evaluate = judge(*arguments)

        def failing(variables):
            flag.touch()
            return evaluate(variables)

        return failing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "make_judge", make_judge)
        with pytest.raises(RewardError, match="out of order"):
            start(online)
    folder = Path(online["runs_dir"]) / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["5"]
    flag.unlink()
    assert start(online).stages[0].reason == "completed"
    assert lines(folder) == lines(whole.folder)
    assert (folder / "samples.jsonl").read_bytes() == (whole.folder / "samples.jsonl").read_bytes()
    assert weights(folder) == weights(whole.folder)


def test_evaluation_is_scored_in_portions_of_a_rollout(online, functions, monkeypatch):
    """20 prompts, and 12 completions in a rollout: the time limit is for 12."""
    sizes, begin = [], rollout_scores.rewards.start_rewards
    monkeypatch.setattr(
        rollout_scores.rewards,
        "start_rewards",
        lambda *a, **given: sizes.append(len(given["completions"])) or begin(*a, **given),
    )
    online["data"] |= {"eval_ratio": None, "eval_path": online["data"]["path"]}
    found = evaluate_stage(pick_stage(parse_config(online), None), None, say=lambda line: None)
    assert sizes == [12, 8]
    sizes.clear()
    online["train"] |= {"batch_size": 4}
    together = evaluate_stage(pick_stage(parse_config(online), None), None, say=lambda line: None)
    assert sizes == [20] and together == found


# A rollout serves 4 updates, and a save comes every 3 steps: all saves but each fourth lie within a buffer.
BUFFERS = {
    "grpo": {"num_generations": 3, "num_iterations": 4, "beta": 0.05},
    # Saves lie between epochs and within them; the coefficient and the scores' moments move with every rollout.
    "ppo": {
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "kl_target": 0.5,
        "kl_horizon": 100,
        "normalize_scores": "running",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "times"), [("grpo", 3), ("ppo", 3)])
def test_killed_in_the_middle_of_a_rollout_buffer(method, times, online, texts, write_config, cli):
    online["method"] = {"name": method, "max_completion_length": 8, **BUFFERS[method]}
    online["train"] |= {"max_steps": 40, "eval_steps": 20}
    online["log"] |= {"sample_steps": 5}
    if method == "ppo":
        online["method"] |= {"ptx_coef": 0.5}
        online["ptx_data"] = {"path": str(texts), "max_length": 64}
    config, runs = write_config(online), Path(online["runs_dir"])
    finish(cli("run", config, "name=whole"))
    folder, chance, kills = runs / "killed", random.Random(method), 0
    for attempt in range(times):
        process = cli("run", config, "name=killed")
        seen = logged(folder)
        got_there = wait_until(lambda seen=seen: logged(folder) > seen + 4, process)
        if attempt == times // 2:
            # Once there is a step to go on from.
            got_there = wait_until(lambda: saving(folder) and any(folder.glob("checkpoints/*/SHA256SUMS")), process)
        else:
            time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += got_there and process.returncode == -signal.SIGKILL
    assert kills == times, "the run ended before it could be killed"
    assert "continuing after step" in finish(cli("run", config, "name=killed"))
    if method == "ppo":
        assert len({line["objective/kl_coef"] for line in lines(folder) if "objective/kl_coef" in line}) > 5
        assert all("loss/ptx_avg" in line for line in lines(folder) if "loss" in line)
    assert lines(folder) == lines(runs / "whole")
    assert (folder / "samples.jsonl").read_bytes() == (runs / "whole" / "samples.jsonl").read_bytes()
    assert weights(folder) == weights(runs / "whole")


def test_stops_inside_the_loop_draw_the_same_rollout_in_fewer_steps(online):
    """What `rollout.stop` cuts afterwards ends at once where every token with such a letter is a stop sequence."""
    decode = models.load_tokenizer(online["model"]["path"]).decode
    sequences = [[token] for token in range(320) if set(decode([token])) & {"e", "a"}]
    steps, tokens = [], []
    for each in ([], sequences):
        ready = prepare(pick_stage(parse_config(change(online, "rollout.stop_sequences", each)), None))
        draw = draw_with(ready, sampling_config(ready), prompt_width(ready))
        prompts = [np.asarray(ready.data.train[i]["prompt_ids"]) for i in range(8)]
        samples = draw(models.load(online["model"]["path"])[1], prompts, jax.random.key(0, impl="threefry2x32"))
        steps.append(int(samples.counters["decode_steps"]))
        tokens.append([row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths, strict=True)])
        assert (samples.finish == STOP).sum() > 4
        assert samples.counters["refills"] == 8 * 3 - 8
    assert tokens[0] == tokens[1]
    assert steps[1] < steps[0]


def test_stop_tokens_are_ends_of_the_sampler(online):
    online["rollout"] |= {"stop_token_ids": [7, 2], "stop_sequences": ["the cat", [5, 6]]}
    config = parse_config(online)
    ready = prepare(pick_stage(parse_config(read_config_text(config_text(config.resolved))), None))
    found, text = sampling_config(ready), tuple(ready.data.tokenizer("the cat")["input_ids"])
    assert found.eos_ids == (2, 7) and found.stop_sequences == (text, (5, 6)) and len(text) > 1


def test_a_reward_is_found_from_where_the_run_is_started(online, functions, tmp_path, write_config, monkeypatch):
    """As all paths of a config are, wherever the config lies."""
    (tmp_path / "mine").mkdir()
    shutil.copyfile(functions, tmp_path / "mine" / "own.py")
    online["rollout"]["rewards"] = [{"name": "mine/own.py:tenths"}]
    (tmp_path / "configs").mkdir()
    path = write_config(online).rename(tmp_path / "configs" / "own.yaml")
    monkeypatch.chdir(tmp_path)
    prepare(pick_stage(load_config(path), None))
    monkeypatch.chdir(path.parent)
    with pytest.raises(ValueError, match=r"rollout\.rewards\[0\]: .*there is no file .*/configs/mine/own\.py"):
        prepare(pick_stage(load_config(path), None))


def test_a_reward_whose_file_was_edited_is_another_run(online, functions, tmp_path, monkeypatch):
    """The file of a reward that is named by its file; a module is found by its name, as a package's version is."""
    own, package = tmp_path / "own.py", tmp_path / "module_of_rewards.py"
    for path in (own, package):
        shutil.copyfile(functions, path)
    monkeypatch.syspath_prepend(tmp_path)
    online["rollout"]["rewards"] = [{"name": f"{own}:tenths"}, {"name": "module_of_rewards:some"}]
    online["method"] |= {"beta": 0.0, "steps_per_generation": 1, "num_iterations": 1}
    online["train"] |= {"max_steps": 1, "eval_steps": 9}
    online["log"] = {}
    result = start(online)
    kept = json.loads((result.folder / "manifest.json").read_text())["stages"]["run"]["rewards"]
    assert kept == {str(own): hashlib.sha256(own.read_bytes()).hexdigest()}
    shutil.rmtree(result.stages[0].folder / "export")  # as if stopped before the export
    package.write_text(REWARDS + "# edited\n")
    assert start(online).stages[0].reason == "completed"
    shutil.rmtree(result.stages[0].folder / "export")
    own.write_text(REWARDS.replace("% 11", "% 7"))
    with pytest.raises(ValueError, match=r"(?s)begun with other inputs; bring them back or give --fresh:.*own\.py"):
        start(online)


def change(settings: dict, key: str, value: Any) -> dict:
    *parents, last = key.split(".")
    inner = settings
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return settings


def copied(prompts: Path, folder: Path, row: dict | None) -> str:
    path = folder / "other.jsonl"
    path.write_text("" if row is None else prompts.read_text() + json.dumps(row) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollout.rewards", [], r"rollout\.rewards: grpo needs at least one reward"),
        ("rollout.rewards", [{"name": "gsm9k"}], r"rollout\.rewards\[0\]: .*no reward 'gsm9k'.*gsm8k"),
        (
            "rollout.rewards",
            [{"name": "gsm8k"}],
            r"rollout\.rewards\[0\]: .*needs the column '.*'; there are: .*target",
        ),
        ("rollout.rewards", [{"name": "gsm8k", "model": "m"}], r"rollout\.rewards\[0\]: .*either `name`"),
        ("rollout.rewards", [{"nam": "gsm8k"}], r"rollout\.rewards\[0\]\.nam: unknown key; did you mean 'name'"),
        ("rollout.top_p", 0.0, r"top_p=0\.0 must be above 0"),
        ("rollout.stop", [""], r"stop.* empty"),
        ("rollout.stop_token_ids", [-1], r"rollout\.stop_token_ids: -1 is no token id of the model"),
        ("rollout.stop_sequences", ["e", [5, 320]], r"rollout\.stop_sequences: 320 is no token id of the model"),
        ("rollout.stop_sequences", [[]], r"rollout\.stop_sequences: a sequence has no tokens"),
        ("method.reward_weights", [1.0, 2.0], r"method\.reward_weights has 2 numbers for 2 rewards.*`weight` beside"),
        (
            "method.max_completion_length",
            230,
            r"method\.max_completion_length=230 and the longest prompt of \d+ tokens exceed .* context of 256.*"
            r"data\.max_prompt_length",
        ),
        ("train.row_length", 32, r"train\.row_length=32, but a prompt with its completions may take \d+"),
        (
            "train.metric_for_best_model",
            "eval_rewards/tenth/mean",
            r"there are eval_reward, eval_rewards/tenths/mean, ",
        ),
        ("model.reference", "m", r"model\.reference: the method grpo has no reference"),
    ],
)
def test_mistakes_show_at_once_and_leave_no_folder(online, key, value, message):
    if key == "model.reference":
        online["method"]["beta"] = 0.0
    with pytest.raises(ValueError, match=message):
        start(change(online, key, value))
    assert not Path(online["runs_dir"]).exists()


def test_an_empty_prompt_set(online, prompts, tmp_path):
    with pytest.raises(ValueError, match=r"other\.jsonl: no rows"):
        start(change(online, "data.path", copied(prompts, tmp_path, None)))
    row = {"prompt": [], "target": "x"}
    with pytest.raises(ValueError, match=r"other\.jsonl:21: .*"):
        start(change(online, "data.path", copied(prompts, tmp_path, row)))


def test_a_rollout_without_prompts_of_that_length(online, prompts, tmp_path):
    row = {"prompt": [{"role": "user", "content": TEXT * 3}], "target": "x"}
    with pytest.raises(ValueError, match=r"other\.jsonl:21: .*tokens"):
        start(change(online, "data.path", copied(prompts, tmp_path, row)))


def test_a_column_that_the_evaluation_data_lacks(online, prompts, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "the cat"}]}) + "\n")
    online["data"] = {"path": str(prompts), "eval_path": str(path), "max_length": 64}
    with pytest.raises(ValueError, match=r"rollout\.rewards\[0\]: reward 'tenths' needs the column 'target'"):
        start(online)


def test_rows_that_lack_a_column_give_none(online, prompts, tmp_path):
    """The reward asks for it; what a row does not have is None, and the message names the function and the sample."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for row in rows[1:]:
        del row["target"]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    online["data"] |= {"path": str(path), "eval_ratio": None}
    online["train"] |= {"eval_steps": None}
    with pytest.raises(RewardError, match=r"'tenths', sample \d+ .*TypeError.*NoneType"):
        start(online)


def test_a_rollout_section_is_for_online_methods_alone(settings, online):
    with pytest.raises(ValueError, match=r"rollout: this method learns from a data set"):
        parse_config(settings | {"rollout": {"top_k": 5}})
    assert "rollout" not in parse_config(settings).resolved
    once = parse_config(online)
    assert parse_config(read_config_text(config_text(once.resolved))) == once
    twice = [{"name": "regex", "options": {"pattern": each}} for each in "ab"]
    other = [twice[0] | {"options": {"pattern": "c"}}, twice[1]]
    before, after = (parse_config(change(online, "rollout.rewards", each)).resolved for each in (twice, other))
    assert len(difference(before, after)) == 1


def reward_model(tiny: Path, folder: Path, **changes) -> Path:
    """A reward model from the policy, its tokenizer's and config's files changed."""
    model, variables = models.add_score_head(*models.load(tiny), jax.random.key(0))
    path = models.save(folder, model, variables, models.load_tokenizer(tiny))
    for name, edit in changes.items():
        file = path / f"{name}.json"
        file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    return path


def swapped(tokenizer: dict) -> dict:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return tokenizer


def test_reward_models(online, tiny, tmp_path):
    """One with another tokenizer or too short a context is refused before anything runs; two that fit score."""
    other = reward_model(tiny, tmp_path / "other", tokenizer=swapped)
    short = reward_model(tiny, tmp_path / "short", config=lambda c: c | {"max_position_embeddings": 20})
    for path, message in (
        (other, r"rewards\[0\]: the reward model has another tokenizer.*2 of 316 tokens.*'a' is"),
        (short, r"rewards\[0\]: .*max_completion_length=8 exceed the context of .*short, 20"),
    ):
        with pytest.raises(ValueError, match=message):
            start(change(online, "rollout.rewards", [{"model": str(path)}]))
    assert not Path(online["runs_dir"]).exists()
    fitting = reward_model(tiny, tmp_path / "fitting")
    online["method"] |= {"num_iterations": 1, "beta": 0.0}
    online["train"] |= {"max_steps": 1}
    own = {"name": "length_target", "options": {"target": 4}, "weight": 2.0}
    named = [{"model": str(fitting)}, own, {"model": str(fitting)}]
    result = start(change(online, "rollout.rewards", named))
    line = records(result.folder)[0]
    assert line["rewards/model/mean"] == line["rewards/model_2/mean"]
    total = 2 * line["rewards/model/mean"] + 2 * line["rewards/length_target/mean"]
    assert line["reward"] == pytest.approx(total, rel=1e-5)
    # Which one scored is part of the run: it does not go on with another in its place.
    begun = json.loads((result.folder / "manifest.json").read_text())["stages"]["run"]
    assert begun["reward_models"] == {str(fitting): models.fingerprint(fitting)}
    architecture = json.loads((fitting / "config.json").read_text())
    (fitting / "config.json").write_text(json.dumps(architecture | {"rms_norm_eps": 1e-3}))
    shutil.rmtree(result.stages[0].folder / "export")  # as if stopped before the export
    with pytest.raises(ValueError, match=r"(?s)begun with other inputs.*reward_models.*fitting"):
        start(change(online, "rollout.rewards", named))


def test_dynamic_sampling_that_finds_nothing_is_a_message(online, write_config, monkeypatch, capsys):
    online["method"] = {"name": "dapo", "num_generations": 2, "max_completion_length": 4, "max_rollouts": 2}
    online["rollout"] = {"rewards": [{"name": "regex", "options": {"pattern": "never, ever"}}]}
    monkeypatch.setattr(sys, "argv", ["jaxalign", "run", str(write_config(online))])
    monkeypatch.setattr(command_line, "_keep_compiled", lambda: None)
    with pytest.raises(SystemExit):
        command_line.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "error: dynamic sampling: after 2 rollouts only 0 of 2 prompts have completions with different" in printed


def test_other_commands(online, write_config, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxalign.cli._keep_compiled", lambda: None)
    config, runner = str(write_config(online)), CliRunner()

    def command(*arguments):
        result = runner.invoke(command_line.app, [str(each) for each in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    printed = command("data", "check", config)
    assert "every row can be trained on" in printed and "row_length" in printed
    metrics = tmp_path / "metrics.json"
    command("eval", config, "--output", metrics)
    found = json.loads(metrics.read_text())
    assert {"reward", "rewards/tenths/mean", "rewards/some/mean", "completions/clipped_ratio"} <= found.keys()


SMALL_PPO: dict[str, Any] = {"name": "ppo", "num_ppo_epochs": 1, "max_completion_length": 4, "kl_coef": 0.0}


def test_a_critic_goes_on_in_a_later_stage(online, texts, monkeypatch):
    """It is written in full, and the values of the later stage's first rollout are its own."""
    held, export = [], stage_module.export_critic

    def held_up(ready, folder, trained, params, frozen):
        held.append(ready.method.value_of(params, frozen))
        return export(ready, folder, trained, params, frozen)

    monkeypatch.setattr(stage_module, "export_critic", held_up)
    online["method"] = SMALL_PPO | {"ptx_coef": 0.5, "ptx_per_prompt": 2}
    online["ptx_data"] = {"path": str(texts), "max_length": 64}
    online["data"] |= {"eval_ratio": None}
    online["train"] = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 1}
    online["log"] = {"logging_steps": 1}
    online["export"] = {"critic": True}
    first, second = {"name": "first"}, {"name": "second", "model": {"path": "first.policy", "critic": "first.critic"}}
    second |= {"method": {"ptx_coef": 0.0, "ptx_per_prompt": 1}, "ptx_data": None, "export": {"critic": False}}
    result = start(online | {"stages": [first, second]})
    folder = result.folder / "first" / "critic"
    architecture = json.loads((folder / "config.json").read_text())["architectures"]
    model, variables = models.load(folder)
    assert architecture == ["LlamaForSequenceClassification"] and model.config.score_labels == 1
    jax.tree.map(np.testing.assert_array_equal, variables, held[0])
    before, after = (records(result.folder / name)[0] for name in ("first", "second"))
    assert before["critic/values/max"] == 0 != after["critic/values/max"]
    assert before["loss/ptx_avg"] > 0 and "loss/ptx_avg" not in after
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert str(texts) in json.dumps(manifest) and len(held) == 1 and not (result.folder / "second" / "critic").exists()


@pytest.mark.slow
def test_a_shared_critic_takes_the_blocks_along(online):
    """With an adapter, merged: its blocks are those of the exported policy, and the head is its own."""
    online["method"] = SMALL_PPO | {"critic": "shared"}
    online["data"] |= {"eval_ratio": None}
    online["train"] = {"batch_size": 2, "max_steps": 1}
    online["lora"] = {"r": 2}
    online["export"] = {"critic": True}
    online["log"] = {"logging_steps": 1}
    result = start(online)
    critic, policy = (models.load(result.folder / name)[1]["params"] for name in ("critic", "export"))
    assert np.abs(critic.pop("score")["kernel"]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, critic, policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": SMALL_PPO | {"ptx_coef": 0.5}}, r"method\.ptx_coef=0\.5 needs .*: give the section ptx_data"),
        ({"method": SMALL_PPO, "ptx_data": {}}, r"ptx_data: method\.ptx_coef is 0, so nothing"),
        ({"ptx_data": {}}, r"ptx_data: grpo mixes no supervised examples in"),
        ({"ptx_data": {"eval_ratio": 0.1}}, r"ptx_data\.eval_ratio: a run is evaluated on data\.eval_ratio"),
        ({"ptx_data": {"max_length": 4000}}, r"ptx_data\.max_length=4000 exceeds the model's context of 256"),
        ({"ptx_data": {"max_length": 20}}, r"(?s)ptx_data: .*ptx_data\.on_bad=drop leaves.*texts\.jsonl:\d+: "),
        (
            {"ptx_data": {"max_length": 250}, "train": {"row_length": 32}},
            r"train\.row_length=32, .* or a text of ptx_data, may take 64",
        ),
        (
            {"method": SMALL_PPO | {"ptx_per_prompt": 3}},
            r"method: ptx_per_prompt=3 is not read here, only with ptx_coef",
        ),
        ({"export": {"critic": True}}, r"export\.critic: the method grpo has no critic"),
    ],
)
def test_mistakes_with_supervised_examples_and_critics(online, texts, tmp_path, changes, message):
    if "ptx_data" in changes:
        path = tmp_path / "texts.jsonl"
        path.write_text(texts.read_text() + json.dumps({"text": TEXT * 3}) + "\n")
        changes = {**changes, "ptx_data": {"path": str(path), **changes["ptx_data"]}}
        if changes["ptx_data"].keys() != {"path"}:
            changes["method"] = SMALL_PPO | {"ptx_coef": 0.5}
    with pytest.raises(ValueError, match=message):
        start({**online, **changes, "train": online["train"] | changes.get("train", {})})
    assert not Path(online["runs_dir"]).exists()


def test_the_critic_of_an_earlier_stage_has_to_be_there(online):
    named = {"name": "second", "model": {"critic": "first.critic"}}
    with pytest.raises(ValueError, match=r"model\.critic: 'first\.critic' is not written: set stages\.first\.export"):
        parse_config(online | {"method": SMALL_PPO, "stages": [{"name": "first"}, named]})
