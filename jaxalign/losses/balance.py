"""The load-balancing loss of sparse models."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import Array


def balance_loss(router_probs: Array, expert_loads: Array, *, experts_per_token: int) -> jax.Array:
    """`experts * sum over e of f_e P_e`, the less the more evenly the experts are used.

    `f_e` is the share of tokens, over all sparse layers, that expert e gets (these sum to `experts_per_token`), and
    `P_e` the mean of its probability; only `P_e` has a gradient. With the loads of a whole batch and the probabilities
    of a part of it, this is that part's term: the terms of all parts add up to the loss of the batch.

    Source: Fedus et al., arXiv 2101.03961, eq. 4 to 6; with several experts per token and layers taken together, as
    transformers does.

    Args:
      router_probs: `[experts]`, summed over tokens and layers (of a part of the batch).
      expert_loads: `[experts]`, tokens that each expert gets, summed over layers (of the whole batch).
      experts_per_token: how many a token is sent to.
    """
    tokens = jnp.maximum(expert_loads.sum() / experts_per_token, 1)
    return expert_loads.shape[0] * (jax.lax.stop_gradient(expert_loads / jnp.square(tokens)) * router_probs).sum()
