"""The load-balancing loss in a method: what it adds to the loss, and what it must know of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxalign.losses import balance_loss
from jaxalign.models import Model
from jaxalign.training.step import LossFn, PreparedLoss
from jaxalign.types import Array, Batch, Mean, Metrics, Sum, Variables


def coefficient(given: float | None, model: Model) -> float:
    """The weight of the load-balancing loss: what the method says, or else the model's config; 0 for dense models.

    Raises:
      ValueError: a weight for a dense model.
    """
    sparse = any(model.config.sparse_layers)
    if given is None:
        return model.config.router_aux_loss_coef if sparse else 0.0
    if given and not sparse:
        raise ValueError(f"router_aux_loss_coef={given}, but the model has no experts: leave it out")
    return given


def token_weights(batch: Batch) -> jax.Array:
    """How often each token of a micro-batch counts, float32 `[rows, length]`: 0 in padding, else once.

    A prompt's token counts once for each completion: so a shared prompt weighs as much as its copies.
    """
    documents, asked = batch.rows.documents, batch.predictions

    def completions(documents, sources, first):
        counts = jnp.zeros(documents.shape[0] + 1, jnp.float32).at[documents[sources]].add(first.astype(jnp.float32))
        return jnp.maximum(counts[documents], 1)

    shared = jax.vmap(completions)(documents, asked.sources, (asked.completions >= 0) & (asked.steps == 0))
    return jnp.where(batch.rows.branches > 0, 1, shared) * (documents > 0)


def add(
    weight: float, model: Model, batch: Batch, aux: Mapping[str, Array], value: jax.Array, metrics: Metrics
) -> tuple[jax.Array, Metrics]:
    """A micro-batch's loss and metrics, with the load-balancing loss.

    Args:
      weight: see `coefficient`; 0 changes nothing.
      model: the policy.
      batch: a micro-batch; `expert_loads` is there where the batch has several, see `couple`.
      aux: what `Model.apply` says.
      value: the loss so far.
      metrics: the metrics so far.
    """
    if not weight:
        return value, metrics
    loads = batch.fields.get("expert_loads", aux["expert_loads"])
    term = balance_loss(aux["router_probs"], loads, experts_per_token=model.config.experts_per_token)
    part = aux["expert_loads"].sum() / jnp.maximum(loads.sum(), 1)
    if isinstance(known := metrics.get("loss"), Sum):
        metrics = {**metrics, "loss": Sum((*known.parts, Mean(weight * term, part)))}
    return value + weight * term, jax.lax.stop_gradient({**metrics, "aux_loss": Mean(term, part)})


def couple(weight: float, model: Model, loss: LossFn, *, disable_dropout: bool) -> LossFn:
    """A loss that uses `add`: the loads of the whole batch are counted first, as a product of two means needs.

    That is a forward pass more, without the head, for batches of several micro-batches.
    """
    if not weight:
        return loss
    return PreparedLoss(loss, partial(_count_loads, model, disable_dropout))


def _count_loads(
    model: Model, disable_dropout: bool, params: Variables, frozen: Variables, batch: Batch, key: jax.Array | None
) -> Batch:
    count = batch.present.shape[0]
    if count == 1:
        return batch

    def one(part):
        number, micro_batch = part
        own = None if disable_dropout or key is None else jax.random.fold_in(key, number)
        weights = token_weights(micro_batch)
        return model.apply({**frozen, **params}, micro_batch.rows, key=own, weights=weights)[2]["expert_loads"]

    loads = jax.lax.map(one, (jnp.arange(count), batch)).sum(0)
    return replace(batch, fields={**batch.fields, "expert_loads": jnp.tile(loads, (count, 1))})
