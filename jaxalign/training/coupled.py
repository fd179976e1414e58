"""Losses that couple the examples of a batch, exact under any split: read all, differentiate once, then backpropagate.

A loss such as KTO's, whose baseline is a mean over the batch, or AOT's, which sorts it, is no sum over micro-batches.
But it looks at few numbers per completion. Pass one computes these numbers v for every micro-batch. The loss L(v) and
its derivative are taken on the whole batch. Pass two backpropagates `sum_i stop_gradient(dL/dv_i) v_i` per micro-batch,
whose gradient by the parameters is that of L. Per micro-batch, memory grows by these numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxalign.types import Array, Batch, Metrics, PyTree

Totals = Mapping[str, Array]
Read = Callable[[PyTree, PyTree, Batch, Totals, jax.Array | None], tuple[PyTree, Metrics]]
Combine = Callable[[PyTree, Batch, Totals], tuple[jax.Array, Metrics]]


@dataclass(frozen=True)
class CoupledLoss:
    """A loss of the whole batch; `training.step` takes it wherever it takes a loss of a micro-batch.

    Attributes:
      read: `(params, frozen, micro_batch, totals, key) -> (values, metrics)`: a pytree of float arrays that the loss
        looks at, a few numbers per completion, and metrics that add up over micro-batches. One key, one value.
      combine: `(values, batch, totals) -> (loss, metrics)`: values and batch with a leading axis of micro-batches, and
        metrics of the whole batch.
    """

    read: Read
    combine: Combine


def read_all(
    loss: CoupledLoss, totals: Totals, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics, PyTree]:
    """Pass one: the loss, its metrics, and its derivative by the values `[micro, ...]`, not by the parameters."""

    def one(part):
        number, micro_batch = part
        return loss.read(params, frozen, micro_batch, totals, jax.random.fold_in(key, number))[0]

    values = jax.lax.map(one, (jnp.arange(batch.present.shape[0]), batch))
    (value, metrics), slopes = jax.value_and_grad(loss.combine, has_aux=True)(values, batch, totals)
    return value, metrics, slopes


def weighed(loss: CoupledLoss) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Pass two, as the loss of `(micro-batch, slopes)`: its gradient is the coupled loss's, its value means nothing."""

    def weighed_sum(params: PyTree, frozen: PyTree, part: tuple[Batch, PyTree], totals: Totals, key: jax.Array | None):
        micro_batch, slopes = part
        values, metrics = loss.read(params, frozen, micro_batch, totals, key)
        terms = jax.tree.map(lambda slope, value: (jax.lax.stop_gradient(slope) * value).sum(), slopes, values)
        return jnp.sum(jnp.stack(jax.tree.leaves(terms))), metrics

    return weighed_sum


def alone(loss: CoupledLoss) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The loss of a batch of one micro-batch, which needs one pass only."""

    def whole(params: PyTree, frozen: PyTree, micro_batch: Batch, totals: Totals, key: jax.Array | None):
        values, metrics = loss.read(params, frozen, micro_batch, totals, key)
        values, batch = jax.tree.map(lambda x: x[None], (values, micro_batch))
        value, extra = loss.combine(values, batch, totals)
        return value, {**metrics, **extra}

    return whole
