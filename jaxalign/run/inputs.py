"""What a stage trains on once it may load parameters: its policy, and examples with what their loss needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from jaxalign import data, models
from jaxalign.methods.offline import ExampleList
from jaxalign.methods.reference import cache_key, precompute
from jaxalign.run.prepare import Prepared, resolve_dtype
from jaxalign.types import Batch, Variables

Say = Callable[[str], None]


@dataclass(frozen=True)
class Examples:
    """Training and evaluation examples as the loss wants them, and what fills a batch on the devices.

    Attributes:
      train: the training examples.
      eval: the evaluation examples, or None.
      fill: adds the reference's log-probs to a batch; None where the examples carry them or nothing needs them.
    """

    train: ExampleList
    eval: ExampleList | None
    fill: Callable[[Batch], Batch] | None


def load_policy(ready: Prepared, path: str) -> Variables:
    """Parameters on the mesh, in the stage's dtype."""
    return models.load(path, mesh=ready.mesh, param_dtype=ready.stage.model.param_dtype)[1]


def attach_reference(ready: Prepared, folder: Path, variables: Variables, say: Say) -> Examples:
    """The examples, with what their loss needs of a reference (the policy's start, or `model.reference`)."""
    train, held_out, stage = ready.data.train, ready.data.eval, ready.stage
    if not ready.method.NEEDS_REFERENCE:
        return Examples(train, held_out, None)
    path = stage.model.reference or stage.model.path
    reference = variables if path == stage.model.path else load_policy(ready, path)
    fill = partial(jax.jit(ready.method.make_reference(stage.method, ready.model)), reference)
    if not stage.method.precompute_ref_log_probs:
        return Examples(train, held_out, fill)
    dtypes = f"{stage.model.param_dtype} {resolve_dtype(stage.model.compute_dtype)}"
    fingerprint = f"{models.fingerprint(path)} {dtypes}"

    def attach(examples: data.Examples) -> ExampleList:
        where = folder / "reference" / f"{cache_key(examples, fingerprint)}.npy"
        say(f"reference log-probs: {'read from' if where.is_file() else 'computed into'} {where}")
        return precompute(ready.method, stage.method, examples, ready.layout, ready.mesh, fill, where)

    return Examples(attach(train), None if held_out is None else attach(held_out), None)
