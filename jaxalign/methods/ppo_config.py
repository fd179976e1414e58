"""The settings of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxalign import losses
from jaxalign.methods.checks import check_chunk, check_unread

# Who reads what not everybody reads.
READERS = {
    "kl_estimator": "with kl_coef above 0",
    "kl_horizon": "with kl_target",
    "ptx_per_prompt": "with ptx_coef above 0",
    "whiten_bessel": "where rewards or advantages are whitened",
    "old_logps": "where a rollout serves several updates, or with kl_coef above 0",
    "target_kl": "where a rollout serves several updates",
}


@dataclass(frozen=True)
class Config:
    """Proximal policy optimisation with a critic.

    A score is what the rewards say of a completion; rewards of tokens are made of it and of the KL divergence. Scores
    go through `reward_weights`, `normalize_scores`, `score_clip` and the rule for completions that did not end by
    themselves, in this order.

    Attributes:
      num_ppo_epochs: passes over a rollout, each in a new order.
      num_mini_batches: optimiser steps per pass; a rollout has so many times `train.batch_size` prompts.
      num_generations: completions per prompt.
      max_completion_length: longest completion in tokens.
      temperature: of sampling, and of the policy and the reference whose log-probs are taken.
      reward_weights: weight of each reward; None = 1 each, or as in `rollout.rewards`.
      normalize_scores: bring scores to mean 0 and standard deviation 1: `rollout` over this rollout, `running` over all
        completions so far, this rollout included.
      score_clip: hold scores within plus or minus this; None = do not.
      missing_eos_penalty: taken off the score of a completion that did not end by itself; None = nothing.
      score_without_eos: the score of such a completion, whatever it was; None = as it was.
      kl_coef: weight of the KL divergence from the reference in the rewards, at the start; 0 = no reference is loaded.
      kl_estimator: `k1`, `k2`, `k3`.
      kl_target: let the coefficient follow the KL so that it stays near so many nats per completion; None = fixed.
      kl_horizon: completions in which the coefficient then moves by at most about 20 %.
      gamma: discount.
      gae_lambda: λ of generalised advantage estimation.
      whiten_rewards: scale the rewards of a rollout's tokens to unit variance; their mean stays.
      whiten_advantages: bring advantages to mean 0 and unit variance over the tokens of the `rollout` (TRL), of each
        `minibatch` (lm-human-preferences), or of nothing (`none`). Micro-batches never matter.
      whiten_bessel: the variance's denominator is the count less one (TRL), else the count (OpenAI).
      epsilon: how far a ratio may fall below 1.
      epsilon_high: how far it may rise above; None = `epsilon`.
      dual_clip: no token of negative advantage A costs more than `-dual_clip A`; None = no such bound.
      epsilon_value: how far a value may move from what the critic said when the tokens were drawn; None = no bound.
      vf_coef: weight of the value loss.
      entropy_coef: weight of the entropy that is taken off the loss.
      ptx_coef: weight of the loss on supervised examples that are mixed into every batch; 0 = none are. In a run they
        come from the section `ptx_data`.
      ptx_per_prompt: so many of them for each prompt of a batch.
      target_kl: once the policy is further than this from the one that drew the minibatch's tokens, by
        `policy/approxkl_avg` in nats per token, neither this update nor the rest of its epoch is applied; None = all
        are.
      critic: a model of its own (`separate`), or a head on the policy's blocks (`shared`).
      old_logps: where log-probs before the first update come from: `sampler`, `trainer` (a pass of its own), or `auto`
        (the sampler in float32, the trainer in lower precision).
      disable_dropout: no dropout even if the model's config has some.
      share_prompt: compute the prompt once for all its completions.
      logits_chunk: predictions per row whose logits exist at once; None = `common.choose_chunk`.
      router_aux_loss_coef: weight of the load-balancing losses of a sparse policy, and of a sparse critic of its own;
        None = what each model's config says.
    """

    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    num_generations: int = 1
    max_completion_length: int = 53
    temperature: float = 0.7
    reward_weights: tuple[float, ...] | None = None
    normalize_scores: Literal["none", "rollout", "running"] = "none"
    score_clip: float | None = None
    missing_eos_penalty: float | None = None
    score_without_eos: float | None = None
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float | None = None
    kl_horizon: float = 10000.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: Literal["rollout", "minibatch", "none"] = "rollout"
    whiten_bessel: bool = True
    epsilon: float = 0.2
    epsilon_high: float | None = None
    dual_clip: float | None = None
    epsilon_value: float | None = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    ptx_per_prompt: int = 1
    target_kl: float | None = None
    critic: Literal["separate", "shared"] = "separate"
    old_logps: Literal["auto", "sampler", "trainer"] = "auto"
    disable_dropout: bool = True
    share_prompt: bool = True
    logits_chunk: int | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning, or that nothing reads; the field is named."""
        choices = {
            "kl_estimator": tuple(losses.KL_ESTIMATORS),
            "normalize_scores": ("none", "rollout", "running"),
            "whiten_advantages": ("rollout", "minibatch", "none"),
            "critic": ("separate", "shared"),
            "old_logps": ("auto", "sampler", "trainer"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        several = self.num_ppo_epochs * self.num_mini_batches > 1
        check_unread(
            self,
            {
                "kl_estimator": self.kl_coef > 0,
                "kl_horizon": self.kl_target is not None,
                "ptx_per_prompt": self.ptx_coef > 0,
                "whiten_bessel": self.whiten_rewards or self.whiten_advantages != "none",
                "old_logps": several or self.kl_coef > 0,
                "target_kl": several,
            },
            READERS,
        )
        check_chunk(self)
        counts = ("num_ppo_epochs", "num_mini_batches", "num_generations", "max_completion_length", "ptx_per_prompt")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("temperature", "kl_horizon", "score_clip", "kl_target", "epsilon_value", "target_kl"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("kl_coef", "epsilon", "epsilon_high", "vf_coef", "entropy_coef", "ptx_coef"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1")
        if self.missing_eos_penalty is not None and not self.missing_eos_penalty > 0:
            raise ValueError(f"missing_eos_penalty={self.missing_eos_penalty} must be above 0: it is subtracted")
        if self.missing_eos_penalty is not None and self.score_without_eos is not None:
            raise ValueError("missing_eos_penalty and score_without_eos are two rules for the same: give one of them")
        if self.reward_weights is not None and not self.reward_weights:
            raise ValueError("reward_weights=() must be one number per reward")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_target moves kl_coef by factors, and kl_coef=0 stays 0: give a kl_coef to start from")

    @property
    def upper(self) -> float:
        """`epsilon_high`, or `epsilon`."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high
