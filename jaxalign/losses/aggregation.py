"""From token losses to one number: the weight of each token, and the denominator counted on the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.masking import count_by_completion, ratio
from jaxalign.types import Array


class Counts(NamedTuple):
    """What a denominator may be made of; scalars over an optimiser's batch, all micro-batches and devices.

    Attributes:
      completions: completions that exist, those included whose tokens are all left out of the loss.
      tokens: completion tokens in the loss.
      window_tokens: the same, averaged over the optimiser batches that share one rollout buffer.
      max_steps: longest completion that could have been drawn, in tokens.
    """

    completions: Array
    tokens: Array
    window_tokens: Array | float
    max_steps: Array | int


class Aggregation(NamedTuple):
    """A loss is `sum over tokens of weight * term / total`.

    Attributes:
      weights: tokens per completion, float `[n]` -> weight of each of its tokens, `[n]`.
      total: the denominator, a scalar.
    """

    weights: Callable[[Array], jax.Array]
    total: Callable[[Counts], Array | float]


def count_batch(
    present: Array, completions: Array, *, max_steps: int, window_tokens: Array | float | None = None
) -> Counts:
    """Counts a global batch before it is split; its leading axes do not matter.

    Args:
      present: float `[..., n]`, 1 where a completion exists.
      completions: int32 `[..., rows, predictions]`, -1 = not in the loss (padding, or left out).
      max_steps: longest completion that could have been drawn.
      window_tokens: see `Counts`; this batch's own count by default.
    """
    tokens = (jnp.asarray(completions) >= 0).sum().astype(jnp.float32)
    return Counts(jnp.sum(present), tokens, tokens if window_tokens is None else window_tokens, max_steps)


def aggregate(
    aggregation: Aggregation, losses: Array, completions: Array, n: int, *, total: Array | float
) -> jax.Array:
    """The share of a micro-batch in the loss of the global batch; shares add.

    Args:
      aggregation: one of `AGGREGATIONS`.
      losses: float `[rows, predictions]`; whatever stands where `completions` is -1 is not read.
      completions: int32 `[rows, predictions]`, number of the completion; -1 = not in the loss.
      n: number of completions.
      total: `aggregation.total` of the global batch's counts.

    Returns:
      A scalar; 0 where the total is 0.
    """
    chex.assert_equal_shape([losses, completions])
    weights = aggregation.weights(count_by_completion(completions, n).astype(losses.dtype))
    terms = jnp.where(completions >= 0, losses, 0) * spread_by_completion(weights, completions)
    return ratio(terms.sum(), jnp.asarray(total, losses.dtype))


def spread_by_completion(x: Array, completions: Array) -> jax.Array:
    """Gives each prediction its completion's value: `[n]` -> `[rows, predictions]`, 0 at padding (-1)."""
    x = jnp.asarray(x)
    chex.assert_rank([x, completions], [1, 2])
    real = jnp.where(completions >= 0, completions, x.shape[0])
    return x.at[real].get(mode="fill", fill_value=0)


def _mean(counts: Array) -> jax.Array:
    return 1 / jnp.maximum(counts, 1)


# grpo:    mean over completions of the mean over tokens. Shao et al., arXiv 2402.03300, eq. 3.
# bnpo:    mean over the tokens of this optimiser batch.
# dapo:    sum over tokens / tokens of an average optimiser batch of the same buffer, so that tokens weigh the same in
#          all of them; where a buffer is one batch, it is bnpo. Yu et al., arXiv 2503.14476, eq. 12; count as in TRL.
# dr_grpo: sum over tokens / (completions * longest possible). Liu et al., arXiv 2503.20783.
# luspo:   mean over completions of the sum over tokens; for sequence ratios. Liu et al., arXiv 2602.05261.
AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": Aggregation(_mean, lambda counts: counts.completions),
    "bnpo": Aggregation(jnp.ones_like, lambda counts: counts.tokens),
    "dapo": Aggregation(jnp.ones_like, lambda counts: counts.window_tokens),
    "dr_grpo": Aggregation(jnp.ones_like, lambda counts: counts.completions * counts.max_steps),
    "luspo": Aggregation(jnp.ones_like, lambda counts: counts.completions),
}
