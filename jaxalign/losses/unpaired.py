"""Losses of single completions with a label: desirable or not. One unreduced loss per completion out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.masking import ratio
from jaxalign.types import Array


class UnpairedLogps(NamedTuple):
    """What an unpaired loss may look at.

    Attributes:
      log_ratios: `[n]`, `sum_t log policy - log reference` over the completion, differenced per token.
      labels: `[n]`, 1 where it is desirable, 0 where it is not.
      baseline: scalar without gradient: `z0` of KTO in nats, `delta` of BCO in units of rewards (beta times nats).
    """

    log_ratios: Array
    labels: Array
    baseline: Array | float = 0.0


def kto(logps: UnpairedLogps, *, beta: float) -> jax.Array:
    """KTO: the value of a completion over a baseline, concave where it gains and convex where it loses.

    `1 - sigmoid(beta (a - z0))` where it is desirable, `1 - sigmoid(beta (z0 - a))` where not, a its log-ratio. The
    weights of the two kinds are the caller's.

    Args:
      logps: `[n]` fields; `baseline` is z0, see `kto_baseline`.
      beta: how soon values saturate, > 0.

    Returns:
      `[n]`.

    Source: Ethayarajh et al., arXiv 2402.01306, eq. 7.
    """
    return jax.nn.sigmoid(-beta * _signs(logps) * (logps.log_ratios - logps.baseline))


def bco(logps: UnpairedLogps, *, beta: float) -> jax.Array:
    """BCO: a classifier of desirable and undesirable completions by their rewards, shifted by their mean.

    `-log sigmoid(beta a - delta)` where it is desirable, `-log sigmoid(delta - beta a)` where not, a its log-ratio.

    Args:
      logps: `[n]` fields; `baseline` is delta, see `running_mean`.
      beta: inverse strength of the KL penalty, > 0.

    Returns:
      `[n]`.

    Source: Jung et al., arXiv 2404.04656, eq. 8, without its matching of underlying distributions.
    """
    return -jax.nn.log_sigmoid(_signs(logps) * (beta * logps.log_ratios - logps.baseline))


def apo_zero_unpaired(logps: UnpairedLogps, *, beta: float) -> jax.Array:
    """APO-zero without pairs: desirable completions up, undesirable ones down.

    `1 - sigmoid(beta a)` where it is desirable, `sigmoid(beta a)` where not, a its log-ratio; `baseline` does not
    enter.

    Args:
      logps: `[n]` fields.
      beta: inverse strength of the KL penalty, > 0.

    Returns:
      `[n]`.

    Source: D'Oosterlinck et al., arXiv 2408.06266, eq. 7, its two terms taken apart.
    """
    return jax.nn.sigmoid(-beta * _signs(logps) * logps.log_ratios)


def kto_baseline(log_ratios: Array, where: Array) -> jax.Array:
    """KTO's z0: the mean log-ratio of completions that belong to other prompts, at least 0, without gradient.

    Args:
      log_ratios: any shape, of the mismatched completions of the global batch.
      where: the same shape, 1 where there is one.

    Returns:
      A scalar; 0 where there is none.
    """
    exist = jnp.asarray(where) > 0
    mean = ratio(jnp.where(exist, log_ratios, 0).sum(), exist.sum())
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def running_mean(mean: Array, count: Array, x: Array, where: Array) -> tuple[jax.Array, jax.Array]:
    """The mean of all that was seen, and how much that was, after some more.

    Args:
      mean: scalar, of what was seen before.
      count: scalar, how much that was.
      x: any shape.
      where: the same shape, 1 where x counts.
    """
    exist = jnp.asarray(where) > 0
    new, added = jnp.where(exist, x, 0).sum(), exist.sum()
    total = count + added
    return jnp.asarray(mean + ratio(new - added * mean, total)), jnp.asarray(total)


def _signs(logps: UnpairedLogps) -> jax.Array:
    chex.assert_equal_shape([logps.log_ratios, logps.labels])
    return jnp.where(jnp.asarray(logps.labels) > 0, 1.0, -1.0).astype(jnp.asarray(logps.log_ratios).dtype)


UnpairedLoss = Callable[..., jax.Array]
UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {"kto": kto, "bco": bco, "apo_zero_unpaired": apo_zero_unpaired}
# Which of them compare with completions of other prompts, and which with the mean of all rewards so far.
MISMATCHED_LOSSES = frozenset({"kto"})
RUNNING_LOSSES = frozenset({"bco"})
