"""Arrays in the host's memory between their uses, on devices that have a memory of their own."""

from __future__ import annotations

import jax

from jaxalign.types import PyTree

HOST = "pinned_host"


def on_host(shardings: PyTree, tree: PyTree) -> PyTree:
    """Shardings of these arrays in the host's memory; scalars stay."""
    return jax.tree.map(lambda s, x: s.with_memory_kind(HOST) if x.ndim else s, shardings, tree)


def to_device(tree: PyTree) -> PyTree:
    """The same arrays in the devices' memory; to be called inside of `jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, tree)
