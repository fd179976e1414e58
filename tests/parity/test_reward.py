# pyright: reportMissingImports=false
"""Reward models against transformers and TRL 1.16.0, live: scores of both directions, the loss curve, the metrics."""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign import models
from jaxalign.methods import reward
from jaxalign.models.heads import rescale_scores
from jaxalign.rewards.model import make_scorer
from jaxalign.training import optimizer as optimizers
from tests.models import tiny

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers import models as tokenizer_models  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

# torch, accelerate and TRL warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

FAMILIES = ["llama3.1", "mistral", "qwen2-windows", "qwen3", "gpt2"]
TOLERANCE = 1e-4
PAD, EOS = 0, 2
STEPS, BATCH, EPOCHS, LEARNING_RATE = 20, 4, 4, 3e-3


def ragged(vocab: int = 160) -> list[np.ndarray]:
    """Texts of 1 to 96 tokens that end with EOS; beyond the windows (16) and the original context (32)."""
    rng = np.random.default_rng(3)
    return [np.append(rng.integers(4, vocab, n - 1), EOS) for n in (96, 61, 17, 2, 1, 40)]


def padded(texts) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids and their mask."""
    longest = max(map(len, texts))
    ids = np.stack([np.pad(text, (0, longest - len(text)), constant_values=PAD) for text in texts])
    return ids, np.stack([np.arange(longest) < len(text) for text in texts]).astype(np.int64)


def torch_scores(model, texts) -> np.ndarray:
    ids, mask = (torch.tensor(array) for array in padded(texts))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.numpy()[:, 0]


def draw_parameters(model, spread: float = 0.2):
    """Parameters with a spread that makes every part of a block matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_scale = ("norm" in key or ".ln_" in key) and key.endswith("weight")
            parameter.normal_(1.0 if is_scale else 0.0, spread)
    return model.eval()


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """`name -> (folder, scores)` of a classifier that transformers made and saved."""

    @functools.cache
    def make(name: str) -> tuple[Path, np.ndarray]:
        hf = dict(tiny.CONFIGS[name]) | {"eos_token_id": EOS, "pad_token_id": PAD, "num_labels": 1}
        config = AutoConfig.for_model(str(hf.pop("model_type")), **hf)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
        folder = tmp_path_factory.mktemp("classifier") / "model"
        draw_parameters(model).save_pretrained(folder)
        return folder, torch_scores(model, ragged())

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_a_classifier_from_transformers(classifiers, name):
    folder, wanted = classifiers(name)
    assert np.std(wanted) > 0.5
    found = make_scorer(*models.load(folder))(ragged())
    assert np.abs(found - wanted).max() <= TOLERANCE
    padded_texts = [np.append(text, [PAD] * 3) for text in ragged()]
    assert np.abs(make_scorer(*models.load(folder))(padded_texts) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mutated_config_is_noticed(classifiers, name):
    """Another epsilon, another score: the comparison can fail."""
    folder, wanted = classifiers(name)
    model, variables = models.load(folder)
    other = model.rebuild(replace(model.config, norm_eps=model.config.norm_eps * 1.5))
    assert np.abs(make_scorer(other, variables)(ragged()) - wanted).max() > 10 * TOLERANCE


def load_torch(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.config.num_labels == 1
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_our_folder_in_transformers(classifiers, name, tmp_path):
    """Import, export, and transformers computes the same scores from it as from its own folder."""
    folder, wanted = classifiers(name)
    models.save(tmp_path / "out", *models.load(folder), None, max_shard_size=60_000)
    np.testing.assert_array_equal(torch_scores(load_torch(tmp_path / "out"), ragged()), wanted)


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_a_policy_with_a_new_head_in_transformers(name, tmp_path):
    """From a causal checkpoint without a padding token; transformers lacks only the bias of normalised scores."""
    hf = dict(tiny.CONFIGS[name]) | {"eos_token_id": EOS}
    config = AutoConfig.for_model(str(hf.pop("model_type")), **hf)
    draw_parameters(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "policy")
    model, variables = models.add_score_head(*models.load(tmp_path / "policy"), jax.random.key(0))
    config, params = rescale_scores(model.config, variables["params"], 0.7, 0.3)
    folder = models.save(tmp_path / "rm", model.rebuild(config), {"params": params}, None)
    pad = json.loads((folder / "config.json").read_text())["pad_token_id"]
    assert pad == 159
    texts = [np.where(text == pad, 5, text) for text in ragged()]
    theirs = load_torch(folder)
    ids, mask = padded(texts)
    ids = np.where(mask > 0, ids, pad)
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()[:, 0]
    found = make_scorer(*models.load(folder))(texts)
    assert np.std(found) > 0.5 and config.score_bias
    assert np.abs(found - config.score_bias - wanted).max() <= 3 * TOLERANCE


class Logs(TrainerCallback):
    """Everything that a trainer logs, one dict per step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.lines.append(dict(logs))


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(tokenizer_models.WordLevel({"<pad>": PAD, "<bos>": 1, "<eos>": EOS}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def make_pairs(margin: bool) -> list[dict]:
    """Ragged pairs, the same ones again in each epoch, so that the loss falls and every update shows in it."""
    draw = np.random.default_rng(0)

    def ids(least: int, most: int) -> list[int]:
        return draw.integers(4, 160, int(draw.integers(least, most))).tolist()

    rows = [
        {"prompt_ids": ids(3, 24), "chosen_ids": [*ids(1, 20), EOS], "rejected_ids": [*ids(1, 20), EOS]}
        for _ in range(STEPS * BATCH // EPOCHS)
    ]
    return [{**row, "margin": float(draw.random())} if margin else row for row in rows] * EPOCHS


def run_trl(folder: Path, pairs, out: Path, coefficient: float | None) -> list[dict[str, float]]:
    rows = [
        {**pair, **{name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")}} for pair in pairs
    ]
    logs = Logs()
    settings = trl.RewardConfig(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
        center_rewards_coefficient=coefficient,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
    )
    trainer = trl.RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32),
        settings,
        train_dataset=Dataset.from_list(rows).remove_columns("prompt_ids"),
        processing_class=tokenizer(),
        callbacks=[logs],
    )
    trainer.train()
    return logs.lines


def run_ours(folder: Path, pairs, coefficient: float | None) -> list[dict[str, float]]:
    model, variables = models.load(folder)
    optimizer, schedule = optimizers.make_optimizer(
        optimizers.Config(learning_rate=LEARNING_RATE, lr_scheduler_type="linear"), STEPS
    )
    config = reward.Config(center_rewards_coefficient=coefficient)
    state, frozen = reward.init(config, model, variables, optimizer, jax.random.key(0))
    step = jax.jit(reward.make_step(config, model, optimizer, schedule), donate_argnums=0)
    lines, tokens = [], 0
    for start in range(0, len(pairs), BATCH):
        rows = pairs[start : start + BATCH]
        state, metrics = step(state, frozen, reward.make_batch(config, rows, length=128))
        tokens += sum(reward.count_tokens(row) for row in rows)
        lines.append({name: metric.value() for name, metric in metrics.items()} | {"num_tokens": tokens})
    return lines


@pytest.mark.parametrize(("margin", "coefficient"), [(False, None), (True, 0.05)], ids=["plain", "margin and centring"])
def test_curve(classifiers, tmp_path, margin, coefficient):
    """Loss within 1e-3 of its scale at every step, 1e-4 in the mean, and every metric of TRL's under its name."""
    folder, _ = classifiers("llama3.1")
    pairs = make_pairs(margin)
    theirs = run_trl(folder, pairs, tmp_path, coefficient)
    ours = run_ours(folder, pairs, coefficient)
    assert len(ours) == len(theirs) == STEPS
    column = lambda lines, name: np.array([line[name] for line in lines], np.float64)  # noqa: E731
    mine, peer = column(ours, "loss"), column(theirs, "loss")
    epoch = STEPS // EPOCHS
    assert peer[-epoch:].mean() < 0.9 * peer[:epoch].mean(), "nothing is learned, so nothing is compared"
    difference = np.abs(mine - peer) / np.maximum(peer, 0.1 * peer[0])
    assert difference.max() <= 1e-3 and difference.mean() <= 1e-4
    np.testing.assert_array_equal(column(ours, "num_tokens"), column(theirs, "num_tokens"))
    np.testing.assert_allclose(column(ours, "grad_norm"), column(theirs, "grad_norm"), rtol=1e-3)
    np.testing.assert_allclose(column(ours, "learning_rate"), column(theirs, "learning_rate"), rtol=1e-5)
    for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin"):
        assert np.ptp(column(theirs, name)) > 0, name
        np.testing.assert_allclose(column(ours, name), column(theirs, name), rtol=1e-3, atol=1e-3, err_msg=name)
