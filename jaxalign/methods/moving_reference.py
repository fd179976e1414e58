"""TR-DPO: a reference that follows the policy. It is part of the source's state, so a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from jaxalign.methods.offline import OfflineSource
from jaxalign.types import Batch, PyTree, Variables


class MovingReference:
    """Reference variables that every so many steps become a mixture of themselves and the policy.

    `reference <- (1 - alpha) reference + alpha policy` after steps `every`, `2 every`, ...

    Args:
      fill: `(variables, batch) -> batch` with `ref_logps`.
      variables: the reference at step 0; copied.
      alpha: share of the policy, in (0, 1].
      every: steps between two mixtures, at least 1.

    Source: Gorbatovski et al., arXiv 2404.09656, eq. 6 and 7.
    """

    def __init__(self, fill: Callable[[Variables, Batch], Batch], variables: Variables, *, alpha: float, every: int):
        self._fill, self._every, self._step = fill, every, 0
        # What `mix` donates must be nobody else's.
        self._variables = jax.tree.map(lambda x: x.copy(), variables)
        self._mix = jax.jit(partial(_mix, alpha=alpha), donate_argnums=0)

    def __call__(self, batch: Batch) -> Batch:
        """The batch with `ref_logps` of the reference as it is."""
        return self._fill(self._variables, batch)

    def follow(self, step: int, params: PyTree) -> None:
        """Mixes in the policy after `step` updates, if that is due and has not been done.

        Args:
          step: updates made.
          params: the policy's after them.

        Raises:
          ValueError: what is trained is not the whole policy, as with adapters.
        """
        if step % self._every or step == self._step:
            return
        if jax.tree.structure(params) != jax.tree.structure(self._variables):
            raise ValueError("method.sync_ref_model: what is trained is not the whole policy; train all parameters")
        self._variables, self._step = self._mix(self._variables, params), step

    def state(self) -> dict[str, Any]:
        """The variables, and the step that they are of."""
        return {"variables": self._variables, "step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, on the devices where the variables are now."""
        where = jax.tree.map(lambda x: x.sharding, self._variables)
        self._variables, self._step = jax.device_put(state["variables"], where), int(state["step"])


class FollowingSource:
    """The source of an offline method whose `fill` is a `MovingReference`."""

    def __init__(self, source: OfflineSource, reference: MovingReference):
        self._source, self._reference, self._updates = source, reference, 0

    def next(self, state: Any) -> tuple[Batch, dict[str, float | int]]:
        """The next batch, after the reference has followed the state's policy; metrics as `OfflineSource`."""
        self._reference.follow(self._updates, state.params)
        self._updates += 1
        return self._source.next(state)

    def state(self) -> dict[str, Any]:
        """Place in the data, updates asked for, and the reference."""
        return {"source": self._source.state(), "updates": self._updates, "reference": self._reference.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self._source.restore(state["source"])
        self._updates = int(state["updates"])
        self._reference.restore(state["reference"])

    def close(self) -> None:
        """Ends the prefetching threads."""
        self._source.close()


def _mix(reference: PyTree, policy: PyTree, *, alpha: float) -> PyTree:
    return jax.tree.map(lambda old, new: (1 - alpha) * old + alpha * new.astype(old.dtype), reference, policy)
