"""What a preference loss weighs: tokens by their place in a pair (LD-DPO), pairs by the policy's own say (WPO)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.masking import mean_by_completion
from jaxalign.types import Array


def length_weights(completions: Array, steps: Array, lengths: Array, ld_alpha: float) -> jax.Array:
    """LD-DPO's weight of each token: 1 up to the length that both completions of its pair reach, then `ld_alpha`.

    Args:
      completions: int32 `[rows, predictions]`, 2i chosen, 2i + 1 rejected; others get a weight that nobody may read.
      steps: int32 `[rows, predictions]`, index within the completion.
      lengths: float `[completions]`, tokens of each.
      ld_alpha: in [0, 1]; 1 = all tokens alike, 0 = the longer completion's tail does not count.

    Returns:
      float `[rows, predictions]`.

    Source: Liu et al., arXiv 2409.06411.
    """
    chex.assert_equal_shape([completions, steps])
    lengths = jnp.asarray(lengths)
    shared = jnp.repeat(jnp.minimum(lengths[0::2], lengths[1::2]), 2)
    within = steps < shared[jnp.clip(completions, 0, len(shared) - 1)]
    return jnp.where(within, 1.0, ld_alpha)


def policy_weights(token_logps: Array, log_square_sums: Array, completions: Array, n: int) -> jax.Array:
    """WPO's weight of each pair: the product of its completions' mean probabilities under the policy, without gradient.

    `w = exp(mean_t [log p_t - log sum_v p_v^2])` per completion, aligned so that a completion drawn from the policy
    weighs about 1.

    Args:
      token_logps: float `[rows, predictions]`, log p_t of the target.
      log_square_sums: float `[rows, predictions]`, log sum_v p_v^2 over the vocabulary.
      completions: int32 `[rows, predictions]`, 2i chosen, 2i + 1 rejected.
      n: number of completions.

    Returns:
      float `[n / 2]`.

    Source: Zhou et al., arXiv 2406.11827, eq. 2 and its sampled alignment.
    """
    weights = jnp.exp(mean_by_completion(token_logps - log_square_sums, completions, n))
    return jax.lax.stop_gradient(weights[0::2] * weights[1::2])
