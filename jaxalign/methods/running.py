"""What moves along from batch to batch, and a source that keeps it: it is part of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxalign.methods.common import join_variables
from jaxalign.methods.offline import OfflineSource
from jaxalign.models import Model
from jaxalign.types import Batch, Metric, PyTree, Variables

Update = Callable[[PyTree, Batch, PyTree], tuple[Batch, PyTree]]


class CarryingSource:
    """An offline source whose batches also hold what is carried along, brought up to date by the current policy.

    Args:
      source: gives the batches, with all else that the loss needs.
      start: what is carried before the first batch: a dict of numpy arrays.
      update: `(params, batch, carry) -> (batch, carry)`, on the devices.
    """

    def __init__(self, source: OfflineSource, start: dict[str, np.ndarray], update: Update):
        self._source, self._carry, self._update = source, start, update

    def next(self, state: Any) -> tuple[Batch, dict[str, Metric | float | int]]:
        """The next batch; the policy's parameters in the train state are looked at."""
        batch, metrics = self._source.next(state)
        batch, self._carry = self._update(state.params, batch, self._carry)
        return batch, {**metrics}

    @property
    def carry(self) -> PyTree:
        """What is carried now."""
        return self._carry

    def state(self) -> dict[str, Any]:
        """That of the batches, and what is carried."""
        return {"batches": self._source.state(), "carry": jax.device_get(self._carry)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self._source.restore(state["batches"])
        self._carry = {name: np.asarray(value) for name, value in state["carry"].items()}

    def close(self) -> None:
        """Ends the prefetching threads."""
        self._source.close()


def carries(method: ModuleType, config: Any) -> bool:
    """Whether a method carries something from batch to batch (`carries`)."""
    asked = getattr(method, "carries", None)
    return asked is not None and asked(config)


def carry_along(
    method: ModuleType, config: Any, model: Model, frozen: Variables, source: OfflineSource
) -> OfflineSource | CarryingSource:
    """The source, of a method that carries something one that keeps it."""
    if not carries(method, config):
        return source
    jitted = make_carry_program(method, config, model)
    return CarryingSource(source, method.start_carry(config), lambda params, *rest: jitted(params, frozen, *rest))


def make_carry_program(method: ModuleType, config: Any, model: Model) -> Any:
    """`(params, frozen, batch, carry) -> (batch, carry)`, jitted, of a method that carries something."""
    step = method.make_carry(config, model)
    return jax.jit(lambda params, frozen, batch, carry: step(join_variables(params, frozen), batch, carry))


def with_carry(method: ModuleType, config: Any, batch: Batch, carry: PyTree | None = None) -> Batch:
    """A batch to evaluate on, with what is carried as it stands (None = at the start), where the method carries any."""
    if not carries(method, config):
        return batch
    return method.attach(config, batch, method.start_carry(config) if carry is None else carry)
