# pyright: reportMissingImports=false
"""TRL, live: KTO's and AOT's loss code (1.16.0) and BCO's (1.12.0, the last with it), and steps of KTO on one model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    PREFERENCE_LOSSES,
    UNPAIRED_LOSSES,
    PreferenceLogps,
    UnpairedLogps,
    kto_baseline,
    running_mean,
)
from jaxalign.methods import unpaired_preference
from jaxalign.methods.unpaired_preference import Config
from jaxalign.models.pretrained import load
from jaxalign.training import optimizer as optimizers

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from tests.parity import test_trl_curves as curves  # noqa: E402
from tests.parity.live import older_trl  # noqa: E402
from tests.parity.test_trl_curves import folders  # noqa: E402, F401

# torch, accelerate and TRL warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

COUNT, WIDTH, STEPS, BATCH = 9, 12, 5, 5
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


def drawn(dtype: str, count: int = COUNT, seed: int = 1):
    """Token log-probs of completions and mismatched ones, policy and reference, lengths, and labels of both kinds."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, WIDTH + 1, (2, count))
    real = np.arange(WIDTH) < lengths[..., None]
    logps = -draw.gamma(2.0, 2.0, (2, count, WIDTH)) * real
    ref_logps = (logps - draw.normal(0.2, 0.5, logps.shape)) * real
    labels = np.append(draw.random(count - 1) < 0.6, False)
    labels[0] = True
    return logps.astype(dtype), ref_logps.astype(dtype), lengths, labels


def trl_kto(logps, ref_logps, lengths, labels, config: Config) -> tuple[float, np.ndarray, dict[str, Any]]:
    """KTOTrainer's own loss code on given log-probs: the loss, its gradient by them, and its metrics."""
    width = logps.shape[-1]
    mask = torch.tensor(np.arange(width + 1)[None] < lengths[0][:, None] + 1).long()
    mask[:, 0] = 0
    values = torch.tensor(logps[0], requires_grad=True)
    outputs = SimpleNamespace(log_probs=values, entropy=torch.zeros_like(values), mean_logits=torch.zeros_like(values))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        calculate_KL=config.loss_type == "kto",
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_type=config.loss_type,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        _compute_kl_logps=lambda *_: torch.tensor(logps[1].sum(-1)),
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(labels),
        "ref_logps": torch.tensor(ref_logps[0].sum(-1)),
        "ref_KL_logps": torch.tensor(ref_logps[1].sum(-1)),
    }
    loss = trl.KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    metrics = {name: found[-1] for name, found in trainer._metrics["eval"].items()}
    return float(loss), np.asarray(values.grad), metrics


def our_loss(config: Config, labels, mismatched, delta: float = 0.0):
    """`log_ratios -> loss`, from the pure functions: the baseline, the loss, the weights, the mean."""
    baselines = {"kto": lambda: kto_baseline(mismatched, jnp.ones(mismatched.shape)), "bco": lambda: delta}
    baseline = baselines.get(config.loss_type, lambda: 0.0)()
    weights = jnp.where(labels, config.desirable_weight, config.undesirable_weight)

    def loss(log_ratios):
        logps = UnpairedLogps(log_ratios, jnp.asarray(labels, log_ratios.dtype), baseline)
        return (weights * UNPAIRED_LOSSES[config.loss_type](logps, beta=config.beta)).mean()

    return loss, baseline


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["mixed", "all desirable", "all undesirable"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_loss_and_gradient(loss_type, kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        logps, ref_logps, lengths, labels = drawn(dtype)
        labels = {"mixed": labels, "all desirable": labels | True, "all undesirable": labels & False}[kind]
        config = Config(loss_type=loss_type, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
        wanted, slopes, metrics = trl_kto(logps, ref_logps, lengths, labels, config)
        ratios = jnp.asarray((logps - ref_logps).sum(-1))
        loss, baseline = our_loss(config, labels, ratios[1])
        found, gradient = jax.value_and_grad(loss)(ratios[0])
        assert found.dtype == dtype
        assert float(found) == pytest.approx(wanted, abs=TOLERANCE[dtype])
        # A completion's log-ratio is a sum: each of its tokens has its slope.
        np.testing.assert_allclose(np.broadcast_to(gradient[:, None], slopes.shape), slopes, atol=TOLERANCE[dtype])
        if loss_type == "kto":
            assert float(baseline) == pytest.approx(metrics["kl"], rel=1e-5) and metrics["kl"] > 0.1
        rewards = config.beta * np.asarray(ratios[0])
        for name, which in (("rewards/chosen", labels), ("rewards/rejected", ~labels)):
            assert (name in metrics) == which.any()
            if which.any():
                assert metrics[name] == pytest.approx(rewards[which].mean(), rel=1e-5)


def test_kto_without_a_gain_has_a_baseline_of_zero():
    logps, ref_logps, lengths, labels = drawn("float64")
    ref_logps[1] += 2.0 * (ref_logps[1] < 0)
    config = Config(beta=0.3)
    wanted, _, metrics = trl_kto(logps, ref_logps, lengths, labels, config)
    ratios = (logps - ref_logps).sum(-1)
    assert metrics["kl"] == 0 and ratios[1].mean() < -1
    assert float(our_loss(config, labels, ratios[1])[0](ratios[0])) == pytest.approx(wanted, abs=1e-6)


@pytest.fixture(scope="module")
def bco() -> ModuleType:
    """TRL 1.12's module of the BCO trainer."""
    return older_trl("experimental.bco.bco_trainer")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bco_over_batches(bco, dtype):
    """Five batches of changing size: the running mean, the loss and its gradient of each, delta after the batch."""
    accelerator = SimpleNamespace(use_distributed=False)
    trainer = SimpleNamespace(
        beta=0.3, running=bco.RunningMoments(accelerator), match_underlying_distribution=False, args=None
    )
    config = Config(loss_type="bco", beta=0.3)
    with jax.enable_x64(dtype == "float64"):
        mean = count = jnp.zeros((), dtype)
        for seed, size in enumerate((6, 3, 7, 2, 5)):
            logps, ref_logps, _, labels = drawn(dtype, size, seed)
            sums, ref_sums = logps[0].sum(-1), ref_logps[0].sum(-1)
            given = torch.tensor(sums, requires_grad=True)
            sides = (given[labels], given[~labels], torch.tensor(ref_sums[labels]), torch.tensor(ref_sums[~labels]))
            losses, _, _, delta = bco.BCOTrainer.bco_loss(trainer, *sides, None, None)
            losses.nanmean().backward()
            ratios = jnp.asarray(sums - ref_sums)
            mean, count = running_mean(mean, count, config.beta * ratios, jnp.ones(size))
            # TRL keeps the mean's increments in float32.
            assert float(mean) == pytest.approx(float(delta), abs=1e-6)
            loss, _ = our_loss(config, labels, ratios, float(delta))
            found, gradient = jax.value_and_grad(loss)(ratios)
            assert float(found) == pytest.approx(losses.nanmean().item(), abs=TOLERANCE[dtype])
            np.testing.assert_allclose(gradient, given.grad, atol=TOLERANCE[dtype])
    assert abs(float(delta)) > 0.05


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_over_a_batch(loss_type, label_smoothing, dtype):
    with jax.enable_x64(dtype == "float64"):
        logps, ref_logps, lengths, _ = drawn(dtype)
        flat = [x.reshape(2 * COUNT, *x.shape[2:]) for x in (logps, ref_logps, lengths)]
        wanted = curves.trl_loss(loss_type, flat[0], flat[1].sum(-1), flat[2], label_smoothing)
        sums = jnp.asarray(logps.sum(-1))
        ratios = jnp.asarray((logps - ref_logps).sum(-1))
        pairs = PreferenceLogps(
            ratios[0], ratios[1], jnp.asarray(lengths[0]), jnp.asarray(lengths[1]), sums[0], sums[1]
        )
        found = PREFERENCE_LOSSES[loss_type](pairs, beta=curves.BETA, label_smoothing=label_smoothing)
        assert float(found.mean()) == pytest.approx(wanted, abs=TOLERANCE[dtype])
        assert np.ptp(found) > 0.05


class TokenizedKTOTrainer(trl.KTOTrainer):
    """KTOTrainer that takes rows of token ids as they are, with the mismatched completion that it would have made."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        assert self.calculate_KL

        def rolled(examples):
            ids = examples["completion_ids"]
            return {"KL_completion_ids": [ids[-1], *ids[:-1]]}

        return dataset.map(rolled, batched=True, batch_size=args.per_device_train_batch_size)


def rows() -> list[dict[str, Any]]:
    draw = np.random.default_rng(4)

    def ids(least, most):
        return draw.integers(3, curves.VOCAB, int(draw.integers(least, most))).tolist()

    labels = draw.random(STEPS * BATCH) < 0.6
    return [
        {"prompt_ids": ids(3, 24), "completion_ids": [*ids(1, 20), curves.EOS], "label": bool(label)}
        for label in labels
    ]


def trl_curve(policy: Path, reference: Path, examples, out: Path) -> list[dict[str, float]]:
    logs = curves.Logs()
    settings = {**curves.training_arguments(out), "max_steps": STEPS, "per_device_train_batch_size": BATCH}
    trainer = TokenizedKTOTrainer(
        curves.read_torch(policy),
        curves.read_torch(reference),
        trl.KTOConfig(**settings, beta=0.3, desirable_weight=0.8),
        train_dataset=Dataset.from_list(examples),
        processing_class=curves.tokenizer(),
        callbacks=[logs],
    )
    trainer.train()
    return logs.lines


def our_curve(policy: Path, reference: Path, examples) -> list[dict[str, float]]:
    """In micro-batches of 2, 2 and 1, which TRL cannot do."""
    model, variables = load(policy)
    _, ref_variables = load(reference)
    optimizer, schedule = optimizers.make_optimizer(
        optimizers.Config(
            learning_rate=curves.LEARNING_RATE, weight_decay=curves.WEIGHT_DECAY, lr_scheduler_type="linear"
        ),
        STEPS,
    )
    config = Config(beta=0.3, desirable_weight=0.8)
    state, frozen = unpaired_preference.init(config, model, variables, optimizer, jax.random.key(0))
    step = jax.jit(unpaired_preference.make_step(config, model, optimizer, schedule), donate_argnums=0)
    fill = jax.jit(unpaired_preference.make_reference(config, model))
    lines, tokens = [], 0
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        batch = unpaired_preference.make_batch(config, part, micro_batch_size=2, length=128)
        state, metrics = step(state, frozen, fill(ref_variables, batch))
        tokens += sum(unpaired_preference.count_tokens(each) for each in part)
        lines.append({name: metric.value() for name, metric in metrics.items()} | {"num_tokens": tokens})
    return lines


def test_steps_of_kto(folders, tmp_path):  # noqa: F811
    """Every metric of every step: parameters move by the learning rate, so later ones follow the gradients."""
    policy, reference = folders
    examples = rows()
    theirs, found = trl_curve(policy, reference, examples, tmp_path), our_curve(policy, reference, examples)
    assert len(theirs) == len(found) == STEPS
    assert max(line["kl"] for line in theirs) > 0.01
    names = ["loss", "grad_norm", "learning_rate", "kl", "rewards/margins", "entropy", "num_tokens"]
    names += [f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
    for name in names:
        peer = curves.column(theirs, name)
        np.testing.assert_allclose(curves.column(found, name), peer, rtol=1e-3, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(found[0][name], peer[0], rtol=1e-4, atol=1e-5, err_msg=name)
