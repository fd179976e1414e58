"""The settings of the group family, and the papers' combinations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxalign import losses
from jaxalign.methods.checks import check_chunk, check_known, check_rules, check_unread

VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
# Other options of policy losses, by their own names there.
OPTIONS = ("epsilon_high", "delta", "dual_clip", "cispo_bounds", "sapo_temperature_pos", "sapo_temperature_neg")
WITH_KL = "with beta above 0"
# Who reads what not everybody reads.
READERS = {
    "gamma": "with advantage: reinforce_plus_plus",
    **{name: "with policy_loss: vespo" for name in VESPO},
    "epsilon": "with policy_loss: clip, dual, or cispo with bounds that are made of it",
    "epsilon_high": "with policy_loss: clip, dual or cispo",
    "delta": "with policy_loss: clip",
    "dual_clip": "with policy_loss: dual",
    "cispo_bounds": "with policy_loss: cispo",
    "sapo_temperature_pos": "with policy_loss: sapo",
    "sapo_temperature_neg": "with policy_loss: sapo",
    "kl_in_reward": WITH_KL,
    "kl_estimator": WITH_KL,
    "use_bias_correction_kl": "with beta above 0 and kl_in_reward: false",
    "old_logps": "where a rollout serves several updates, or the KL goes into the reward",
    "max_rollouts": "with dynamic_sampling: true",
}


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
      reward_weights: weight of each reward; None = the weights of `rollout.rewards`, without a config 1 each.
      importance_sampling_level: key in `RATIO_LEVELS`: `token`, `sequence` (GSPO), `sequence_token`, `sequence_sum`
        (`vespo` takes no other).
      policy_loss: key in `POLICY_LOSSES`: `clip`, `dual`, `cispo`, `sapo`, `vespo`.
      epsilon: how far a ratio may fall below 1; `clip`, `dual`, `cispo` with bounds that it makes.
      epsilon_high: how far it may rise above; None = `epsilon`; the same losses. What it means to CISPO: see
        `cispo_bounds`.
      delta: second upper bound of the ratio where the advantage is negative; `clip` only.
      dual_clip: `dual` only.
      cispo_bounds: key in `CISPO_BOUNDS`: `absolute` (the ratio is at most `epsilon_high`, which must be given),
        `relative` (at most 1 more), `two_sided`.
      sapo_temperature_pos: `sapo` only, where the advantage is positive.
      sapo_temperature_neg: `sapo` only, elsewhere.
      vespo_k_pos: exponent of the ratio, `vespo` only, where the advantage is not negative.
      vespo_lambda_pos: rate at which greater ratios count less, likewise.
      vespo_k_neg: the exponent elsewhere.
      vespo_lambda_neg: the rate elsewhere.
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
      logits_chunk: predictions per row whose logits exist at once; None = `common.choose_chunk`.
      router_aux_loss_coef: weight of the load-balancing loss of sparse models; None = what the model's config says.
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
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
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
    logits_chunk: int | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning, or that nothing reads; the field is named."""
        registries = {
            "advantage": losses.ADVANTAGES,
            "importance_sampling_level": losses.RATIO_LEVELS,
            "policy_loss": losses.POLICY_LOSSES,
            "cispo_bounds": losses.CISPO_BOUNDS,
            "loss_type": losses.AGGREGATIONS,
            "kl_estimator": losses.KL_ESTIMATORS,
        }
        for name, registry in registries.items():
            check_known(name, [getattr(self, name)], registry)
        check_unread(self, self._read(), READERS)
        grouped = self.advantage != "reinforce_plus_plus"
        both = self.multi_objective_aggregation == "normalize_then_sum"
        rules = {
            "num_generations": (self.num_generations >= (2 if grouped else 1), "at least 2 with this advantage"),
            "max_completion_length": (self.max_completion_length >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "gamma": (0 <= self.gamma <= 1, "in [0, 1]"),
            "reward_weights": (self.reward_weights is None or len(self.reward_weights) > 0, "one number per reward"),
            "multi_objective_aggregation": (not both or self.advantage == "group", "used with advantage group"),
            "importance_sampling_level": (
                self.policy_loss != "vespo" or self.importance_sampling_level == "sequence_sum",
                "sequence_sum with policy_loss vespo, which weighs whole completions",
            ),
            "epsilon": (self.epsilon >= 0, "at least 0"),
            "epsilon_high": self._rule_above(),
            "delta": (self.delta is None or self.delta > 1 + self.upper, "above 1 + epsilon_high"),
            "dual_clip": (self.dual_clip > 1, "above 1"),
            **{name: (getattr(self, name) > 0, "above 0") for name in ("sapo_temperature_pos", "sapo_temperature_neg")},
            **{name: (getattr(self, name) >= 0, "at least 0") for name in VESPO},
            "beta": (self.beta >= 0, "at least 0"),
            "kl_in_reward": (not (both and self.kl_in_reward), "false with normalize_then_sum"),
            "num_iterations": (self.num_iterations >= 1, "at least 1"),
            "steps_per_generation": (self.steps_per_generation >= 1, "at least 1"),
            "max_rollouts": (self.max_rollouts >= 1, "at least 1"),
            "dynamic_sampling": (not self.dynamic_sampling or self.num_generations > 1, "false for groups of one"),
            "overlong_cache": (
                self.overlong_cache is None or 0 < self.overlong_cache <= self.max_completion_length,
                "between 1 and max_completion_length",
            ),
        }
        check_rules(self, rules)
        check_chunk(self)

    def _read(self) -> dict[str, bool]:
        """Whether anything reads a setting that not everybody reads."""
        options = losses.policy_options(self.policy_loss)
        low = "epsilon_low" in options
        if self.policy_loss == "cispo":  # which has no bound below, but for two_sided
            low = self.cispo_bounds == "two_sided" or self.epsilon_high is None
        several = self.num_iterations * self.steps_per_generation > 1
        return {
            "gamma": self.advantage == "reinforce_plus_plus",
            **{name: name in options for name in (*VESPO, *OPTIONS)},
            "epsilon": low,
            "kl_in_reward": self.beta > 0,
            "kl_estimator": self.beta > 0,
            "use_bias_correction_kl": self.beta > 0 and not self.kl_in_reward,
            "old_logps": several or (self.beta > 0 and self.kl_in_reward),
            "max_rollouts": self.dynamic_sampling,
        }

    def _rule_above(self) -> tuple[bool, str]:
        if self.epsilon_high is None and self.policy_loss == "cispo" and self.cispo_bounds == "absolute":
            return False, "given with cispo_bounds absolute, where it is the greatest ratio itself, for example 5.0"
        return self.epsilon_high is None or self.epsilon_high >= 0, "at least 0"

    @property
    def upper(self) -> float:
        """`epsilon_high`, or `epsilon`."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


# Settings of the papers; what is not named is GRPO as TRL has it by default, or left to the user.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # TRL's defaults. Shao et al., arXiv 2402.03300, have loss_type grpo and beta 0.04.
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
        "loss_type": "grpo",  # a completion's tokens share its one term: their mean is it
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
