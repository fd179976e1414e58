# pyright: reportMissingImports=false
"""TRL 1.16.0, live: 20 steps of SFT and DPO on the same batches, its losses on the same log-probs, its metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.losses import PREFERENCE_LOSSES, PreferenceLogps
from jaxalign.methods import preference, sft
from jaxalign.models.pretrained import load
from jaxalign.training import optimizer as optimizers

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback  # noqa: E402

# torch, accelerate and TRL warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

STEPS, BATCH, EPOCHS, LEARNING_RATE, WEIGHT_DECAY, BETA = 20, 4, 4, 5e-3, 0.1, 0.1
VOCAB, EOS = 211, 2
METRICS = ["entropy", "mean_token_accuracy"]
DPO_METRICS = [
    *METRICS,
    *(f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")),
    "rewards/accuracies",
    "rewards/margins",
]


class TokenizedDPOTrainer(trl.DPOTrainer):
    """DPOTrainer that takes rows of token ids as they are; TRL 1.16.0 has no such option."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class Logs(TrainerCallback):
    """Everything that a trainer logs, one dict per step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.lines.append(dict(logs))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Llama with wide logits, and the same with noise on its weights as a reference."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    policy, reference = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reference")
    model.save_pretrained(policy)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(reference)
    return policy, reference


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, list[int]]]:
    """Ragged pairs, the same ones again in each epoch, so that the loss falls and every update shows in it."""
    draw = np.random.default_rng(0)

    def ids(least: int, most: int) -> list[int]:
        return draw.integers(3, VOCAB, int(draw.integers(least, most))).tolist()

    rows = [
        {"prompt_ids": ids(3, 24), "chosen_ids": [*ids(1, 20), EOS], "rejected_ids": [*ids(1, 20), EOS]}
        for _ in range(STEPS * BATCH // EPOCHS)
    ]
    return rows * EPOCHS


def training_arguments(folder: Path) -> dict[str, Any]:
    """One optimiser step per batch, batches in the data set's order, float32."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """Knows the special ids; the trainers read nothing else from it."""
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": EOS}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def read_torch(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trl_sft(folder: Path, pairs, out: Path, options: dict) -> list[dict[str, float]]:
    rows = [
        {
            "input_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "labels": [-100] * len(pair["prompt_ids"]) + pair["chosen_ids"],
        }
        for pair in pairs
    ]
    logs = Logs()
    trainer = trl.SFTTrainer(
        read_torch(folder),
        trl.SFTConfig(**training_arguments(out), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[logs],
    )
    trainer.train()
    return logs.lines


def trl_dpo(policy: Path, reference: Path, pairs, out: Path, loss_type: str) -> list[dict[str, float]]:
    logs = Logs()
    trainer = TokenizedDPOTrainer(
        read_torch(policy),
        read_torch(reference),
        trl.DPOConfig(beta=BETA, loss_type=[loss_type], **training_arguments(out)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        callbacks=[logs],
    )
    trainer.train()
    return logs.lines


def make_optimizer() -> tuple[optax.GradientTransformation, optimizers.Schedule]:
    return optimizers.make_optimizer(
        optimizers.Config(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, lr_scheduler_type="linear"), STEPS
    )


def batches(rows: list) -> list[list]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def run_sft(folder: Path, pairs, options: dict) -> list[dict[str, float]]:
    model, variables = load(folder)
    optimizer, schedule = make_optimizer()
    config = sft.Config(**options)
    state, frozen = sft.init(config, model, variables, optimizer, jax.random.key(0))
    step = jax.jit(sft.make_step(config, model, optimizer, schedule), donate_argnums=0)
    rows = [
        {
            "input_ids": np.array(pair["prompt_ids"] + pair["chosen_ids"], np.int32),
            "loss_mask": np.arange(len(pair["prompt_ids"]) + len(pair["chosen_ids"])) >= len(pair["prompt_ids"]),
        }
        for pair in pairs
    ]
    lines, tokens = [], 0
    for rows_of_step in batches(rows):
        state, metrics = step(state, frozen, sft.make_batch(config, rows_of_step, length=64))
        tokens += sum(sft.count_tokens(row) for row in rows_of_step)
        lines.append({name: metric.value() for name, metric in metrics.items()} | {"num_tokens": tokens})
    return lines


def run_dpo(policy: Path, reference: Path, pairs, loss_type: str) -> list[dict[str, float]]:
    model, variables = load(policy)
    _, ref_variables = load(reference)
    optimizer, schedule = make_optimizer()
    config = preference.Config(loss_type=loss_type, beta=BETA)
    state, frozen = preference.init(config, model, variables, optimizer, jax.random.key(0))
    step = jax.jit(preference.make_step(config, model, optimizer, schedule), donate_argnums=0)
    fill = jax.jit(preference.make_reference(config, model))
    lines, tokens = [], 0
    for rows in batches(pairs):
        state, metrics = step(state, frozen, fill(ref_variables, preference.make_batch(config, rows, length=64)))
        tokens += sum(preference.count_tokens(row) for row in rows)
        lines.append({name: metric.value() for name, metric in metrics.items()} | {"num_tokens": tokens})
    return lines


def column(lines: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines], np.float64)


def assert_same_curve(ours: list[dict[str, float]], theirs: list[dict[str, float]], least: float = 0.1) -> None:
    """Loss within 1e-3 of max(loss, a tenth of the first) at every step, 1e-4 in the mean; same schedule and counts."""
    assert len(ours) == len(theirs) == STEPS
    mine, peer = column(ours, "loss"), column(theirs, "loss")
    epoch = STEPS // EPOCHS
    moved = abs(peer[-epoch:].mean() / peer[:epoch].mean() - 1)
    assert moved > least, "nothing is learned, so nothing is compared"
    difference = np.abs(mine - peer) / np.maximum(peer, 0.1 * peer[0])
    assert difference.max() <= 1e-3
    assert difference.mean() <= 1e-4
    np.testing.assert_allclose(column(ours, "learning_rate"), column(theirs, "learning_rate"), rtol=1e-5)
    np.testing.assert_array_equal(column(ours, "num_tokens"), column(theirs, "num_tokens"))
    np.testing.assert_allclose(column(ours, "grad_norm"), column(theirs, "grad_norm"), rtol=1e-3)


def assert_same_metrics(ours: list[dict[str, float]], theirs: list[dict[str, float]], names: list[str]) -> None:
    """Metrics of the first batch to rounding, of the later ones as far as the curves agree."""
    for name in names:
        mine, peer = column(ours, name), column(theirs, name)
        assert np.ptp(peer) > 0, name
        np.testing.assert_allclose(mine[0], peer[0], rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(mine, peer, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.2}])
def test_sft_curve(folders, pairs, tmp_path, options):
    theirs = trl_sft(folders[0], pairs, tmp_path, options)
    ours = run_sft(folders[0], pairs, options)
    for name in ("loss", "grad_norm"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5), name
    assert_same_curve(ours, theirs)
    assert_same_metrics(ours, theirs, METRICS)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_dpo_curve(folders, pairs, tmp_path, loss_type):
    policy, reference = folders
    theirs = trl_dpo(policy, reference, pairs, tmp_path, loss_type)
    ours = run_dpo(policy, reference, pairs, loss_type)
    assert_same_curve(ours, theirs)
    assert_same_metrics(ours, theirs, DPO_METRICS)


def trl_loss(
    loss_type: str, logps: np.ndarray, ref_sums: np.ndarray, lengths: np.ndarray, label_smoothing=0.0
) -> float:
    """DPOTrainer's own loss code on given log-probs: chosen rows first, one prompt token before each completion."""
    width = logps.shape[1]
    mask = torch.tensor(np.arange(width + 1)[None] < lengths[:, None] + 1).long()
    mask[:, 0] = 0
    values = torch.tensor(logps) * mask[:, 1:]
    zeros = torch.zeros_like(values)
    outputs = SimpleNamespace(log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        beta=BETA,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        _metrics={"eval": {name: [] for name in [*DPO_METRICS, "num_tokens"]}},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor(ref_sums[: len(ref_sums) // 2]),
        "ref_rejected_logps": torch.tensor(ref_sums[len(ref_sums) // 2 :]),
    }
    return float(trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_loss_of_each_pair(loss_type):
    """A batch of one pair at a time, so that each value is compared and not only their mean."""
    draw = np.random.default_rng(1)
    count, width = 64, 24
    lengths = draw.integers(1, width + 1, (count, 2))
    real = np.arange(width) < lengths[..., None]
    logps = -draw.gamma(2.0, 2.0, (count, 2, width)) * real
    ref_logps = (logps + draw.normal(0.0, 1.0, logps.shape)) * real
    theirs = [trl_loss(loss_type, logps[i], ref_logps[i].sum(-1), lengths[i]) for i in range(count)]
    log_ratios = jnp.asarray((logps - ref_logps).sum(-1))
    sizes = jnp.asarray(lengths)
    ours = PREFERENCE_LOSSES[loss_type](
        PreferenceLogps(log_ratios[:, 0], log_ratios[:, 1], sizes[:, 0], sizes[:, 1]), beta=BETA
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    assert np.ptp(theirs) > 1


def test_label_smoothing_is_trl_robust_before_its_correction():
    """TRL has no cDPO; its `robust` is `[-(1-e) log s + e log s'] / (1-2e)`, the same terms with another sign."""
    logps = np.array([[-3.0, -1.0], [-2.0, -2.5]])
    ref_sums, lengths, e = np.array([-5.0, -4.0]), np.array([2, 2]), 0.2
    robust = trl_loss("robust", logps, ref_sums, lengths, label_smoothing=e) * (1 - 2 * e)
    plain = trl_loss("sigmoid", logps, ref_sums, lengths)
    flipped = trl_loss("sigmoid", logps[::-1].copy(), ref_sums[::-1].copy(), lengths)
    assert robust == pytest.approx((1 - e) * plain - e * flipped, rel=1e-6)
    ratios = jnp.asarray(logps.sum(-1) - ref_sums)
    pair = PreferenceLogps(ratios[:1], ratios[1:], jnp.array([2]), jnp.array([2]))
    ours = PREFERENCE_LOSSES["sigmoid"](pair, beta=BETA, label_smoothing=e)
    assert float(ours[0]) == pytest.approx((1 - e) * plain + e * flipped, rel=1e-5)
