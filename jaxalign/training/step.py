"""One optimiser step over micro-batches, for any loss; knows no method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from jaxalign.training.coupled import CoupledLoss, Totals, alone, read_all, weighed
from jaxalign.training.state import TrainState
from jaxalign.types import Array, Batch, Max, Mean, Metric, Metrics, Min, PyTree, Sum

LossFn = Callable[[PyTree, PyTree, Batch, Totals, jax.Array | None], tuple[jax.Array, Metrics]]
TotalsFn = Callable[[Batch], Totals]
Step = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class PreparedLoss:
    """A loss that couples the examples of a batch through numbers that depend on the parameters.

    Attributes:
      loss: as any other, on batches that carry these numbers as fields.
      prepare: `(params, frozen, batch, key) -> batch` with these fields, from a pass over the global batch. It has no
        gradient, and gets the same key as the micro-batches' keys are folded from.
    """

    loss: LossFn | CoupledLoss
    prepare: Callable[[PyTree, PyTree, Batch, jax.Array | None], Batch]

    def __call__(
        self, params: PyTree, frozen: PyTree, batch: Batch, totals: Totals, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a micro-batch."""
        loss = alone(self.loss) if isinstance(self.loss, CoupledLoss) else self.loss
        return loss(params, frozen, batch, totals, key)


def make_step(
    loss: LossFn | CoupledLoss,
    totals: TotalsFn,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array] | None = None,
) -> Step:
    """A pure step: gradients are summed over micro-batches by `lax.scan`, then applied once.

    Args:
      loss: `(params, frozen, micro_batch, totals, key) -> (sum of loss terms over their totals, metrics)`; the
        micro-batch has no leading axis. A `CoupledLoss` where the loss is no such sum.
      totals: counts each loss term's denominator over the global batch, before the scan; therefore losses, gradients
        and metrics of micro-batches and devices only add.
      optimizer: any optax transformation.
      learning_rate: `step -> rate`, only to report it.

    Returns:
      `(state, frozen, batch) -> (state, metrics)`. The caller jits it and donates the state.
    """

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = accumulate(
            loss, totals(batch), state.params, frozen, batch, jax.random.fold_in(state.key, state.step)
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "grad_norm": _once(optax.tree.norm(grads))}
        if learning_rate is not None:
            metrics["learning_rate"] = _once(learning_rate(state.step))
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def accumulate(
    loss: LossFn | CoupledLoss, totals: Totals, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array
) -> tuple[PyTree, Metrics]:
    """The gradient of the summed loss and its metrics, one micro-batch at a time; a coupled loss takes two passes.

    Returns:
      Gradients in the parameters' dtype (float32 at least while they are summed) and metrics, `loss` among them.
    """
    if isinstance(loss, PreparedLoss):
        batch, loss = loss.prepare(params, frozen, batch, key), loss.loss
    if not isinstance(loss, CoupledLoss):
        return _accumulate(loss, totals, params, frozen, batch, key)
    if batch.present.shape[0] == 1:
        return _accumulate(alone(loss), totals, params, frozen, batch, key)
    value, extra, slopes = read_all(loss, totals, params, frozen, batch, key)
    grads, metrics = _accumulate(weighed(loss), totals, params, frozen, (batch, slopes), key)
    return grads, {**metrics, **extra, "loss": _once(value)}


def _accumulate(
    loss: Callable[..., tuple[jax.Array, Metrics]],
    totals: Totals,
    params: PyTree,
    frozen: PyTree,
    parts: PyTree,
    key: jax.Array,
) -> tuple[PyTree, Metrics]:
    """Sums over the leading axis of `parts`, which the loss takes one at a time."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    wide = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)

    def one(total, part):
        number, own = part
        (value, metrics), grads = gradient(params, frozen, own, totals, jax.random.fold_in(key, number))
        return jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, grads), (value, metrics)

    count = jax.tree.leaves(parts)[0].shape[0]
    if count == 1:
        # A scan of one would still keep a second copy of the gradients.
        only = jax.tree.map(lambda x: x[0], parts)
        (value, metrics), summed = gradient(params, frozen, only, totals, jax.random.fold_in(key, 0))
    else:
        summed, (values, stacked) = jax.lax.scan(one, wide, (jnp.arange(count), parts))
        value, metrics = values.sum(0), merge_stacked(stacked)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), summed, params), {**metrics, "loss": _once(value)}


def evaluate(loss: LossFn | CoupledLoss, totals: TotalsFn, params: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
    """Loss and metrics of a batch without gradients or noise.

    `loss` is a mean weighted by the batch's `totals["loss"]`: those of several batches merge to that of all together.
    A loss whose terms have denominators of their own gives a metric `loss` itself (a `Sum`), which merges so too.
    """
    counts = totals(batch)
    if isinstance(loss, PreparedLoss):
        batch, loss = loss.prepare(params, frozen, batch, None), loss.loss
    read = loss.read if isinstance(loss, CoupledLoss) else loss

    def one(_, micro_batch):
        return None, read(params, frozen, micro_batch, counts, None)

    _, (values, stacked) = jax.lax.scan(one, None, batch)
    value, extra = loss.combine(values, batch, counts) if isinstance(loss, CoupledLoss) else (values.sum(0), {})
    return {"loss": Mean(value * counts["loss"], counts["loss"]), **merge_stacked(stacked), **extra}


def merge_stacked(metrics: Metrics) -> Metrics:
    """Merges metrics whose leaves carry a leading axis of parts."""
    return {name: _merge_stacked(metric) for name, metric in metrics.items()}


def _merge_stacked(metric: Metric) -> Metric:
    if isinstance(metric, Mean):
        return _sum_up(metric)
    if isinstance(metric, Sum):
        return Sum(tuple(_sum_up(part) for part in metric.parts))
    return Min(jnp.min(metric.least, 0)) if isinstance(metric, Min) else Max(jnp.max(metric.most, 0))


def _sum_up(metric: Mean) -> Mean:
    return Mean(jnp.sum(metric.total, 0), jnp.sum(metric.weight, 0))


def _once(value: Array) -> Mean:
    return Mean(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))
