"""Policy gradients from groups of completions, without a critic: GRPO and its family, as choices that combine freely.

How an advantage is estimated (`advantage`), at which level ratios are taken (`importance_sampling_level`), what bounds
them (`policy_loss`), how tokens are summed (`loss_type`) and how the KL divergence from a reference enters (`beta`,
`kl_estimator`, `kl_in_reward`) are independent of each other. `PRESETS` are the papers' combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import losses
from jaxalign.methods import common
from jaxalign.models import Model
from jaxalign.packing import Document, pack
from jaxalign.training.state import TrainState
from jaxalign.training.step import LossFn, Step, Totals
from jaxalign.training.step import make_step as make_training_step
from jaxalign.types import Array, Batch, Experience, Max, Mean, Metrics, PyTree, Variables

KIND = "prompt"
ONLINE = True
NEEDS_REFERENCE = False  # by default: see `needs_reference`
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Config:
    """Group-relative policy optimisation.

    Attributes:
      num_generations: completions per prompt, a group.
      max_completion_length: longest completion in tokens.
      temperature: of sampling, and of the policy whose log-probs the loss takes.
      advantage: key in `ADVANTAGES`: `group`, `batch`, `none`, `leave_one_out`, `reinforce_plus_plus`,
        `reinforce_plus_plus_baseline`.
      gamma: discount, of `reinforce_plus_plus` only.
      multi_objective_aggregation: several rewards are summed and then made into advantages, or the other way round
        (GDPO; with `advantage: group`).
      reward_weights: weight of each reward; None = 1 each, or as in `rollout.rewards`.
      importance_sampling_level: key in `RATIO_LEVELS`: `token`, `sequence` (GSPO), `sequence_token`, `sequence_sum`.
      policy_loss: key in `POLICY_LOSSES`: `clip`, `dual`, `cispo`, `sapo`, `vespo`.
      epsilon: how far a ratio may fall below 1.
      epsilon_high: how far it may rise above; None = `epsilon`. What it means to CISPO: see `cispo_bounds`.
      delta: second upper bound of the ratio where the advantage is negative; `clip` only.
      dual_clip: `dual` only.
      cispo_bounds: key in `CISPO_BOUNDS`: `absolute`, `relative`, `two_sided`.
      loss_type: key in `AGGREGATIONS`: `grpo`, `bnpo`, `dapo`, `dr_grpo`, `luspo`.
      beta: weight of the KL divergence from the reference; 0 = no reference is loaded.
      kl_estimator: `k1`, `k2`, `k3`.
      kl_in_reward: take the KL off the rewards instead of adding it to the loss.
      use_bias_correction_kl: multiply the KL in the loss by the probability ratio (DeepSeek-V3.2).
      num_iterations: passes over a rollout.
      steps_per_generation: optimiser steps that a rollout is split into; it has so many times `train.batch_size`
        prompts.
      old_logps: where log-probs before the first update come from: `sampler`, `trainer` (a pass of its own), or `auto`
        (the sampler in float32, the trainer in lower precision). A rollout for one update needs none: the ratio is 1.
      mask_truncated_completions: leave completions that did not end by themselves out of the loss.
      overlong_cache: DAPO's soft punishment over the last so many tokens before `max_completion_length`; None = none.
      dynamic_sampling: throw away groups whose scores are all equal, and draw until the batch is full.
      max_rollouts: most rollouts drawn for one batch under `dynamic_sampling`.
      disable_dropout: no dropout even if the model's config has some.
      share_prompt: compute the prompt once for all its completions.
      logits_chunk: predictions per row whose logits exist at once.
    """

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    advantage: str = "group"
    gamma: float = 1.0
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    reward_weights: tuple[float, ...] | None = None
    importance_sampling_level: str = "token"
    policy_loss: str = "clip"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float = 3.0
    cispo_bounds: str = "absolute"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    loss_type: str = "dapo"
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_in_reward: bool = False
    use_bias_correction_kl: bool = True
    num_iterations: int = 1
    steps_per_generation: int = 1
    old_logps: Literal["auto", "sampler", "trainer"] = "auto"
    mask_truncated_completions: bool = False
    overlong_cache: int | None = None
    dynamic_sampling: bool = False
    max_rollouts: int = 10
    disable_dropout: bool = True
    share_prompt: bool = True
    logits_chunk: int = 128

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning; the field is named."""
        registries = {
            "advantage": losses.ADVANTAGES,
            "importance_sampling_level": losses.RATIO_LEVELS,
            "policy_loss": losses.POLICY_LOSSES,
            "cispo_bounds": losses.CISPO_BOUNDS,
            "loss_type": losses.AGGREGATIONS,
            "kl_estimator": losses.KL_ESTIMATORS,
        }
        for name, registry in registries.items():
            if getattr(self, name) not in registry:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(registry)}")
        grouped = self.advantage != "reinforce_plus_plus"
        both = self.multi_objective_aggregation == "normalize_then_sum"
        rules = {
            "num_generations": (self.num_generations >= (2 if grouped else 1), "at least 2 with this advantage"),
            "max_completion_length": (self.max_completion_length >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "gamma": (not grouped or self.gamma == 1, "1 but for reinforce_plus_plus"),
            "multi_objective_aggregation": (not both or self.advantage == "group", "used with advantage group"),
            "epsilon": (self.epsilon >= 0, "at least 0"),
            "delta": (self.delta is None or self.delta > 1 + self.upper, "above 1 + epsilon_high"),
            "dual_clip": (self.dual_clip > 1, "above 1"),
            "beta": (self.beta >= 0, "at least 0"),
            "kl_in_reward": (not (both and self.kl_in_reward), "false with normalize_then_sum"),
            "num_iterations": (self.num_iterations >= 1, "at least 1"),
            "steps_per_generation": (self.steps_per_generation >= 1, "at least 1"),
            "max_rollouts": (self.max_rollouts >= 1, "at least 1"),
            "overlong_cache": (
                self.overlong_cache is None or 0 < self.overlong_cache <= self.max_completion_length,
                "between 1 and max_completion_length",
            ),
        }
        for name, (fits, rule) in rules.items():
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")
        if self.delta is not None and self.policy_loss != "clip":
            raise ValueError(f"delta={self.delta}: the loss {self.policy_loss!r} has no such bound; leave it away")

    @property
    def upper(self) -> float:
        """`epsilon_high`, or `epsilon`."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


# Settings of the papers; what is not named is GRPO as TRL has it by default, or left to the user.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Shao et al., arXiv 2402.03300: KL in the loss, mean over tokens of a completion first.
    "grpo": {},
    # Yu et al., arXiv 2503.14476: no KL, clip-higher, token-level loss, dynamic sampling; `overlong_cache` is open.
    "dapo": {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo", "dynamic_sampling": True},
    # Liu et al., arXiv 2503.20783: no division by the standard deviation nor by the completion's length.
    "dr_grpo": {"advantage": "none", "loss_type": "dr_grpo"},
    # Ahmadian et al., arXiv 2402.14740: one ratio per completion, KL in the reward.
    "rloo": {
        "advantage": "leave_one_out",
        "num_generations": 2,
        "importance_sampling_level": "sequence_sum",
        "loss_type": "luspo",
        "beta": 0.05,
        "kl_estimator": "k1",
        "kl_in_reward": True,
    },
    # Hu et al., arXiv 2501.03262.
    "reinforce_plus_plus": {
        "advantage": "reinforce_plus_plus",
        "num_generations": 1,
        "loss_type": "bnpo",
        "beta": 0.01,
        "kl_estimator": "k1",
        "kl_in_reward": True,
    },
    "reinforce_plus_plus_baseline": {
        "advantage": "reinforce_plus_plus_baseline",
        "loss_type": "bnpo",
        "beta": 0.01,
        "kl_estimator": "k2",
        "use_bias_correction_kl": False,
    },
    # Zheng et al., arXiv 2507.18071, section 5.1.
    "gspo": {
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "steps_per_generation": 4,
    },
    # MiniMax-M1, arXiv 2506.13585; the bound is ScaleRL's, arXiv 2510.13786.
    "cispo": {"policy_loss": "cispo", "epsilon_high": 5.0, "loss_type": "dapo"},
}


def policy_of(params: PyTree, frozen: PyTree) -> Variables:
    """The policy's variables."""
    return common.join_variables(params, frozen)


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
    """bool `[prompts]`, whose completions are learnt from."""
    if not config.dynamic_sampling:
        return np.ones(len(experience.prompts), bool)
    flat = losses.without_signal(_outcomes(config, experience), experience.groups)
    return ~np.asarray(flat).reshape(-1, experience.num_generations)[:, 0]


def schedule(config: Config, prompts: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Prompts of the rollout per update; every iteration takes the same batches in the same order, as TRL does."""
    del rng
    batches = [np.arange(start, min(start + batch_size, prompts)) for start in range(0, prompts, batch_size)]
    return batches * config.num_iterations


def start_carry(config: Config) -> dict[str, float]:
    """What goes from rollout to rollout: nothing."""
    del config
    return {}


def passes(config: Config, *, narrow: bool) -> dict[str, Literal["policy", "reference"]]:
    """Fields that packed passes must fill, and by which model; `narrow` = computed in less than float32."""
    wanted: dict[str, Literal["policy", "reference"]] = {}
    trainer = config.old_logps == "trainer" or (config.old_logps == "auto" and narrow)
    if num_updates(config) > 1 and trainer:
        wanted["old_logps"] = "policy"
    if needs_reference(config):
        wanted["ref_logps"] = "reference"
    return wanted


def fields(config: Config) -> tuple[str, ...]:
    """Fields per token that the loss reads."""
    old = ("old_logps",) if num_updates(config) > 1 else ()
    kl = ("ref_logps",) if needs_reference(config) and not config.kl_in_reward else ()
    return ("advantages", "loss_mask", "sampler_logps", *old, *kl)


def batch_fields(config: Config, experience: Experience, micro_batches: int) -> dict[str, np.ndarray]:
    """Numbers of the whole rollout: how many tokens an average batch of it has in the loss."""
    mean = float(experience.fields["loss_mask"].sum()) / config.steps_per_generation
    return {"window_tokens": np.full(micro_batches, mean, np.float32)}


def estimate(
    config: Config, experience: Experience, carry: dict[str, float]
) -> tuple[Experience, Metrics, dict[str, float]]:
    """Scores -> advantages, and the metrics of a rollout."""
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
    metrics = _rollout_metrics(experience, outcomes)
    if config.kl_in_reward and needs_reference(config):
        metrics["kl"] = Mean(float(kl.sum()), float(mask.sum()))
    return replace(experience, fields=known), metrics, carry


def totals(config: Config, batch: Batch) -> Totals:
    """The loss's denominator."""
    counted = losses.count_batch(
        batch.present,
        _in_loss(batch),
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

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        key = None if config.disable_dropout else key
        variables = common.join_variables(params, frozen)
        tokens = common.read(model, variables, batch, key, config.logits_chunk, temperature=config.temperature)
        completions, n = _in_loss(batch), batch.present.shape[0]
        fresh = jax.lax.stop_gradient(tokens.logps)
        ratios = level(tokens.logps, batch.fields.get("old_logps", fresh), completions, n)
        terms = policy_loss(ratios, batch.fields["advantages"], tokens.logps)
        per_token, real = terms.loss, (completions >= 0).astype(jnp.float32)
        metrics = {
            "entropy": common.masked_mean(tokens.entropy, real),
            **losses.clip_metrics(terms, completions, n, per_completion=config.importance_sampling_level != "token"),
        }
        if "ref_logps" in batch.fields:
            kl = losses.KL_ESTIMATORS[config.kl_estimator](tokens.logps, batch.fields["ref_logps"])
            metrics["kl"] = common.masked_mean(kl, real)
            if config.use_bias_correction_kl:
                kl = losses.bias_corrected(kl, ratios)
            per_token = per_token + config.beta * kl
        if "old_logps" not in batch.fields:
            # One update per rollout: the policy has not changed since it drew these tokens.
            apart = jnp.abs(fresh - batch.fields["sampler_logps"]) * real
            metrics["sampling/sampling_logp_difference/mean"] = common.masked_mean(apart, real)
            metrics["sampling/sampling_logp_difference/max"] = Max(apart.max())
        value = losses.aggregate(losses.AGGREGATIONS[config.loss_type], per_token, completions, n, total=totals["loss"])
        return value, jax.lax.stop_gradient(metrics)

    return loss


def make_logps(config: Config, model: Model) -> Callable[[Variables, Batch], jax.Array]:
    """`(variables, batch) -> token_logps`, float32 `[micro, rows, predictions]`, at the config's temperature."""
    return common.make_logps(model, config.logits_chunk, temperature=config.temperature)


def init(
    config: Config, model: Model, variables: Variables, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, Variables]:
    """The state at step 0 and the frozen variables."""
    del config
    return common.start(model, variables, optimizer, key)


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
        one update is made per rollout, `old_logps`, with a KL in the loss `ref_logps`: one float32 array per completion
        each, per token; `loss_mask` likewise, all tokens by default; `sampler_logps` likewise, for a metric.
    """
    branches = tuple(np.asarray(ids, np.int32) for ids in example["completion_ids"])
    ones = [np.ones(len(ids), np.float32) for ids in branches]
    given = {"loss_mask": ones, "sampler_logps": [np.full(len(ids), np.nan, np.float32) for ids in branches], **example}
    known = {name: tuple(np.asarray(each, np.float32) for each in given[name]) for name in fields(config)}
    return Document(np.asarray(example["prompt_ids"], np.int32), branches, fields=known)


def make_batch(config: Config, groups: Sequence[common.Example], **layout: Any) -> Batch:
    """Packs groups (see `to_document`) into a batch; `layout` as `packing.pack`."""
    documents = [to_document(config, group) for group in groups]
    size = max(len(each.branches) for each in documents)
    batch = pack(documents, completions=size, share_prompt=config.share_prompt, **layout)
    tokens = np.full(len(batch.present), np.asarray(batch.fields["loss_mask"]).sum(), np.float32)
    return replace(batch, fields={**batch.fields, "window_tokens": tokens})


def _in_loss(batch: Batch) -> Array:
    """Completion numbers, -1 for what the loss leaves out."""
    return jnp.where(batch.fields["loss_mask"] > 0, batch.predictions.completions, -1)


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


def _rollout_metrics(experience: Experience, outcomes: np.ndarray) -> dict[str, Any]:
    known = outcomes[~np.isnan(outcomes)]
    flat = np.asarray(losses.without_signal(outcomes, experience.groups))
    metrics: dict[str, Any] = {
        "reward": Mean(float(known.sum()), float(len(known))),
        "frac_reward_zero_std": Mean(float(flat.sum()), float(len(flat))),
    }
    if len(known) > 1:
        metrics["reward_std"] = Mean(float(known.std(ddof=1)), 1.0)
    return metrics
