"""A reward model through a run: from a policy to a classifier's folder and on, and what makes no sense for one."""

import json

import numpy as np
import pytest

from jaxalign import data, models
from jaxalign.config import parse_config
from jaxalign.rewards.model import make_scorer
from jaxalign.run import evaluate_stage, pick_stage, run
from jaxalign.training.timings import TIMINGS
from tests.run.conftest import TEXT
from tests.run.test_run import COMMON, lines

METRICS = {"min_reward", "mean_reward", "max_reward", "accuracy", "margin"}


@pytest.fixture
def reward_settings(settings):
    settings["method"] = {"name": "reward"}
    return settings


@pytest.fixture(scope="session")
def rankings(tmp_path_factory):
    """30 rankings of 2 to 5 answers: the shorter the better."""
    rng = np.random.default_rng(1)

    def text(size):
        return " " + " ".join(rng.choice(TEXT.split(), size))

    rows = []
    for _ in range(30):
        sizes = rng.permutation(np.arange(1, 20, 4))[: rng.integers(2, 6)]
        rows.append({"prompt": text(3)[1:], "completions": [text(n) for n in sizes], "scores": (-sizes).tolist()})
    path = tmp_path_factory.mktemp("data") / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completions_of(path, folder):
    """Every prompt with each of its answers, as token ids, and the ranks of each prompt's."""
    config = data.DataConfig(str(path), max_length=128)
    examples = data.load(config, models.load_tokenizer(folder), "ranking").train
    texts, ranks = [], []
    for example in examples:
        parts = np.split(example["completion_ids"], np.cumsum(example["sizes"])[:-1])
        texts += [np.concatenate([example["prompt_ids"], part]) for part in parts]
        ranks.append(example["ranks"])
    return texts, ranks


def test_from_a_policy_to_a_folder_of_a_classifier(reward_settings, pairs):
    settings = reward_settings
    settings["stages"] = [
        {"name": "sft", "method": {"name": "sft"}, "data": {"columns": {"completion": "chosen"}}},
        {
            "name": "rm",
            "method": {"name": "reward", "normalize": True},
            "model": {"path": "sft.policy"},
            "train": {"metric_for_best_model": "eval_accuracy"},
        },
        {"name": "more", "method": {"name": "reward"}, "model": {"path": "rm.reward"}},
    ]
    del settings["method"]
    settings["train"]["max_steps"] = 12
    result = run(parse_config(settings))
    rm, more = (stage.folder for stage in result.stages[1:])
    trained, evaluated = lines(rm)[0], next(line for line in lines(rm) if "eval_loss" in line)
    assert trained.keys() >= METRICS | COMMON
    assert evaluated.keys() >= {f"eval_{name}" for name in METRICS}
    accuracies = [line["accuracy"] for line in lines(rm) if "accuracy" in line]
    assert accuracies[-1] > 0.9  # short answers are easily told from long ones
    model, variables = models.load(rm / "export")
    config = json.loads((rm / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and model.config.score_bias
    assert config["pad_token_id"] == 0 and config["eos_token_id"] == 2
    assert "A reward model. Trained with reward" in (rm / "export" / "README.md").read_text()
    tokenizer = models.load_tokenizer(rm / "export")
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.chat_template
    # Normalised over the training data alone; these are all of them, a fifth more.
    texts, _ = completions_of(pairs, rm / "export")
    scores = make_scorer(model, variables)(texts)
    assert abs(scores.mean()) < 0.2 and abs(scores.std() - 1) < 0.2
    assert (scores[0::2] > scores[1::2]).mean() > 0.9
    # The next stage begins with these very scores.
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["stages"]["more"]["policy"]["from"] == str(rm / "export")
    assert lines(more)[0]["accuracy"] > 0.9
    stage = pick_stage(parse_config(settings), "rm", trained=True)
    judged = evaluate_stage(stage, str(rm / "export"), say=lambda line: None)
    assert judged["accuracy"] > 0.9 and abs(judged["mean_reward"]) < 0.4
    assert judged["max_reward"] <= scores.max() + 1e-3


@pytest.mark.slow
def test_rankings_are_learned_and_resumed(reward_settings, rankings):
    settings = reward_settings
    settings["data"]["path"] = str(rankings)
    settings["train"] |= {"max_steps": 16, "batch_size": 8, "micro_batch_size": 4}
    result = run(parse_config(settings))
    texts, ranks = completions_of(rankings, result.folder / "export")
    scores = make_scorer(*models.load(result.folder / "export"))(texts)
    right = pairs = 0
    for part, rank in zip(np.split(scores, np.cumsum([len(each) for each in ranks])[:-1]), ranks, strict=True):
        better = rank[:, None] < rank[None]
        pairs += better.sum()
        right += (better & (part[:, None] > part[None])).sum()
    assert right / pairs > 0.85
    # The head's draw belongs to the run: the same again.
    again = run(parse_config({**settings, "name": "again"}))
    for one, other in zip(lines(result.folder), lines(again.folder), strict=True):
        same = {k: v for k, v in one.items() if k not in TIMINGS and not k.startswith("train_")}
        assert same == {k: other[k] for k in same}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log": {"sample_steps": 2}}, r"log\.sample_steps: a reward model gives scores and no answers"),
        ({"model": {"reference": "x"}}, r"model\.reference: the method reward has no reference"),
        ({"compare": {"path": "prompts.jsonl"}}, "compare: the last stage trains a reward model"),
        ({"train": {"metric_for_best_model": "rewards/margins"}}, "there is no 'rewards/margins'.*eval_accuracy"),
    ],
)
def test_what_makes_no_sense_for_a_reward_model(reward_settings, changes, message):
    for section, values in changes.items():
        reward_settings[section] = {**reward_settings.get(section, {}), **values}
    with pytest.raises(ValueError, match=message):
        run(parse_config(reward_settings))


def test_a_reward_model_is_no_policy(settings, tiny, tmp_path):
    import jax

    model, variables = models.add_score_head(*models.load(tiny), jax.random.key(0))
    folder = models.save(tmp_path / "rm", model, variables, models.load_tokenizer(tiny))
    settings["model"]["path"] = str(folder)
    with pytest.raises(ValueError, match=r"model\.path=.*rm is a reward model, without an LM head; preference trains"):
        run(parse_config(settings))


def test_only_a_reward_stage_has_a_reward_model(settings):
    settings["stages"] = [{"name": "a", "method": {"name": "sft"}}, {"name": "b", "model": {"path": "a.reward"}}]
    with pytest.raises(ValueError, match=r"stages\.b\.model\.path: 'a\.reward': that stage trains a policy, a\.policy"):
        parse_config(settings)
    settings["stages"][1]["model"]["path"] = "c.reward"
    with pytest.raises(ValueError, match=r"'c\.reward' names no earlier stage"):
        parse_config(settings)
