"""The critic's loss."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array


class ValueTerms(NamedTuple):
    """What the value loss gives back, each in the shape of its `values`.

    Attributes:
      loss: to be minimised.
      clipped: 1 where the bound on the change of the value stopped the gradient.
    """

    loss: jax.Array
    clipped: jax.Array


def value_loss(values: Array, old_values: Array, returns: Array, *, epsilon: float | None = None) -> ValueTerms:
    """PPO's clipped squared error.

    `max((V - R)^2, (clip(V, V_old - ε, V_old + ε) - R)^2) / 2`.

    Args:
      values: V, any shape.
      old_values: V_old, what the critic said when the tokens were drawn, the same shape; no gradient.
      returns: R, the same shape; no gradient.
      epsilon: ε, in the unit of the rewards; None = no clipping.

    Source: Ziegler et al., arXiv 1909.08593, as in its code; detail 19 of "The N Implementation Details of RLHF with
    PPO".
    """
    chex.assert_equal_shape([values, old_values, returns])
    values = jnp.asarray(values)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    errors = jnp.square(values - returns)
    if epsilon is None:
        return ValueTerms(errors / 2, jnp.zeros_like(values))
    held = jnp.square(jnp.clip(values, old_values - epsilon, old_values + epsilon) - returns)
    clipped = jax.lax.stop_gradient((held > errors).astype(values.dtype))
    return ValueTerms(jnp.maximum(errors, held) / 2, clipped)
