"""Learning from pairs without a reference: CPO, SimPO, AlphaPO and ORPO. No second model is loaded.

A loss of the two completions' log-probs, and beside it the negative log-likelihood of the chosen one. `PRESETS` are the
papers' combinations.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.losses import PER_TOKEN_REWARDS, REFERENCE_FREE_LOSSES, TokenStatistics, reference_free_options
from jaxalign.methods import balance, checks, common, pairs
from jaxalign.models import Model
from jaxalign.packing import Document
from jaxalign.training.step import LossFn, Totals
from jaxalign.types import Array, Batch, Mean, Metric, Variables

KIND = "preference"
COMPLETIONS = 2
LEARNING_RATE = 1e-6

READERS = {
    "label_smoothing": "by the losses sigmoid and simpo",
    "simpo_gamma": "by the loss simpo",
    "cpo_alpha": "by CPO's losses: ORPO's likelihood term has weight 1, and beta weighs the other",
    "alpha": "by CPO's losses, not by orpo",
}


@dataclass(frozen=True)
class Config:
    """Preference optimisation without a reference.

    Attributes:
      loss_type: key in `REFERENCE_FREE_LOSSES`; `ipo`, `simpo` and `orpo` take means over tokens, the others sums.
      beta: scale of the rewards; ORPO's weight of the odds-ratio term.
      label_smoothing: probability that a label is wrong, in [0, 0.5); `sigmoid` and `simpo` only.
      cpo_alpha: weight of the chosen completions' negative log-likelihood; 0 = none. ORPO's is 1, over prompts too.
      simpo_gamma: margin asked for, `simpo` only; not its ratio to beta.
      alpha: AlphaPO's shape of the reward; 0 = the log-probability. Not for `orpo`.
      disable_dropout: no dropout even if the model's config has some.
      share_prompt: compute the prompt once for both completions.
      logits_chunk: predictions per row whose logits exist at once; None = `common.choose_chunk`.
      router_aux_loss_coef: weight of the load-balancing loss of sparse models; None = what the model's config says.
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0
    disable_dropout: bool = True
    share_prompt: bool = True
    logits_chunk: int | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning, or that nothing reads; the field is named."""
        checks.check_known("loss_type", [self.loss_type], REFERENCE_FREE_LOSSES)
        options = reference_free_options(self.loss_type)
        read = {name: name in options for name in ("label_smoothing", "simpo_gamma")}
        checks.check_unread(self, {**read, "cpo_alpha": not self.is_orpo, "alpha": not self.is_orpo}, READERS)
        rules = {
            "beta": (self.beta > 0, "greater than 0"),
            "label_smoothing": (0 <= self.label_smoothing < 0.5, "in [0, 0.5)"),
            "cpo_alpha": (self.cpo_alpha >= 0, "at least 0"),
            "simpo_gamma": (self.simpo_gamma >= 0, "at least 0"),
        }
        checks.check_rules(self, rules)
        checks.check_chunk(self)

    @property
    def is_orpo(self) -> bool:
        """Whether the likelihood is of prompt and completion, with weight 1."""
        return self.loss_type == "orpo"


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cpo": {},
    # Meng et al., arXiv 2405.14734: beta 2 to 2.5 and gamma / beta from 0.3 to 0.8.
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    # Gupta et al., arXiv 2501.03884, table 3, Mistral-Instruct.
    "alphapo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25},
    # Hong et al., arXiv 2403.07691: lambda = 0.1.
    "orpo": {"loss_type": "orpo"},
}

needs_reference = common.without_reference
count_tokens = pairs.count_tokens
totals = pairs.totals
init = common.init


def to_document(config: Config, example: common.Example) -> Document:
    """The pair's prompt, chosen and rejected completion; of ORPO the prompt's tokens are asked for too."""
    return pairs.to_document(example, prompt_targets=config.is_orpo)


def make_loss(config: Config, model: Model) -> LossFn:
    """The loss of a micro-batch: its sums over pairs and over likelihood tokens, each over that of the global batch."""
    options = {option: getattr(config, option) for option in reference_free_options(config.loss_type)}
    pair_loss = partial(REFERENCE_FREE_LOSSES[config.loss_type], **options)
    weight = balance.coefficient(config.router_aux_loss_coef, model)

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        key = None if config.disable_dropout else key
        tokens = common.read(model, common.join_variables(params, frozen), batch, key, config.logits_chunk)
        completions, n = batch.predictions.completions, batch.present.shape[0]
        by = losses.mean_by_completion if config.loss_type in PER_TOKEN_REWARDS else losses.sum_by_completion
        logps = by(tokens.logps, completions, n)
        scores = losses.alpha_reward(logps, config.alpha)
        summed = jnp.where(batch.present[0::2] > 0, pair_loss(scores[0::2], scores[1::2]), 0).sum()
        nll = -jnp.where(pairs.learned(completions, n) > 0, tokens.logps, 0).sum()
        value = summed / jnp.maximum(totals["loss"], 1)
        value += config.cpo_alpha * nll / jnp.maximum(totals["tokens"], 1)
        metrics = _metrics(config, batch, tokens, logps, nll)
        both = [(summed, "loss"), (config.cpo_alpha * nll, "tokens")]
        metrics |= {"loss": pairs.loss_metric(both, batch)}
        return balance.add(weight, model, batch, tokens.aux, value, metrics)

    return balance.couple(weight, model, loss, disable_dropout=config.disable_dropout)


make_step = common.step_maker(make_loss, totals)


def make_batch(config: Config, examples: Sequence[common.Example], **layout: Any) -> Batch:
    """Packs pairs (see `pairs.to_document`) into a batch; `layout` as `packing.pack`."""
    return common.pack_examples(sys.modules[__name__], config, examples, **layout)


def _metrics(config: Config, batch: Batch, tokens: TokenStatistics, logps: Array, nll: Array) -> dict[str, Metric]:
    present = batch.present[0::2]
    rewards = config.beta * losses.alpha_reward(logps, config.alpha)
    metrics = {
        **pairs.reward_metrics(rewards[0::2], rewards[1::2], present),
        **pairs.token_metrics(tokens, logps, batch),
        "nll_loss": Mean(nll, pairs.totals(batch)["tokens"]),
    }
    if config.is_orpo:
        odds = losses.log_odds(logps[0::2], logps[1::2])
        metrics["log_odds_chosen"] = common.masked_mean(odds, present)
        metrics["log_odds_ratio"] = common.masked_mean(jax.nn.log_sigmoid(odds), present)
    return jax.lax.stop_gradient(metrics)
