"""The load-balancing loss in a method: what it adds to the loss, and what it must know of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxalign.losses import balance_loss
from jaxalign.models import Model
from jaxalign.models.freezing import join
from jaxalign.training.coupled import CoupledLoss
from jaxalign.training.step import LossFn, PreparedLoss
from jaxalign.types import Array, Batch, Mean, Metrics, Sum, Variables

LOADS = "expert_loads"  # the field with the loads of the whole batch, [micro, experts]
Loss = TypeVar("Loss", bound=LossFn | CoupledLoss)
# (params, frozen, micro-batch, key) -> its loads
Count = Callable[[Variables, Variables, Batch, jax.Array | None], Array]


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


def token_weights(batch: Batch, every: int = 1) -> jax.Array:
    """How often each token of a micro-batch counts, float32 `[rows, length]`: 0 in padding, else once.

    A prompt's token counts once for each completion: so a shared prompt weighs as much as its copies.

    Args:
      batch: a micro-batch.
      every: only completions whose number is a multiple of this count, as where the others are read without a gradient.
    """
    documents, asked = batch.rows.documents, batch.predictions

    def completions(documents, sources, first):
        counts = jnp.zeros(documents.shape[0] + 1, jnp.float32).at[documents[sources]].add(first.astype(jnp.float32))
        return counts[documents]

    # Numbers from n on are those of prompts that are predicted too.
    counted = (asked.completions >= 0) & (asked.completions < batch.present.shape[0]) & (asked.completions % every == 0)
    prompts = jax.vmap(completions)(documents, asked.sources, counted & (asked.steps == 0))
    own = ((batch.rows.branches - 1) % every == 0).astype(jnp.float32)
    return jnp.where(batch.rows.branches > 0, own, prompts) * (documents > 0)


def add(
    weight: float,
    model: Model,
    batch: Batch,
    aux: Mapping[str, Array],
    value: jax.Array,
    metrics: Metrics,
    *,
    loads: str = LOADS,
    name: str = "aux_loss",
) -> tuple[jax.Array, Metrics]:
    """A micro-batch's loss and metrics, with the load-balancing loss.

    Args:
      weight: see `coefficient`; 0 changes nothing.
      model: the one with the experts.
      batch: a micro-batch; the field `loads` is there where the batch has several, see `couple`.
      aux: what `Model.apply` says.
      value: the loss so far.
      metrics: the metrics so far.
      loads: name of the field.
      name: of the metric.
    """
    if not weight:
        return value, metrics
    known = batch.fields.get(loads, aux["expert_loads"])
    term = balance_loss(aux["router_probs"], known, experts_per_token=model.config.experts_per_token)
    part = aux["expert_loads"].sum() / jnp.maximum(known.sum(), 1)
    if isinstance(loss := metrics.get("loss"), Sum):
        metrics = {**metrics, "loss": Sum((*loss.parts, Mean(weight * term, part)))}
    return value + weight * term, jax.lax.stop_gradient({**metrics, name: Mean(term, part)})


def couple(
    weight: float,
    model: Model,
    loss: Loss,
    *,
    disable_dropout: bool,
    every: int = 1,
    noise: Callable[[Batch, jax.Array | None], Array | None] = lambda batch, key: None,
) -> Loss | PreparedLoss:
    """A loss that uses `add`: the loads of the whole batch are counted first, as a product of two means needs.

    That is a forward pass more, without the head, for batches of several micro-batches; `every` as in `token_weights`,
    `noise` as what the loss adds to the token embeddings.
    """
    if not weight:
        return loss

    def count(params: Variables, frozen: Variables, batch: Batch, key: jax.Array | None) -> Array:
        own = None if disable_dropout else key
        return read_loads(model, join(params, frozen), batch, own, every=every, noise=noise(batch, key))

    return prepare(loss, {LOADS: count})


def prepare(loss: LossFn | CoupledLoss, counts: Mapping[str, Count]) -> PreparedLoss:
    """A loss whose batches carry the loads of the whole batch, by the field that each of `counts` fills."""
    return PreparedLoss(loss, partial(_count_loads, counts))


def read_loads(
    model: Model,
    variables: Variables,
    batch: Batch,
    key: jax.Array | None,
    *,
    every: int = 1,
    noise: Array | None = None,
) -> Array:
    """Tokens that a micro-batch sends to each expert, float32 `[experts]`."""
    weights = token_weights(batch, every)
    return model.apply(variables, batch.rows, key=key, weights=weights, noise=noise)[2]["expert_loads"]


def _count_loads(
    counts: Mapping[str, Count], params: Variables, frozen: Variables, batch: Batch, key: jax.Array | None
) -> Batch:
    size = batch.present.shape[0]
    if size == 1:
        return batch

    def one(part):
        number, micro_batch = part
        own = None if key is None else jax.random.fold_in(key, number)
        return {name: count(params, frozen, micro_batch, own) for name, count in counts.items()}

    loads = jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, (jnp.arange(size), batch)))
    return replace(batch, fields={**batch.fields, **{name: jnp.tile(x, (size, 1)) for name, x in loads.items()}})
