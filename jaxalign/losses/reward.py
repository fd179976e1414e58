"""Losses of reward models: scores of better and worse completions in, one unreduced loss per pair out."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array


class RankingTerms(NamedTuple):
    """The pairs of a ranking; `[prompts, k, k]` each, the better completion along the second axis.

    Attributes:
      loss: unreduced; 0 where there is no pair.
      pairs: 1 where the first completion ranks above the second and both exist.
    """

    loss: jax.Array
    pairs: jax.Array


def bradley_terry(
    chosen: Array, rejected: Array, *, margins: Array | None = None, center_rewards_coefficient: float = 0.0
) -> jax.Array:
    """The negative log-likelihood that the chosen completion beats the rejected one.

    `-log sigmoid(s_chosen - s_rejected - m) + c (s_chosen + s_rejected)^2`.

    Args:
      chosen: scores, float, any shape.
      rejected: scores, the same shape.
      margins: m, how much better the chosen one is said to be, in units of the score, the same shape; none = 0.
      center_rewards_coefficient: c, which pulls the mean score to 0.

    Returns:
      The shape of `chosen`.

    Source: Ouyang et al., arXiv 2203.02155, eq. 1; m: Touvron et al., arXiv 2307.09288, eq. 2; c: Eisenstein et al.,
    arXiv 2312.09244.
    """
    chosen, rejected = jnp.asarray(chosen), jnp.asarray(rejected)
    chex.assert_equal_shape([chosen, rejected] if margins is None else [chosen, rejected, margins])
    differences = chosen - rejected if margins is None else chosen - rejected - margins
    return -jax.nn.log_sigmoid(differences) + center_rewards_coefficient * jnp.square(chosen + rejected)


def ranking(
    scores: Array,
    ranks: Array,
    present: Array,
    *,
    margins: Array | None = None,
    center_rewards_coefficient: float = 0.0,
) -> RankingTerms:
    """`bradley_terry` on every pair of a prompt's completions of which one ranks above the other.

    Args:
      scores: float `[prompts, k]`.
      ranks: int or float `[prompts, k]`, the smaller the better; equal ranks make no pair.
      present: `[prompts, k]`, non-zero where the completion exists.
      margins: `[prompts, k, k]`, m of (better, worse).
      center_rewards_coefficient: as `bradley_terry`.

    Source: Ouyang et al., arXiv 2203.02155, eq. 1, whose mean over a prompt's pairs is left to the caller.
    """
    scores, ranks, present = jnp.asarray(scores), jnp.asarray(ranks), jnp.asarray(present) > 0
    chex.assert_equal_shape([scores, ranks, present])
    chex.assert_rank(scores, 2)
    shape = (*scores.shape, scores.shape[1])
    first = jnp.broadcast_to(scores[:, :, None], shape)
    second = jnp.broadcast_to(scores[:, None, :], shape)
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
    loss = bradley_terry(first, second, margins=margins, center_rewards_coefficient=center_rewards_coefficient)
    return RankingTerms(jnp.where(pairs, loss, 0), pairs.astype(scores.dtype))
