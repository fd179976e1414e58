"""Reward models: one score per completion, learned from pairs or rankings of completions of one prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.data.formats import MOST_COMPLETIONS
from jaxalign.losses import ranking, ratio, sum_by_completion
from jaxalign.methods import common
from jaxalign.models import Model
from jaxalign.packing import Document
from jaxalign.training.state import TrainState
from jaxalign.training.step import LossFn, Step, Totals
from jaxalign.training.step import make_step as make_training_step
from jaxalign.types import Array, Batch, Max, Metrics, Min, Variables

KIND = "ranking"
COMPLETIONS = MOST_COMPLETIONS
SCORES = True  # it trains a score head and no LM head
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Config:
    """Reward modelling.

    Attributes:
      center_rewards_coefficient: weight of the squared sum of a pair's scores, which pulls their mean to 0; None = 0.
      normalize: after training, shift and scale the scores to mean 0 and standard deviation 1 over the training data.
      disable_dropout: no dropout even if the model's config has some.
      share_prompt: compute the prompt once for all completions.
    """

    center_rewards_coefficient: float | None = None
    normalize: bool = False
    disable_dropout: bool = True
    share_prompt: bool = True

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning."""
        if self.center_rewards_coefficient is not None and self.center_rewards_coefficient < 0:
            raise ValueError(f"center_rewards_coefficient={self.center_rewards_coefficient} must not be negative")


def needs_reference(config: Config) -> bool:
    """Whether log-probs of a reference enter: never."""
    del config
    return False


def to_document(config: Config, example: common.Example) -> Document:
    """The prompt as trunk and the completions as its branches, each read at its last token.

    Args:
      config: the method's.
      example: `prompt_ids` int32, with `chosen_ids` and `rejected_ids` int32 and perhaps a `margin`; or with
        `completion_ids` (2 to 7 completions end to end), and per completion `sizes`, `ranks` (the smaller the better)
        and `margins` (its lead over those ranked below it). Completions end with EOS.

    Raises:
      ValueError: too many completions, or none that is better than another.
    """
    del config
    if "chosen_ids" in example:
        branches: Sequence[Any] = (example["chosen_ids"], example["rejected_ids"])
        ranks, margins = [0, 1], [example.get("margin", 0.0), 0.0]
    else:
        branches = np.split(np.asarray(example["completion_ids"]), np.cumsum(example["sizes"])[:-1])
        ranks, margins = example["ranks"], example["margins"]
    if len(branches) > COMPLETIONS or len(set(np.asarray(ranks).tolist())) < 2:
        raise ValueError(f"{len(branches)} completions of ranks {list(ranks)}: 2 to {COMPLETIONS}, of unequal rank")
    fields = {
        name: tuple(np.asarray([value], np.float32) for value in values)
        for name, values in (("ranks", ranks), ("margins", margins))
    }
    return Document(
        np.asarray(example["prompt_ids"], np.int32),
        tuple(np.asarray(branch, np.int32) for branch in branches),
        fields=fields,
        read_last=True,
    )


def count_tokens(example: common.Example) -> int:
    """Tokens of an example as `num_tokens` counts them: the prompt with each completion."""
    if "chosen_ids" in example:
        return 2 * len(example["prompt_ids"]) + len(example["chosen_ids"]) + len(example["rejected_ids"])
    return len(example["sizes"]) * len(example["prompt_ids"]) + len(example["completion_ids"])


def totals(batch: Batch) -> Totals:
    """The loss's denominator: prompts of the global batch."""
    return {"loss": batch.present[..., 0::COMPLETIONS].sum()}


def make_loss(config: Config, model: Model) -> LossFn:
    """The loss of a micro-batch: the sum over its prompts of the mean over a prompt's pairs / prompts of the batch.

    Source: Ouyang et al., arXiv 2203.02155, eq. 1, with the margin and the centring of `losses.bradley_terry`.
    """
    coefficient = config.center_rewards_coefficient or 0.0

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        key = None if config.disable_dropout else key
        scores = read_scores(model, common.join_variables(params, frozen), batch, key)
        by_prompt = (-1, COMPLETIONS)
        scores, present = scores.reshape(by_prompt), batch.present.reshape(by_prompt)
        ranks, margins = (
            sum_by_completion(batch.fields[name], batch.predictions.completions, present.size).reshape(by_prompt)
            for name in ("ranks", "margins")
        )
        leads = jnp.broadcast_to(margins[:, :, None], (*margins.shape, COMPLETIONS))
        terms = ranking(scores, ranks, present, margins=leads, center_rewards_coefficient=coefficient)
        means = ratio(terms.loss.sum((1, 2)), terms.pairs.sum((1, 2)))
        return means.sum() / jnp.maximum(totals["loss"], 1), _metrics(scores, present, terms.pairs)

    return loss


def read_scores(model: Model, variables: Variables, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Scores of a micro-batch's completions, float32 `[completions]`; 0 where there is none."""
    values = common.read_scores(model, variables, batch, key)
    return sum_by_completion(values, batch.predictions.completions, batch.present.shape[0])


def make_scores(model: Model) -> Callable[[Variables, Batch], jax.Array]:
    """`(variables, batch) -> scores`, float32 `[micro, completions]`; 0 where `batch.present` is 0."""
    return lambda variables, batch: jax.lax.map(lambda part: read_scores(model, variables, part), batch)


def init(
    config: Config, model: Model, variables: Variables, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, Variables]:
    """The state at step 0 and the frozen variables, of a model with a score head (see `models.add_score_head`)."""
    del config
    return common.start(model, variables, optimizer, key)


def make_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array] | None = None,
) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`; jit it and donate the state."""
    return make_training_step(make_loss(config, model), totals, optimizer, learning_rate)


def make_batch(config: Config, examples: Sequence[common.Example], **layout: Any) -> Batch:
    """Packs pairs and rankings (see `to_document`) into a batch; `layout` as `packing.pack`."""
    return common.pack_examples(sys.modules[__name__], config, examples, **layout)


def _metrics(scores: Array, present: Array, pairs: Array) -> Metrics:
    leads = scores[:, :, None] - scores[:, None, :]
    metrics = {
        "min_reward": Min(jnp.where(present > 0, scores, jnp.inf).min().astype(jnp.float32)),
        "mean_reward": common.masked_mean(scores, present),
        "max_reward": Max(jnp.where(present > 0, scores, -jnp.inf).max().astype(jnp.float32)),
        "accuracy": common.masked_mean((leads > 0).astype(jnp.float32), pairs),
        "margin": common.masked_mean(leads, pairs),
    }
    return jax.lax.stop_gradient(metrics)
