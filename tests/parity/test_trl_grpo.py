# pyright: reportMissingImports=false
"""TRL 1.16.0's GRPO trainer, live: one rollout, its one or two updates, the same losses, metrics and parameters.

Rollouts are given through `rollout_func`, not drawn; all else is TRL's code: log-probs, rewards, advantages, loss,
optimiser.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxalign import models
from jaxalign.methods import grpo
from jaxalign.methods.offline import Layout
from jaxalign.methods.rollout import pack_prompts, rollout_metrics, run_passes
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.types import Experience
from tests.parity.live import QUIET
from tests.parity.test_trl_ppo import EOS, EPSILON, VOCAB, compare, make_torch_models, tokenizer

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

# torch, accelerate and TRL warn about their own deprecations.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PROMPTS, SIZE, STEPS, WIDTH = 4, 4, 12, 16
COUNT = PROMPTS * SIZE
LEARNING_RATE = 4e-3


def draw() -> SimpleNamespace:
    """Ragged prompts and completions: some end with EOS, others are cut off; one completion is its EOS alone."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, VOCAB, int(n)).tolist() for n in rng.integers(2, WIDTH, PROMPTS)]
    lengths = np.where(rng.random(COUNT) < 0.7, rng.integers(2, STEPS, COUNT), STEPS)
    lengths[5] = 1
    completions = [rng.integers(4, VOCAB, int(n)).tolist() for n in lengths]
    for each in completions:
        if len(each) < STEPS:
            each[-1] = EOS
    assert 3 < (lengths == STEPS).sum() < COUNT - 3
    # All completions of the last prompt are equally good.
    scores = np.where(np.arange(COUNT) < COUNT - SIZE, rng.normal(0, 2, COUNT), 0.5).astype(np.float32)
    return SimpleNamespace(prompts=prompts, completions=completions, lengths=lengths, scores=scores)


def run_trl(rollout, folder: Path, iterations: int, settings: dict[str, Any]) -> SimpleNamespace:
    """The updates of one rollout: TRL's losses and metrics, and what it made of the policy (in `folder`)."""
    parts = make_torch_models(0.2)
    for role in ("policy", "reference"):
        parts[role].save_pretrained(folder / role)
    seen = SimpleNamespace(losses=[], order=[])

    def rollout_func(prompts, trainer):
        order = [int(prompt) for prompt in prompts]
        seen.order = [SIZE * prompt + i % SIZE for i, prompt in enumerate(order)]
        assert all(order[i] == order[i - i % SIZE] for i in range(COUNT))
        return {
            "prompt_ids": [rollout.prompts[prompt] for prompt in order],
            "completion_ids": [rollout.completions[number] for number in seen.order],
            "logprobs": None,
        }

    args = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=COUNT,
        num_generations=SIZE,
        num_iterations=iterations,
        max_completion_length=STEPS,
        max_steps=iterations,
        learning_rate=LEARNING_RATE,
        adam_epsilon=EPSILON,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        **QUIET,
        **settings,
    )
    trainer = trl.GRPOTrainer(
        str(folder / "policy"),
        lambda completion_ids, **_: [float(rollout.scores[number]) for number in seen.order],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(PROMPTS)]),
        processing_class=tokenizer(),
        rollout_func=rollout_func,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(parts["reference"].state_dict())
    compute_loss = trainer.compute_loss

    def kept(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        seen.losses.append(loss.item())
        return loss

    trainer.compute_loss = kept
    trainer.train()
    trainer.model.save_pretrained(folder / "policy_after")
    seen.logged = [each for each in trainer.state.log_history if "loss" in each]
    return seen


def run_ours(config: grpo.Config, rollout, folder: Path) -> tuple[Any, list[dict[str, float]]]:
    """The same rollout: the parameters after its updates, and the metrics of each."""
    (model, variables), reference = (models.load(folder / role) for role in ("policy", "reference"))
    optimizer = optax.adam(LEARNING_RATE, eps=EPSILON)
    state, frozen = grpo.init(config, model, variables, optimizer, jax.random.key(0))
    experience = Experience(
        prompts=np.stack([np.pad(each, (0, WIDTH - len(each))) for each in rollout.prompts]).astype(np.int32),
        prompt_lengths=np.array([len(each) for each in rollout.prompts], np.int32),
        examples=np.arange(PROMPTS),
        tokens=np.stack([np.pad(each, (0, STEPS - len(each))) for each in rollout.completions]).astype(np.int32),
        lengths=rollout.lengths.astype(np.int32),
        finish=(rollout.lengths < STEPS).astype(np.int32),
        scores=rollout.scores[:, None].astype(np.float64),
        fields={},
    )
    logps = jax.jit(grpo.make_logps(config, model))
    passes = {"sampler_logps": lambda p, b: logps({**frozen, **p}, b)}
    if grpo.needs_reference(config):
        passes["ref_logps"] = lambda p, b: logps(reference[1], b)
    layout, mesh = Layout(PROMPTS, 2, 64), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    experience = run_passes(experience, passes, state.params, layout, mesh)
    experience, measured, _ = grpo.estimate(config, experience, grpo.start_carry(config))
    # Two micro-batches, where TRL has one.
    batch = pack_prompts(experience, np.arange(PROMPTS), layout, fields=grpo.fields(config))
    batch = replace(batch, fields={**batch.fields, **grpo.batch_fields(config, experience, 2)})
    step, found = jax.jit(grpo.make_step(config, model, optimizer)), []
    once = {**measured, **grpo.drawn_metrics(config, experience), **rollout_metrics(experience)}
    once = {name: metric.value() for name, metric in once.items()}
    for _ in range(config.num_iterations):
        state, metrics = step(state, frozen, batch)
        found.append({**once, **{name: metric.value() for name, metric in metrics.items()}})
    return state.params, found


CLIP = {"epsilon": 0.05, "epsilon_high": 0.15}
# Updates per rollout, settings of both, TRL's own, ours.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "default": (1, {}, {}, {}),
    "asymmetric clip": (2, {**CLIP, "temperature": 0.7}, {}, {}),
    "two-sided clip": (2, {**CLIP, "delta": 1.3, "loss_type": "bnpo"}, {}, {}),
    "reference": (2, {**CLIP, "beta": 0.1, "use_bias_correction_kl": True}, {}, {}),
    "grpo": (2, {**CLIP, "beta": 0.1, "use_bias_correction_kl": False, "loss_type": "grpo"}, {}, {}),
    "dr_grpo": (2, {**CLIP, "loss_type": "dr_grpo"}, {"scale_rewards": "none"}, {"advantage": "none"}),
    "truncated masked": (
        2,
        {**CLIP, "mask_truncated_completions": True},
        {"scale_rewards": "batch"},
        {"advantage": "batch"},
    ),
    "sequences": (
        2,
        {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.15, "loss_type": "grpo"},
        {},
        {},
    ),
}
LENGTHS = [f"completions/{kind}_{of}length" for kind in ("mean", "min", "max") for of in ("", "terminated_")]
METRICS = ["entropy", "reward", "reward_std", "frac_reward_zero_std", "completions/clipped_ratio"]
METRICS += LENGTHS + [f"clip_ratio/{name}_mean" for name in ("low", "high", "region")]


@pytest.mark.parametrize("name", CASES)
def test_updates_of_a_rollout(tmp_path, name):
    iterations, shared, theirs, ours = CASES[name]
    rollout = draw()
    seen = run_trl(rollout, tmp_path, iterations, {**shared, **theirs})
    config = grpo.Config(
        num_generations=SIZE, max_completion_length=STEPS, num_iterations=iterations, **{**shared, **ours}
    )
    params, found = run_ours(config, rollout, tmp_path)
    assert len(seen.losses) == len(seen.logged) == len(found) == iterations
    np.testing.assert_allclose([each["loss"] for each in found], seen.losses, rtol=1e-4, atol=1e-5)
    for own, logged in zip(found, seen.logged, strict=True):
        for metric in METRICS + (["kl"] if config.beta else []):
            # TRL tells of the rollout at its first update only, and two metrics are not always the same measure: with
            # the batch's standard deviation its zeros are the batch's, and its KL is the one that is corrected.
            if logged is not seen.logged[0] and (
                metric not in logged or (config.use_bias_correction_kl and metric == "kl")
            ):
                continue
            if metric != "frac_reward_zero_std" or config.advantage != "batch":
                assert own[metric] == pytest.approx(logged[metric], rel=1e-3, abs=1e-4), metric
    assert found[0]["entropy"] < 0.8 * np.log(VOCAB)
    compare(tmp_path, "policy", {"policy": params})
    if iterations > 1:
        # The second update is clipped, on both sides.
        assert min(found[1][f"clip_ratio/{side}_mean"] for side in ("low", "high")) > 0.02
        assert abs(seen.losses[1] - seen.losses[0]) > 1e-3
