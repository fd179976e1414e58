"""Alignment via optimal transport: preference losses that compare sorted batches, quantile by quantile, not pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array

if TYPE_CHECKING:
    from jaxalign.losses.preference import PreferenceLogps

# Losses of the whole batch: they take `where`, and no part of a batch has a loss of its own.
COUPLED_LOSSES = frozenset({"aot", "aot_unpaired"})


def aot(logps: PreferenceLogps, *, beta: float, label_smoothing: float = 0.0, where: Array | None = None) -> jax.Array:
    """AOT on pairs: the policy's margins should exceed the reference's in every quantile.

    `-(1 - e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i)`, `d = sort(m) - sort(m_ref)` over the batch, m the
    margins `log p(chosen) - log p(rejected)` of the policy and of the reference.

    Args:
      logps: `[pairs]` fields; `chosen_logps` and `rejected_logps` must be there.
      beta: inverse strength of the KL penalty, > 0.
      label_smoothing: e, in [0, 0.5).
      where: 1 for pairs that exist; None = all.

    Returns:
      `[pairs]`, by quantile: the first as many as there are pairs, then 0.

    Source: Melnyk et al., arXiv 2406.05882, algorithm 1.
    """
    if logps.chosen_logps is None or logps.rejected_logps is None:
        raise ValueError("aot compares margins of the policy: give chosen_logps and rejected_logps")
    chex.assert_equal_shape(list(logps))
    margins = logps.chosen_logps - logps.rejected_logps
    # The reference is constant; of a difference of the policy's log-probs only rounding would be left.
    ref_margins = jax.lax.stop_gradient(margins - (logps.chosen_log_ratios - logps.rejected_log_ratios))
    return _by_quantile(margins, ref_margins, beta, label_smoothing, where)


def aot_unpaired(
    logps: PreferenceLogps, *, beta: float, label_smoothing: float = 0.0, where: Array | None = None
) -> jax.Array:
    """AOT on two heaps: log-ratios of the chosen should exceed those of the rejected in every quantile.

    As `aot`, with `d = sort(a) - sort(b)`, a and b the log-ratios of the chosen and of the rejected completions.

    Args:
      logps: `[pairs]` fields.
      beta: inverse strength of the KL penalty, > 0.
      label_smoothing: e, in [0, 0.5).
      where: 1 for pairs that exist; None = all.

    Returns:
      `[pairs]`, by quantile: the first as many as there are pairs, then 0.

    Source: Melnyk et al., arXiv 2406.05882, algorithm 1.
    """
    chex.assert_equal_shape([logps.chosen_log_ratios, logps.rejected_log_ratios])
    return _by_quantile(logps.chosen_log_ratios, logps.rejected_log_ratios, beta, label_smoothing, where)


def _by_quantile(high: Array, low: Array, beta: float, label_smoothing: float, where: Array | None) -> jax.Array:
    exist = jnp.ones(high.shape, bool) if where is None else jnp.asarray(where) > 0
    real = jnp.arange(high.size) < exist.sum()
    high, low = (jnp.where(real, jnp.sort(jnp.where(exist, x, jnp.inf)), 0) for x in (high, low))
    margin = beta * (high - low)
    smooth = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    return jnp.where(real, smooth, 0)
