"""Learning from pairs of a chosen and a rejected completion against a fixed reference: DPO and its family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.losses import COUPLED_LOSSES, PREFERENCE_LOSSES, PreferenceLogps, count_by_completion, sum_by_completion
from jaxalign.methods import balance, common
from jaxalign.models import Model
from jaxalign.packing import Document
from jaxalign.training.coupled import CoupledLoss
from jaxalign.training.state import TrainState
from jaxalign.training.step import LossFn, Step, Totals
from jaxalign.training.step import make_step as make_training_step
from jaxalign.types import Array, Batch, Metrics, Variables

KIND = "preference"
COMPLETIONS = 2
BRANCHES = ("chosen", "rejected")  # whose reference log-probs can be computed beforehand
NEEDS_REFERENCE = True
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Config:
    """Preference optimisation.

    Attributes:
      loss_type: key in `PREFERENCE_LOSSES`.
      beta: inverse strength of the KL penalty.
      label_smoothing: probability that a label is wrong; `sigmoid`, `aot` and `aot_unpaired` only.
      disable_dropout: no dropout even if the model's config has some.
      precompute_ref_log_probs: run the reference once over the data set before training and cache what it says on disk,
        instead of keeping it in memory and running it on every batch.
      share_prompt: compute the prompt once for both completions.
      logits_chunk: predictions per row whose logits exist at once.
      router_aux_loss_coef: weight of the load-balancing loss of sparse models; None = what the model's config says.
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    disable_dropout: bool = True
    precompute_ref_log_probs: bool = False
    share_prompt: bool = True
    logits_chunk: int = 128
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning."""
        if self.loss_type not in PREFERENCE_LOSSES:
            raise ValueError(f"loss_type {self.loss_type!r} is unknown; known: {', '.join(PREFERENCE_LOSSES)}")
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be greater than 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        if self.label_smoothing and self.loss_type not in {"sigmoid", *COUPLED_LOSSES}:
            raise ValueError(f"loss_type {self.loss_type!r} has no label smoothing: set label_smoothing to 0")


def to_document(config: Config, example: common.Example) -> Document:
    """The prompt as trunk, the chosen and the rejected completion as its branches.

    Args:
      config: the method's.
      example: `prompt_ids`, `chosen_ids`, `rejected_ids` int32, the completions ending as they should be learned (with
        EOS); with a precomputed reference `ref_chosen_logps` and `ref_rejected_logps`, float32 per token.
    """
    del config
    branches = tuple(np.asarray(example[name], np.int32) for name in ("chosen_ids", "rejected_ids"))
    fields = {}
    if "ref_chosen_logps" in example:
        fields["ref_logps"] = tuple(
            np.asarray(example[name], np.float32) for name in ("ref_chosen_logps", "ref_rejected_logps")
        )
    return Document(np.asarray(example["prompt_ids"], np.int32), branches, fields=fields)


def count_tokens(example: common.Example) -> int:
    """Tokens of an example as `num_tokens` counts them: the prompt with each completion."""
    return 2 * len(example["prompt_ids"]) + len(example["chosen_ids"]) + len(example["rejected_ids"])


def totals(batch: Batch) -> Totals:
    """The loss's denominator: pairs of the global batch."""
    return {"loss": batch.present[..., 0::2].sum()}


def make_loss(config: Config, model: Model, *, temperature: float = 1.0) -> LossFn | CoupledLoss:
    """The loss of a micro-batch that carries `ref_logps`: the sum over its pairs / pairs of the global batch.

    Those of `COUPLED_LOSSES` are of the whole batch.
    """
    preference_loss = partial(
        PREFERENCE_LOSSES[config.loss_type], beta=config.beta, label_smoothing=config.label_smoothing
    )
    weight = balance.coefficient(config.router_aux_loss_coef, model)

    def read(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        del totals
        if "ref_logps" not in batch.fields:
            raise ValueError(
                "the batch has no ref_logps: fill it with make_reference, or give examples that carry them"
            )
        key = None if config.disable_dropout else key
        variables, chunk = common.join_variables(params, frozen), config.logits_chunk
        tokens = common.read(model, variables, batch, key, chunk, temperature=temperature)
        completions, n = batch.predictions.completions, batch.present.shape[0]
        # Differenced per token before summing: the sums are large and nearly equal.
        log_ratios = sum_by_completion(tokens.logps - batch.fields["ref_logps"], completions, n)
        lengths = count_by_completion(completions, n)
        logps = sum_by_completion(tokens.logps, completions, n)
        sums = (log_ratios[0::2], log_ratios[1::2], lengths[0::2], lengths[1::2], logps[0::2], logps[1::2])
        pairs = PreferenceLogps(*sums)
        return pairs, _metrics(config, batch, tokens, pairs, batch.present[0::2]), tokens.aux

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        pairs, metrics, aux = read(params, frozen, batch, totals, key)
        present = batch.present[0::2]
        value = jnp.where(present > 0, preference_loss(pairs), 0).sum() / jnp.maximum(totals["loss"], 1)
        return balance.add(weight, model, batch, aux, value, metrics)

    def combine(pairs: PreferenceLogps, batch: Batch, totals: Totals):
        flat = jax.tree.map(lambda x: x.reshape(-1), (pairs, batch.present[:, 0::2]))
        return preference_loss(flat[0], where=flat[1]).sum() / jnp.maximum(totals["loss"], 1), {}

    if config.loss_type in COUPLED_LOSSES:
        if weight:
            raise ValueError(
                f"loss_type={config.loss_type!r} goes without a router loss: set router_aux_loss_coef to 0"
            )
        return CoupledLoss(lambda *parts: read(*parts)[:2], combine)
    return balance.couple(weight, model, loss, disable_dropout=config.disable_dropout)


def make_reference(config: Config, model: Model) -> Callable[[Variables, Batch], Batch]:
    """`(variables, batch) -> batch` with `ref_logps`, float32 `[micro, rows, predictions]`."""

    def reference(variables: Variables, batch: Batch) -> Batch:
        def one(micro_batch: Batch) -> jax.Array:
            return common.read(model, variables, micro_batch, None, config.logits_chunk).logps

        return replace(batch, fields={**batch.fields, "ref_logps": jax.lax.map(one, batch)})

    return reference


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
    return make_training_step(make_loss(config, model), totals, optimizer, learning_rate)


def make_batch(config: Config, pairs: Sequence[common.Example], **layout: Any) -> Batch:
    """Packs pairs (see `to_document`) into a batch; `layout` as `packing.pack`."""
    return common.pack_examples(sys.modules[__name__], config, pairs, **layout)


def _metrics(config: Config, batch: Batch, tokens, pairs: PreferenceLogps, present: Array) -> Metrics:
    completions, n = batch.predictions.completions, batch.present.shape[0]
    chosen = ((completions >= 0) & (completions % 2 == 0)).astype(jnp.float32)
    rejected = ((completions >= 0) & (completions % 2 == 1)).astype(jnp.float32)
    logps = sum_by_completion(tokens.logps, completions, n)
    chosen_rewards = config.beta * pairs.chosen_log_ratios
    rejected_rewards = config.beta * pairs.rejected_log_ratios
    metrics = {
        "rewards/chosen": common.masked_mean(chosen_rewards, present),
        "rewards/rejected": common.masked_mean(rejected_rewards, present),
        "rewards/accuracies": common.masked_mean((chosen_rewards > rejected_rewards).astype(jnp.float32), present),
        "rewards/margins": common.masked_mean(chosen_rewards - rejected_rewards, present),
        "logps/chosen": common.masked_mean(logps[0::2], present),
        "logps/rejected": common.masked_mean(logps[1::2], present),
        "logits/chosen": common.masked_mean(tokens.mean_logits, chosen),
        "logits/rejected": common.masked_mean(tokens.mean_logits, rejected),
        "entropy": common.masked_mean(tokens.entropy, chosen + rejected),
        "mean_token_accuracy": common.masked_mean(tokens.hits, chosen),
    }
    return jax.lax.stop_gradient(metrics)
