# pyright: reportMissingImports=false
"""TRL 1.16.0, live: the code of its GRPO, RLOO and reward trainers on given log-probs and scores.

In float64, but for the constants that TRL rounds to float32.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    ADVANTAGES,
    AGGREGATIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    RATIO_LEVELS,
    aggregate,
    bias_corrected,
    bradley_terry,
    clip_metrics,
    count_batch,
    normalize_then_sum,
    policy_options,
    sum_scores,
)

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

# torch, accelerate and TRL warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

MAX_STEPS = 12
LENGTHS = np.array([12, 1, 7, 3, 5, 2, 9, 4])
MASK = np.arange(MAX_STEPS) < LENGTHS[:, None]
COMPLETIONS = np.where(MASK, np.arange(len(LENGTHS))[:, None], -1)
# A rollout buffer of three optimiser batches, this one among them.
STEPS_PER_GENERATION, BUFFER_TOKENS = 3, 150
ACCELERATOR = SimpleNamespace(
    device="cpu",
    num_processes=1,
    process_index=0,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)
OPTIONS = {
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
# TRL's loss_type is a loss and an aggregation.
LOSS_TYPES = {
    "grpo": ("clip", "grpo"),
    "bnpo": ("clip", "bnpo"),
    "dapo": ("clip", "dapo"),
    "dr_grpo": ("clip", "dr_grpo"),
    "luspo": ("clip", "luspo"),
    "cispo": ("cispo", "dapo"),
    "sapo": ("sapo", "grpo"),
    "vespo": ("vespo", "dapo"),
}


def tokens(spread: float) -> tuple[np.ndarray, ...]:
    """Log-probs of the policy, the old policy and the reference, and one advantage per completion."""
    draw = np.random.default_rng(7)
    logps = -draw.gamma(2.0, 1.0, MASK.shape)
    old_logps, ref_logps = (logps + draw.normal(0, spread, MASK.shape) for _ in range(2))
    return logps, old_logps, ref_logps, draw.normal(0, 1, len(LENGTHS))


def trl_grpo(loss_type, level, options, beta, corrected, case):
    """GRPOTrainer's own loss: value, gradient and metrics."""
    logps, old_logps, ref_logps, advantages = (torch.tensor(x) for x in case)
    logps.requires_grad_()
    mask = torch.tensor(MASK).long()
    metrics = defaultdict(list)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        args=SimpleNamespace(**options, use_bias_correction_kl=corrected, steps_per_generation=STEPS_PER_GENERATION),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=options["epsilon_low"],
        epsilon_high=options["epsilon_high"],
        beta=beta,
        max_completion_length=MAX_STEPS,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        _metrics={"train": metrics},
    )
    inputs = {
        "prompt_ids": torch.zeros((len(LENGTHS), 1)).long(),
        "prompt_mask": torch.ones((len(LENGTHS), 1)).long(),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps,
        "num_items_in_batch": torch.tensor(float(BUFFER_TOKENS)),
    }
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logps.grad.numpy(), {name: values[0] for name, values in metrics.items()}


def our_grpo(loss_type, level, options, beta, corrected, case):
    logps, old_logps, ref_logps, advantages = case
    name, aggregation = LOSS_TYPES[loss_type]
    chosen = {option: options[option] for option in policy_options(name) if option in options}
    counts = count_batch(
        np.ones(len(LENGTHS)), COMPLETIONS, max_steps=MAX_STEPS, window_tokens=BUFFER_TOKENS / STEPS_PER_GENERATION
    )

    def loss(logps):
        n = len(LENGTHS)
        log_ratios = RATIO_LEVELS[level](logps, old_logps, COMPLETIONS, n)
        own_level = "sequence_sum" if name == "vespo" else level
        terms = POLICY_LOSSES[name](
            RATIO_LEVELS[own_level](logps, old_logps, COMPLETIONS, n),
            jnp.broadcast_to(jnp.asarray(advantages)[:, None], MASK.shape),
            logps,
            **chosen,
        )
        kl = KL_ESTIMATORS["k3"](logps, ref_logps)
        kl = bias_corrected(kl, log_ratios) if corrected else kl
        rule = AGGREGATIONS[aggregation]
        value = aggregate(rule, terms.loss + beta * kl, COMPLETIONS, n, total=rule.total(counts))
        return value, clip_metrics(terms, COMPLETIONS, n, per_completion=level == "sequence")

    with jax.enable_x64(True):
        (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(logps)
        return float(value), np.asarray(grads), {name: metric.value() for name, metric in metrics.items()}


# VESPO takes ratios of its own, and TRL refuses another level.
LEVELS = [
    (name, level) for name in LOSS_TYPES for level in ("token", "sequence") if (name, level) != ("vespo", "sequence")
]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_grpo_losses(loss_type, level, beta):
    options = {**OPTIONS, "epsilon_high": 1.3} if loss_type == "cispo" else OPTIONS
    # Wide enough that completions are clipped too.
    compare(loss_type, level, options, beta, True, tokens(0.9 if level == "sequence" else 0.3))


def test_uncorrected_kl():
    compare("dapo", "token", OPTIONS, 0.1, False, tokens(0.3))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_two_sided_clip(level):
    """Ratios far beyond δ, where the plain clip costs several times more."""
    case = tokens(1.5)
    theirs = compare("dapo", level, {**OPTIONS, "delta": 1.5}, 0.0, False, case)
    assert theirs + 0.01 < trl_grpo("dapo", level, OPTIONS, 0.0, False, case)[0]


def compare(*choices) -> float:
    value, grads, metrics = trl_grpo(*choices)
    ours = our_grpo(*choices)
    assert ours[0] == pytest.approx(value, rel=1e-7)
    np.testing.assert_allclose(ours[1], grads, rtol=1e-7, atol=1e-10)
    assert np.abs(grads).max() > 1e-4
    metrics = {name.replace("cispo_clip_ratio", "clip_ratio/high_mean"): metrics[name] for name in metrics}
    shared = [name for name in metrics if name.startswith("clip_ratio")]
    # TRL has no smallest or largest fraction for CISPO, and we have none of it for losses that do not clip.
    assert set(shared) <= set(ours[2])
    for name in shared:
        assert ours[2][name] == pytest.approx(metrics[name], rel=1e-5), name
        assert name.endswith("low_min") or metrics[name] > 0, name
    return value


def test_rloo_loss():
    """TRL's RLOO clips the ratio of whole completions."""
    logps, old_logps, _, advantages = tokens(0.1)
    theirs = torch.tensor(logps, requires_grad=True)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (theirs, torch.zeros_like(theirs), None),
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    mask = torch.tensor(MASK).long()
    inputs = {
        "prompt_ids": torch.zeros((len(LENGTHS), 1)).long(),
        "prompt_mask": torch.ones((len(LENGTHS), 1)).long(),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(advantages),
        "old_logps": torch.tensor((old_logps * MASK).sum(1)),
    }
    wanted = trl.RLOOTrainer._compute_loss(trainer, None, inputs)
    wanted.backward()

    def loss(logps):
        log_ratios = RATIO_LEVELS["sequence_sum"](logps, old_logps, COMPLETIONS, len(LENGTHS))
        shared = jnp.broadcast_to(jnp.asarray(advantages)[:, None], MASK.shape)
        terms = POLICY_LOSSES["clip"](log_ratios, shared, logps, epsilon_low=0.2, epsilon_high=0.2)
        return aggregate(AGGREGATIONS["grpo"], terms.loss, COMPLETIONS, len(LENGTHS), total=len(LENGTHS))

    with jax.enable_x64(True):
        value, grads = jax.value_and_grad(loss)(jnp.asarray(logps))
    assert float(value) == pytest.approx(wanted.item(), rel=1e-7)
    np.testing.assert_allclose(grads, theirs.grad.numpy(), rtol=1e-7, atol=1e-10)


NAN = float("nan")
# Two rewards of four prompts with four completions each: a None here and there, a completion without any, a prompt
# whose scores are equal and one with a single score.
SCORES = np.random.default_rng(2).normal(1, 2, (16, 2))
SCORES[1, 0] = SCORES[6, 1] = NAN
SCORES[3] = SCORES[9] = SCORES[10] = SCORES[11] = NAN
SCORES[12:16] = 0.1
WEIGHTS = np.array([1.0, 0.4])
GROUPS = np.repeat(np.arange(4), 4)
STEPS = 5
ROLLOUT_LENGTHS = np.random.default_rng(3).integers(1, STEPS + 1, 16)
ROLLOUT_MASK = np.arange(STEPS) < ROLLOUT_LENGTHS[:, None]


def trl_advantages(trainer_class, monkeypatch, **choices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The advantages that a trainer gives to a made-up rollout, with the log-probs of policy and reference."""
    draw = np.random.default_rng(4)
    old_logps, ref_logps = (-draw.gamma(2.0, 1.0, (16, STEPS)) for _ in range(2))
    ids = [[3] * int(n) for n in ROLLOUT_LENGTHS]
    model, reference = SimpleNamespace(training=True), object()

    def read(model, *args, **kwargs):
        return torch.tensor(ref_logps if model is reference else old_logps), None, None

    rollout = [[[1, 2]] * 16, ids, None, ["text"] * 16, None, {}, None, None]
    if trainer_class is trl.RLOOTrainer:
        rollout = [rollout[0], ids, rollout[3]]
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        model=model,
        ref_model=reference,
        environment_factories=None,
        environments=None,
        tools=None,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        args=SimpleNamespace(
            per_device_train_batch_size=16,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        num_iterations=1,
        num_generations=4,
        use_vllm=False,
        reward_weights=torch.tensor(WEIGHTS),
        reward_funcs=[None, None],
        reward_func_names=["one", "two"],
        reward_clip_range=None,
        normalize_advantages=False,
        beta=0.0,
        _generate=lambda prompts: rollout,
        _calculate_rewards=lambda *args: torch.tensor(SCORES),
        _get_per_token_logps_and_entropies=read,
        _pending_extra_logs={},
        _pending_metrics={},
        _metrics={"train": defaultdict(list)},
        _logs={
            name: defaultdict(list) if name in ("rewards", "extra") else []
            for name in ("prompt", "completion", "rewards", "advantages", "extra", "images")
        },
    )
    trainer.__dict__.update(choices)
    module = __import__(trainer_class.__module__, fromlist=["_"])
    monkeypatch.setattr(module, "gather", lambda x: x)
    monkeypatch.setattr(module, "gather_object", lambda x: x)
    monkeypatch.setattr(module, "disable_gradient_checkpointing", lambda *args: nullcontext())
    out = trainer_class._generate_and_score_completions(trainer, [{"prompt": "p"}] * 16)
    return out["advantages"].numpy(), old_logps, ref_logps


def our_advantages(name, kl, kl_coef=0.0):
    with jax.enable_x64(True):
        scores = sum_scores(SCORES, WEIGHTS)
        spread = ADVANTAGES[name](scores, GROUPS, kl, ROLLOUT_MASK, kl_coef=kl_coef)
    np.testing.assert_array_equal(np.asarray(spread)[~ROLLOUT_MASK], 0)
    # Every completion has a token, and all its tokens the same advantage.
    np.testing.assert_array_equal(spread, np.where(ROLLOUT_MASK, np.asarray(spread)[:, :1], 0))
    return np.asarray(spread)[:, 0]


@pytest.mark.parametrize("name", ["group", "batch", "none"])
def test_group_advantages(name, monkeypatch):
    theirs, _, _ = trl_advantages(
        trl.GRPOTrainer, monkeypatch, scale_rewards=name, multi_objective_aggregation="sum_then_normalize"
    )
    np.testing.assert_allclose(our_advantages(name, np.zeros((16, STEPS))), theirs, rtol=1e-7, atol=1e-9)
    assert np.count_nonzero(np.abs(theirs) > 0.1) > 5


def test_gdpo_advantages(monkeypatch):
    theirs, _, _ = trl_advantages(trl.GRPOTrainer, monkeypatch, multi_objective_aggregation="normalize_then_sum")
    with jax.enable_x64(True):
        ours = normalize_then_sum(SCORES, GROUPS, WEIGHTS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9)
    assert np.count_nonzero(np.abs(theirs) > 0.1) > 5


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_advantages(beta, monkeypatch):
    """The KL of a completion, k1 summed over its tokens, comes off its score before the baseline is taken."""
    theirs, old_logps, ref_logps = trl_advantages(trl.RLOOTrainer, monkeypatch, beta=beta)
    kl = np.asarray(KL_ESTIMATORS["k1"](old_logps, ref_logps))
    ours = our_advantages("leave_one_out", kl, beta)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(np.abs(theirs) > 0.1) > 5


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("with_margins", [False, True])
def test_reward_loss(coefficient, with_margins):
    draw = np.random.default_rng(5)
    chosen, rejected, margins = draw.normal(0, 2, (3, 32))
    theirs = torch.tensor(np.concatenate([chosen, rejected])[:, None], requires_grad=True)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=ACCELERATOR,
        _total_train_tokens=0,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    inputs = {"attention_mask": torch.ones(1), **({"margin": torch.tensor(margins)} if with_margins else {})}
    wanted = trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=theirs), inputs)
    wanted.backward()

    def loss(chosen, rejected):
        extra = {"margins": jnp.asarray(margins)} if with_margins else {}
        return bradley_terry(chosen, rejected, center_rewards_coefficient=coefficient or 0.0, **extra).mean()

    with jax.enable_x64(True):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(chosen), jnp.asarray(rejected))
    assert float(value) == pytest.approx(wanted.item(), rel=1e-7)
    np.testing.assert_allclose(np.concatenate(grads), theirs.grad.numpy()[:, 0], rtol=1e-7)
