"""Sums and means over predictions, where padding never counts."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array


def sum_by_completion(x: Array, completions: Array, n: int) -> jax.Array:
    """Sums predictions by completion.

    Args:
      x: float `[rows, predictions]`.
      completions: int32 `[rows, predictions]`, number of the completion; -1 = padding, left out.
      n: number of completions.

    Returns:
      `[n]`; 0 for a completion without predictions.
    """
    chex.assert_equal_shape([x, completions])
    real = jnp.where((completions >= 0) & (completions < n), completions, n)
    return jnp.zeros(n, x.dtype).at[real].add(jnp.where(real < n, x, 0), mode="drop")


def count_by_completion(completions: Array, n: int) -> jax.Array:
    """Number of predictions of each completion, float32 `[n]`."""
    return sum_by_completion(jnp.ones(completions.shape, jnp.float32), completions, n)


def mean_by_completion(x: Array, completions: Array, n: int) -> jax.Array:
    """Mean over each completion's predictions, `[n]`; 0 for a completion without any."""
    count = count_by_completion(completions, n)
    return sum_by_completion(x, completions, n) / jnp.maximum(count, 1)


def by_step(x: Array, completions: Array, steps: Array, n: int, max_steps: int) -> jax.Array:
    """Scatters `[rows, predictions]` to `[n, max_steps]`; 0 where a completion has no such step."""
    chex.assert_equal_shape([x, completions, steps])
    real = jnp.where(completions >= 0, completions, n)
    return jnp.zeros((n, max_steps), x.dtype).at[real, steps].set(x, mode="drop")


def ratio(total: Array, count: Array) -> jax.Array:
    """`total / count`, and 0 where the count is 0."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
