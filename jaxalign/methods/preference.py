"""Learning from pairs of a chosen and a rejected completion against a reference: DPO and its family.

Which loss (`loss_type`, or a weighted sum of several), which divergence from the reference (`f_divergence_type`), which
tokens count (`ld_alpha`) and which pairs (`use_weighting`) combine freely where that means something. `PRESETS` are the
papers' combinations. Losses without a reference are in `reference_free`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.losses import COUPLED_LOSSES, PER_TOKEN, PREFERENCE_LOSSES, PreferenceLogps, TokenStatistics
from jaxalign.methods import balance, common, pairs
from jaxalign.methods.preference_config import PRESETS, Config
from jaxalign.models import Model
from jaxalign.packing import Document
from jaxalign.training.coupled import CoupledLoss
from jaxalign.training.step import LossFn, Totals
from jaxalign.types import Array, Batch, Mean, Metric, Sum, Variables

__all__ = ["PRESETS", "Config", "init", "make_batch", "make_loss", "make_reference", "make_step"]

KIND = "preference"
COMPLETIONS = 2
BRANCHES = ("chosen", "rejected")  # whose reference log-probs can be computed beforehand
LEARNING_RATE = 1e-6

needs_reference = common.with_reference
count_tokens = pairs.count_tokens
totals = pairs.totals
init = common.init
make_reference = common.make_reference


def to_document(config: Config, example: common.Example) -> Document:
    """The pair's prompt, chosen and rejected completion, see `pairs.to_document`."""
    del config
    return pairs.to_document(example)


class _Read(NamedTuple):
    """What the losses look at of a micro-batch: scores of pairs, and by how much each pair counts, `[pairs]`."""

    scored: PreferenceLogps
    weights: Array


def make_loss(config: Config, model: Model, *, temperature: float = 1.0) -> LossFn | CoupledLoss:
    """The loss of a micro-batch that carries `ref_logps`: per loss, the sum over its pairs / pairs of the global batch.

    `sft` is a mean over the chosen tokens of the global batch instead. With one of `COUPLED_LOSSES`, the loss is of the
    whole batch.
    """
    terms = _terms(config)
    diverge = partial(losses.DIVERGENCES[config.f_divergence_type], alpha=config.f_alpha_divergence_coef)
    weight = balance.coefficient(config.router_aux_loss_coef, model)
    coupled = not COUPLED_LOSSES.isdisjoint(config.loss_types)

    def read(params: Variables, frozen: Variables, batch: Batch, key: jax.Array | None):
        reference = common.ref_logps(batch)
        key = None if config.disable_dropout else key
        variables, chunk = common.join_variables(params, frozen), config.logits_chunk
        tokens = common.read(
            model, variables, batch, key, chunk, temperature=temperature, square_sums=config.use_weighting
        )
        pair, logps = _sum_up(config, tokens, reference, batch)
        scored = pair._replace(
            chosen_log_ratios=diverge(pair.chosen_log_ratios), rejected_log_ratios=diverge(pair.rejected_log_ratios)
        )
        weights = batch.present[0::2]
        if config.use_weighting and tokens.log_square_sums is not None:
            completions, n = batch.predictions.completions, batch.present.shape[0]
            weights = losses.policy_weights(tokens.logps, tokens.log_square_sums, completions, n)
        return _Read(scored, weights), _metrics(config, batch, tokens, pair, logps), tokens.aux

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        found, metrics, aux = read(params, frozen, batch, key)
        value, summed = _add_up(terms, found, batch.present[0::2], totals)
        metrics = metrics | {"loss": pairs.loss_metric(summed, batch)}
        return balance.add(weight, model, batch, aux, value, metrics)

    def read_coupled(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        found, metrics, aux = read(params, frozen, batch, key)
        router, metrics = balance.add(weight, model, batch, aux, jnp.zeros(()), metrics)
        return (found, router), metrics

    def combine(values: tuple[_Read, Array], batch: Batch, totals: Totals):
        found, router = values[0], values[1].sum()
        flat, present = jax.tree.map(lambda x: x.reshape(-1), (found, batch.present[..., 0::2]))
        value, summed = _add_up(terms, flat, present, totals)
        parts = (*pairs.loss_metric(summed, batch).parts, *([Mean(router, jnp.ones(()))] if weight else []))
        return value + router, {"loss": Sum(parts)}

    whole = CoupledLoss(read_coupled, combine) if coupled else loss
    return balance.couple(weight, model, whole, disable_dropout=config.disable_dropout)


make_step = common.step_maker(make_loss, totals)


def make_batch(config: Config, examples: Sequence[common.Example], **layout: Any) -> Batch:
    """Packs pairs (see `pairs.to_document`) into a batch; `layout` as `packing.pack`."""
    return common.pack_examples(sys.modules[__name__], config, examples, **layout)


Term = tuple[float, str, Callable[..., jax.Array]]


def _terms(config: Config) -> list[Term]:
    """Per loss its weight, its key in the totals, and the loss with its options, of log-probs and which pairs exist."""
    weights = config.loss_weights or (1.0,) * len(config.loss_types)
    found = []
    for name, weight in zip(config.loss_types, weights, strict=True):
        options = {option: getattr(config, option) for option in losses.preference_options(name)}
        term = partial(PREFERENCE_LOSSES[name], **options)
        if name not in COUPLED_LOSSES:
            term = partial(_without_where, term)
        found.append((weight, "tokens" if name in PER_TOKEN else "loss", term))
    return found


def _without_where(term: Callable[..., jax.Array], logps: PreferenceLogps, *, where: Array) -> jax.Array:
    del where
    return term(logps)


def _add_up(
    terms: Sequence[Term], found: _Read, present: Array, totals: Totals
) -> tuple[jax.Array, list[tuple[Array, str]]]:
    """The loss of pairs, and per term its sum and the key of its denominator in the totals."""
    summed = []
    for weight, count, term in terms:
        each = found.weights * term(found.scored, where=present)
        summed.append((weight * jnp.where(present > 0, each, 0).sum(), count))
    return jnp.stack([total / jnp.maximum(totals[count], 1) for total, count in summed]).sum(), summed


def _sum_up(config: Config, tokens: TokenStatistics, reference: Array, batch: Batch) -> tuple[PreferenceLogps, Array]:
    """What the losses look at, and `[completions]` log-probs for the metrics."""
    completions, n = batch.predictions.completions, batch.present.shape[0]
    lengths = losses.count_by_completion(completions, n)
    # Differenced per token before summing: the sums are large and nearly equal.
    differences, logps = tokens.logps - reference, tokens.logps
    plain = losses.sum_by_completion(logps, completions, n)
    if config.ld_alpha is not None:
        weights = losses.length_weights(completions, batch.predictions.steps, lengths, config.ld_alpha)
        differences, logps = differences * weights, logps * weights
    ratios = losses.sum_by_completion(differences, completions, n)
    pair = PreferenceLogps(ratios[0::2], ratios[1::2], lengths[0::2], lengths[1::2], plain[0::2], plain[1::2])
    return pair, losses.sum_by_completion(logps, completions, n)


def _metrics(
    config: Config, batch: Batch, tokens: TokenStatistics, pair: PreferenceLogps, logps: Array
) -> dict[str, Metric]:
    """Rewards are of log-ratios, whatever divergence the loss is taken of; under LD-DPO sums are weighted, as TRL's."""
    chosen, rejected = config.beta * pair.chosen_log_ratios, config.beta * pair.rejected_log_ratios
    metrics = {
        **pairs.reward_metrics(chosen, rejected, batch.present[0::2]),
        **pairs.token_metrics(tokens, logps, batch),
    }
    return jax.lax.stop_gradient(metrics)
