"""A program of a stage: a jitted function of the run, what it takes as shapes, and what lies beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.planning.work import Work
from jaxalign.run.prepare import Prepared
from jaxalign.run.programs import Training
from jaxalign.sharding import batch_shardings
from jaxalign.training.offload import HOST
from jaxalign.types import Batch, PyTree

PARAMETERS, OPTIMIZER, REFERENCE = "parameters", "optimizer", "reference"
COPY, DRAWING = "decoding copy", "rollout"


@dataclass(frozen=True)
class Program:
    """A jitted function of the run, and what it is called with.

    Attributes:
      name: what it does.
      run: the jitted function.
      given: gives `arguments`; where those are another program's result, that is compiled for it.
      takes: held groups (see `Programs`) that are among the arguments.
      beside: held groups that are there while it runs, those that it takes among them.
      runs: how often it runs per optimiser step.
      work: what it computes when it runs once.
      trips: how often its loops run whose end is computed, by depth.
      cache: bytes of keys and values that one device keeps while it runs, among what is temporary.
      parts: by what it does one after the other, what that computes, where that is told apart.
    """

    name: str
    run: Any
    given: Callable[[], tuple[Any, ...]]
    takes: tuple[str, ...]
    beside: tuple[str, ...]
    work: Work
    runs: float = 1.0
    trips: tuple[int, ...] = ()
    cache: int = 0
    parts: Mapping[str, Work] = field(default_factory=dict)

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """Trees of `ShapeDtypeStruct`."""
        return self.given()

    @cached_property
    def timed(self) -> tuple[Any, float]:
        """The compiled program, and how many seconds that took; a second look costs nothing."""
        start = time.perf_counter()
        compiled = self.run.lower(*self.arguments).compile()
        return compiled, time.perf_counter() - start

    @property
    def compiled(self) -> Any:
        """The compiled program."""
        return self.timed[0]

    def result(self) -> Any:
        """What it gives, as shapes with the shardings that the compiler chose; without them where it does not fit."""
        shapes = jax.eval_shape(self.run, *self.arguments)
        try:
            places = self.compiled.output_shardings
        except jax.errors.JaxRuntimeError:
            return shapes
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


@dataclass(frozen=True)
class Programs:
    """All programs of a stage.

    Attributes:
      held: what lies on the devices between programs: trees of `ShapeDtypeStruct` by name, each array once; see
        `tree_of`.
      taken: the same as programs take it, where an array may come twice.
      programs: in the order of a step.
      tokens: that a step learns from.
    """

    held: Mapping[str, Any]
    taken: Mapping[str, Any]
    programs: Sequence[Program]
    tokens: int
    training: Training = field(repr=False)


def on_mesh(ready: Prepared, batch: Batch) -> Batch:
    """A host batch as shapes with the shardings that `place_batch` gives it."""
    return jax.tree.map(lambda x, s: with_sharding(shape_of(x), s), batch, batch_shardings(ready.mesh, batch))


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """A host array as jax takes it."""
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def with_sharding(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """A shape with another sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def tree_of(held: Any) -> PyTree:
    """A held group's tree; that of what a program gives is known once that is compiled."""
    return held() if callable(held) else held


def device_bytes(tree: PyTree) -> int:
    """Bytes in its own memory that one device holds of a tree of `ShapeDtypeStruct` with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding is not None and leaf.sharding.memory_kind == HOST:
            continue
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape, dtype=np.int64)) * width_of(leaf.dtype)
    return total


def width_of(dtype: Any) -> int:
    """Bytes of a number."""
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize
