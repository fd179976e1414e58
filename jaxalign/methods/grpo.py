"""Policy gradients from groups of completions, without a critic: GRPO and its family, as choices that combine freely.

How an advantage is estimated (`advantage`), at which level ratios are taken (`importance_sampling_level`), what bounds
them (`policy_loss`), how tokens are summed (`loss_type`) and how the KL divergence from a reference enters (`beta`,
`kl_estimator`, `kl_in_reward`) are independent of each other. `PRESETS` are the papers' combinations.

An update without any trainer, from two prompts with three scored completions each:

    config = grpo.Config(num_generations=3)
    state, frozen = grpo.init(config, model, variables, optimizer, key)
    step = jax.jit(grpo.make_step(config, model, optimizer), donate_argnums=0)
    advantages = losses.group_advantages(scores, np.repeat([0, 1], 3)).reshape(2, 3)
    groups = [
        {"prompt_ids": prompt, "completion_ids": completions, "advantages": each}
        for (prompt, completions), each in zip(drawn, advantages)
    ]
    state, metrics = step(state, frozen, grpo.make_batch(config, groups))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import losses
from jaxalign.methods import balance, common
from jaxalign.methods.agreement import agreement, number_update
from jaxalign.methods.grpo_config import PRESETS, Config
from jaxalign.models import Model
from jaxalign.packing import Document, pack
from jaxalign.training.step import LossFn, Step, Totals
from jaxalign.training.step import make_step as make_training_step
from jaxalign.types import Array, Batch, Experience, Mean, Metrics, Variables

__all__ = ["PRESETS", "Config", "estimate", "init", "make_batch", "make_logps", "make_loss", "make_step"]

KIND = "prompt"
ONLINE = True
LEARNING_RATE = 1e-6

init = common.init
policy_of = common.policy_of
start_carry = common.start_nothing
make_logps = common.make_policy_logps


def needs_reference(config: Config) -> bool:
    """Whether log-probs of a reference enter."""
    return config.beta > 0


def rollout_prompts(config: Config, batch_size: int) -> int:
    """Prompts of a rollout, for batches of `batch_size` prompts."""
    return batch_size * config.steps_per_generation


def num_updates(config: Config) -> int:
    """Optimiser steps that learn from one rollout."""
    return config.steps_per_generation * config.num_iterations


def max_rollouts(config: Config) -> int:
    """Most rollouts that are drawn for one."""
    return config.max_rollouts if config.dynamic_sampling else 1


def keep(config: Config, experience: Experience) -> np.ndarray:
    """bool `[prompts]`, whose completions are learnt from; lengths are no signal, whatever `overlong_cache` is."""
    if not config.dynamic_sampling:
        return np.ones(len(experience.prompts), bool)
    scores = losses.sum_scores(experience.scores, _weights(config, experience))
    flat = losses.without_signal(scores, experience.groups)
    return ~np.asarray(flat).reshape(-1, experience.num_generations)[:, 0]


def schedule(config: Config, prompts: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Prompts of the rollout per update; every iteration takes the same batches in the same order, as TRL does."""
    del rng
    batches = [np.arange(start, min(start + batch_size, prompts)) for start in range(0, prompts, batch_size)]
    return batches * config.num_iterations


def passes(config: Config, *, narrow: bool) -> dict[str, Literal["policy", "reference"]]:
    """Fields that packed passes must fill, and by which model; `narrow` = computed in less than float32."""
    wanted: dict[str, Literal["policy", "reference"]] = {}
    trainer = config.old_logps == "trainer" or (config.old_logps == "auto" and narrow)
    # In the rewards the sampler's rounding would pass for a KL divergence.
    if trainer and (num_updates(config) > 1 or (needs_reference(config) and config.kl_in_reward)):
        wanted["old_logps"] = "policy"
    if needs_reference(config):
        wanted["ref_logps"] = "reference"
    return wanted


def fields(config: Config) -> tuple[str, ...]:
    """Fields per token that the loss reads."""
    old = ("old_logps",) if num_updates(config) > 1 else ()
    kl = ("ref_logps",) if needs_reference(config) and not config.kl_in_reward else ()
    return ("advantages", "loss_mask", "sampler_logps", *old, *kl)


def batch_fields(config: Config, experience: Experience, micro_batches: int, update: int = 0) -> dict[str, np.ndarray]:
    """Numbers of a whole batch: which update of its rollout it is, how many tokens in the loss the average one has."""
    mean = float(experience.fields["loss_mask"].sum()) / config.steps_per_generation
    return {"window_tokens": np.full(micro_batches, mean, np.float32), **number_update(update, micro_batches)}


def drawn_metrics(config: Config, drawn: Experience) -> Metrics:
    """Of the weighted scores of all that was drawn, whether it is learnt from or not."""
    outcomes = _outcomes(config, drawn)
    known = outcomes[~np.isnan(outcomes)]
    flat = np.asarray(losses.without_signal(outcomes, drawn.groups))
    metrics: dict[str, Any] = {"reward": Mean(float(known.sum()), float(len(known)))}
    if drawn.num_generations > 1:
        metrics["frac_reward_zero_std"] = Mean(float(flat.sum()), float(len(flat)))
    if len(known) > 1:
        metrics["reward_std"] = Mean(float(known.std(ddof=1)), 1.0)
    return metrics


def estimate(
    config: Config, experience: Experience, carry: dict[str, float]
) -> tuple[Experience, Metrics, dict[str, float]]:
    """Scores -> advantages, and metrics of what is learnt from."""
    mask, groups, known = experience.mask, experience.groups, dict(experience.fields)
    truncated = experience.finish == 0
    outcomes = _outcomes(config, experience)
    kl = np.zeros(mask.shape, np.float32)
    if config.kl_in_reward and needs_reference(config):
        drawn = known.get("old_logps", known["sampler_logps"])
        kl = np.asarray(losses.KL_ESTIMATORS[config.kl_estimator](drawn, known["ref_logps"])) * mask
    if config.multi_objective_aggregation == "normalize_then_sum":
        per_completion = losses.normalize_then_sum(experience.scores, groups, _weights(config, experience))
        advantages = np.asarray(per_completion)[:, None] * mask
    else:
        weight = config.beta if config.kl_in_reward else 0.0
        advantages = np.asarray(
            losses.ADVANTAGES[config.advantage](outcomes, groups, kl, mask, kl_coef=weight, gamma=config.gamma)
        )
    in_loss = mask & ~np.isnan(outcomes)[:, None]
    if config.mask_truncated_completions:
        in_loss &= ~truncated[:, None]
    known |= {"advantages": advantages.astype(np.float32), "loss_mask": in_loss.astype(np.float32)}
    known.setdefault("old_logps", known["sampler_logps"])
    metrics: dict[str, Any] = {}
    if config.kl_in_reward and needs_reference(config):
        metrics["kl"] = Mean(float(kl.sum()), float(mask.sum()))
    return replace(experience, fields=known), metrics, carry


def totals(config: Config, batch: Batch) -> Totals:
    """The loss's denominator."""
    counted = losses.count_batch(
        batch.present,
        common.in_loss(batch),
        max_steps=config.max_completion_length,
        window_tokens=batch.fields["window_tokens"][0],
    )
    return {"loss": jnp.asarray(losses.AGGREGATIONS[config.loss_type].total(counted))}


def make_loss(config: Config, model: Model) -> LossFn:
    """The loss of a micro-batch that carries `advantages`, `loss_mask`, and what the config makes it need."""
    names = losses.policy_options(config.policy_loss)
    options = {"epsilon_low": config.epsilon, "epsilon_high": config.upper}
    bound = {name: options[name] if name in options else getattr(config, name) for name in names}
    policy_loss = partial(losses.POLICY_LOSSES[config.policy_loss], **bound)
    level = losses.RATIO_LEVELS[config.importance_sampling_level]
    weight = balance.coefficient(config.router_aux_loss_coef, model)

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        key = None if config.disable_dropout else key
        variables = common.join_variables(params, frozen)
        tokens = common.read(model, variables, batch, key, config.logits_chunk, temperature=config.temperature)
        completions, n = common.in_loss(batch), batch.present.shape[0]
        fresh = jax.lax.stop_gradient(tokens.logps)
        ratios = level(tokens.logps, batch.fields.get("old_logps", fresh), completions, n)
        terms = policy_loss(ratios, batch.fields["advantages"], tokens.logps)
        per_token, real = terms.loss, (completions >= 0).astype(jnp.float32)
        metrics = {
            "entropy": common.masked_mean(tokens.entropy, real),
            **losses.clip_metrics(terms, completions, n, per_completion=config.importance_sampling_level != "token"),
            **agreement(tokens.logps, batch, real),
        }
        if "ref_logps" in batch.fields:
            kl = losses.KL_ESTIMATORS[config.kl_estimator](tokens.logps, batch.fields["ref_logps"])
            metrics["kl"] = common.masked_mean(kl, real)
            if config.use_bias_correction_kl:
                kl = losses.bias_corrected(kl, ratios)
            per_token = per_token + config.beta * kl
        value = losses.aggregate(losses.AGGREGATIONS[config.loss_type], per_token, completions, n, total=totals["loss"])
        return balance.add(weight, model, batch, tokens.aux, value, jax.lax.stop_gradient(metrics))

    return balance.couple(weight, model, loss, disable_dropout=config.disable_dropout)


def make_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array] | None = None,
) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`; jit it and donate the state."""
    return make_training_step(make_loss(config, model), partial(totals, config), optimizer, learning_rate)


def to_document(config: Config, example: common.Example) -> Document:
    """A prompt as trunk and its completions as branches.

    Args:
      config: the method's.
      example: `prompt_ids` int32; `completion_ids`, one int32 array per completion; `advantages` and, where more than
        one update is made per rollout, `old_logps`, with a KL in the loss `ref_logps`: per completion one float32
        array, per token, or one number for all of its tokens; `loss_mask` likewise, 1 by default; `sampler_logps`
        likewise, for a metric.

    Raises:
      ValueError: a field that the loss needs is missing.
    """
    branches = tuple(np.asarray(ids, np.int32) for ids in example["completion_ids"])
    given = {"loss_mask": [1.0] * len(branches), "sampler_logps": [np.nan] * len(branches), **example}
    if missing := [name for name in fields(config) if name not in given]:
        raise ValueError(f"with this config an example needs {missing[0]!r}: one array per completion, per token")
    known = {
        name: tuple(
            np.broadcast_to(np.asarray(each, np.float32), ids.shape)
            for each, ids in zip(given[name], branches, strict=True)
        )
        for name in fields(config)
    }
    return Document(np.asarray(example["prompt_ids"], np.int32), branches, fields=known)


def make_batch(config: Config, groups: Sequence[common.Example], *, update: int = 0, **layout: Any) -> Batch:
    """Packs groups (see `to_document`) into the batch of a rollout's `update`, from 0; `layout` as `packing.pack`."""
    documents = [to_document(config, group) for group in groups]
    size = max(len(each.branches) for each in documents)
    batch = pack(documents, completions=size, share_prompt=config.share_prompt, **layout)
    tokens = np.full(len(batch.present), np.asarray(batch.fields["loss_mask"]).sum(), np.float32)
    return replace(batch, fields={**batch.fields, "window_tokens": tokens, **number_update(update, len(tokens))})


def _weights(config: Config, experience: Experience) -> np.ndarray:
    return np.asarray(config.reward_weights or (1.0,) * experience.scores.shape[1])


def _outcomes(config: Config, experience: Experience) -> np.ndarray:
    """One number per completion: the weighted scores and, if wished, the punishment for great length."""
    outcomes = np.asarray(losses.sum_scores(experience.scores, _weights(config, experience)))
    if config.overlong_cache is None:
        return outcomes
    steps = config.max_completion_length
    return outcomes + np.asarray(
        losses.overlong_penalty(experience.lengths, max_length=steps, cache=config.overlong_cache)
    )
