"""The train state: exactly what a checkpoint holds of the policy."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
      step: int32 scalar, optimiser updates made so far.
      params: the trainable parameters.
      opt_state: the optimiser's state.
      key: the run's key; the key of a step is `fold_in(key, step)`, so it never changes.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    key: jax.Array


def init_state(params: PyTree, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A state at step 0; `params` are copied, since a donated state would delete the caller's."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)
