"""Online DPO: pairs of the policy's own completions, ranked by a reward, under the preference losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxalign import losses
from jaxalign.methods import common, preference
from jaxalign.methods.rollout import choose_completions
from jaxalign.models import Model
from jaxalign.training.coupled import CoupledLoss
from jaxalign.training.step import LossFn
from jaxalign.types import Experience, Mean, Metrics

KIND = "prompt"
ONLINE = True
LEARNING_RATE = 5e-7

needs_reference = common.with_reference
init = common.init
policy_of = common.policy_of
start_carry = common.start_nothing
batch_fields = common.no_batch_fields
make_logps = common.make_policy_logps


@dataclass(frozen=True)
class Config:
    """Online preference optimisation.

    The best and the worst completion of a prompt are its pair. Prompts whose completions all have the same score make
    none: others are drawn in their place.

    Attributes:
      num_generations: completions per prompt.
      max_completion_length: longest completion in tokens.
      temperature: of sampling, and of the policy and the reference whose log-probs the loss takes.
      reward_weights: weight of each reward; None = the weights of `rollout.rewards`, without a config 1 each.
      missing_eos_penalty: taken off the score of a completion that did not end by itself; None = nothing.
      max_rollouts: most rollouts drawn for one batch.
      loss_type: key in `PREFERENCE_LOSSES`.
      beta: inverse strength of the KL penalty.
      label_smoothing: probability that a label is wrong; `sigmoid` only.
      disable_dropout: no dropout even if the model's config has some.
      share_prompt: compute the prompt once for both completions.
      logits_chunk: predictions per row whose logits exist at once; None = `common.choose_chunk`.
      router_aux_loss_coef: weight of the load-balancing loss of sparse models; None = what the model's config says.
    """

    num_generations: int = 2
    max_completion_length: int = 64
    temperature: float = 0.9
    reward_weights: tuple[float, ...] | None = None
    missing_eos_penalty: float | None = None
    max_rollouts: int = 10
    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    disable_dropout: bool = True
    share_prompt: bool = True
    logits_chunk: int | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning; the field is named."""
        least = {"num_generations": 2, "max_completion_length": 1, "max_rollouts": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {bound}")
        if self.reward_weights is not None and not self.reward_weights:
            raise ValueError("reward_weights=() must be one number per reward")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if self.missing_eos_penalty is not None and self.missing_eos_penalty <= 0:
            raise ValueError(f"missing_eos_penalty={self.missing_eos_penalty} must be above 0: it is subtracted")
        self.offline  # noqa: B018 -- checks the rest

    @property
    def offline(self) -> preference.Config:
        """The preference loss's own settings."""
        names = ("loss_type", "beta", "label_smoothing", "disable_dropout", "share_prompt", "logits_chunk")
        names += ("router_aux_loss_coef",)
        return preference.Config(**{name: getattr(self, name) for name in names})


def rollout_prompts(config: Config, batch_size: int) -> int:
    """Prompts of a rollout: those of one batch."""
    del config
    return batch_size


def num_updates(config: Config) -> int:
    """Optimiser steps that learn from one rollout: one."""
    del config
    return 1


def max_rollouts(config: Config) -> int:
    """Most rollouts that are drawn for one."""
    return config.max_rollouts


def keep(config: Config, experience: Experience) -> np.ndarray:
    """bool `[prompts]`, those whose completions differ in score."""
    flat = losses.without_signal(_scores(config, experience), experience.groups)
    return ~np.asarray(flat).reshape(-1, experience.num_generations)[:, 0]


def schedule(config: Config, prompts: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Prompts of the rollout per update."""
    del config, batch_size, rng
    return [np.arange(prompts)]


def passes(config: Config, *, narrow: bool) -> dict[str, Literal["policy", "reference"]]:
    """Fields that packed passes must fill, and by which model."""
    del config, narrow
    return {"ref_logps": "reference"}


def fields(config: Config) -> tuple[str, ...]:
    """Fields per token that the loss reads."""
    del config
    return ("ref_logps",)


def drawn_metrics(config: Config, drawn: Experience) -> Metrics:
    """Of all that was drawn, whether its prompt made a pair or not."""
    scores = _scores(config, drawn)
    known = scores[~np.isnan(scores)]
    return {
        "reward": _mean(known),
        "objective/scores": _mean(known),
        "val/contain_eos_token": _mean(drawn.finish > 0),
    }


def estimate(
    config: Config, experience: Experience, carry: dict[str, float]
) -> tuple[Experience, Metrics, dict[str, float]]:
    """The best and the worst completion of each prompt, in this order, and metrics of the prompts that make a pair.

    The KL divergence and the entropy are estimated from the sampler's log-probs, which are those of the policy at the
    config's temperature, over all of a prompt's completions.
    """
    scores = _scores(config, experience).reshape(len(experience.prompts), -1)
    # The first of equals, so that the choice is a function of the scores alone.
    chosen = np.nanargmax(scores, axis=1)
    rejected = np.nanargmin(scores, axis=1)
    rows = np.arange(len(scores))
    margins = scores[rows, chosen] - scores[rows, rejected]
    mask, sampled = experience.mask, experience.fields["sampler_logps"].astype(np.float64)
    entropy = -np.where(mask, sampled, 0.0).sum(1)
    penalty = -config.beta * np.where(mask, sampled - experience.fields["ref_logps"], 0.0).sum(1)
    total = (scores.reshape(-1) + penalty)[~np.isnan(scores.reshape(-1))]
    metrics: dict[str, Any] = {
        "objective/scores_margin": _mean(margins),
        "objective/kl": _mean(-penalty / config.beta),
        "objective/entropy": _mean(entropy),
        "objective/non_score_reward": _mean(penalty),
        "objective/rlhf_reward": _mean(total),
        "beta": Mean(config.beta, 1.0),
    }
    pairs = choose_completions(experience, np.stack([chosen, rejected], axis=1))
    return pairs, metrics, carry


def make_loss(config: Config, model: Model) -> LossFn | CoupledLoss:
    """The preference loss of a micro-batch that carries `ref_logps`, at the config's temperature."""
    return preference.make_loss(config.offline, model, temperature=config.temperature)


make_step = common.step_maker(make_loss, preference.totals)


def _scores(config: Config, experience: Experience) -> np.ndarray:
    """One number per completion, NaN where it has no score."""
    weights = config.reward_weights or (1.0,) * experience.scores.shape[1]
    scores = np.array(losses.sum_scores(experience.scores, np.asarray(weights)), np.float64)
    if config.missing_eos_penalty is not None:
        scores -= np.where(experience.finish == 0, config.missing_eos_penalty, 0.0)
    return scores


def _mean(values: np.ndarray) -> Mean:
    return Mean(float(values.sum()), float(len(values)))
