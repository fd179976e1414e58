"""Parameters as decoding wants them: cast, laid out and taken apart once per rollout, not for every token."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.models import Model
from jaxalign.sharding import param_shardings
from jaxalign.types import PyTree, Variables


def make_decoding(model: Model, mesh: Mesh | None = None) -> Callable[[Variables], Variables]:
    """A jitted function from a model's variables to what its sampler takes.

    They are cast to the dtype of computation and every layer gets arrays of its own (see `Model.unrolled`). On a mesh
    they are split over `tensor` and `expert` only: every data shard decodes by itself and needs a whole copy, save for
    experts, to which the shards of `expert` send their tokens.
    """
    _, unroll = model.unrolled()
    if mesh is None:
        return jax.jit(unroll)

    def spread(sharding: NamedSharding) -> NamedSharding:
        spec = (axis if axis in ("tensor", "expert") else None for axis in sharding.spec)
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    def shardings(shapes: PyTree) -> PyTree:
        return jax.tree.map(spread, param_shardings(mesh, shapes))

    # What comes of it depends on the variables: quantised weights stay so, adapters are merged.
    def place(variables: Variables) -> Variables:
        apart = unroll(variables)
        return jax.lax.with_sharding_constraint(apart, shardings(apart))

    return jax.jit(place)
