"""Arrays in the host's memory between their uses, on devices that have a memory of their own."""

from __future__ import annotations

import jax
import optax

from jaxalign.types import PyTree

HOST = "pinned_host"


def on_host(shardings: PyTree, tree: PyTree) -> PyTree:
    """Shardings of these arrays in the host's memory; scalars stay."""
    return jax.tree.map(lambda s, x: s.with_memory_kind(HOST) if x.ndim else s, shardings, tree)


def to_device(tree: PyTree) -> PyTree:
    """The same arrays in the devices' memory; to be called inside of `jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, tree)


def to_host(tree: PyTree) -> PyTree:
    """The inverse of `to_device`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, tree)


def offload(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser with its state on the host: fetched once the gradients are there, and brought back after.

    The jitted step's `out_shardings` must say so too, see `on_host`.
    """

    def init(params):
        return to_host(optimizer.init(params))

    def update(updates, state, params=None):
        # Not before: on the way to the gradients the activations need the room.
        updates, state = jax.lax.optimization_barrier((updates, state))
        updates, state = optimizer.update(updates, to_device(state), params)
        return updates, to_host(state)

    return optax.GradientTransformation(init, update)
