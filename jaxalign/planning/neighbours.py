"""What to change when a stage does not fit: configs near it, each compiled before anything is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxalign.methods import METHODS
from jaxalign.methods.common import is_online
from jaxalign.planning.plan import Plan, changed, plan_stage
from jaxalign.sections import Stage
from jaxalign.sharding import BATCH_AXES


@dataclass(frozen=True)
class Neighbour:
    """A config near one that does not fit.

    Attributes:
      changes: settings, as they are written on the command line.
      plan: its plan; None where `run` would refuse it.
      refused: why, in that case.
    """

    changes: dict[str, Any]
    plan: Plan | None
    refused: str = ""

    @property
    def fits(self) -> bool:
        """Whether it was compiled and fits."""
        return self.plan is not None and self.plan.fits


def neighbours(stage: Stage, plan: Plan) -> Iterator[dict[str, Any]]:
    """Changes that save memory, cheapest in time first, each with those before it that cost little."""
    shards = _product(plan.mesh, BATCH_AXES)
    base: dict[str, Any] = {}
    if stage.model.remat != "full":
        base = {"model.remat": "full"}
        yield base
    if plan.mesh["data"] > 1:
        whole = {"mesh.data": 1, "mesh.fsdp": plan.mesh["data"] * plan.mesh["fsdp"]}
        base = {**base, **whole}
        yield base
    micro, per_row = stage.train.micro_batch_size or stage.train.batch_size, _rows_of_example(stage)
    while micro % 2 == 0 and micro * per_row > shards:
        micro //= 2
        yield {**base, "train.micro_batch_size": micro}
    least = {**base, **({"train.micro_batch_size": micro} if micro != stage.train.batch_size else {})}
    fsdp = least.get("mesh.fsdp", plan.mesh["fsdp"])
    for tensor in (2, 4, 8):
        if fsdp % tensor == 0 and fsdp > tensor:
            yield {**least, "mesh.data": 1, "mesh.fsdp": fsdp // tensor, "mesh.tensor": plan.mesh["tensor"] * tensor}
    if is_online(METHODS[stage.method_name]) and stage.rollout.slots is None:
        yield {**least, "rollout.slots": 8 * shards}
        yield {**least, "rollout.slots": 2 * shards}


def what_fits(
    stage: Stage, plan: Plan, topology: str | None, *, most: int = 6, tell: Callable[[Neighbour], None] | None = None
) -> list[Neighbour]:
    """Compiles neighbours of a stage until one fits.

    The programs that did not fit are compiled first, and the others only if these do.

    Args:
      stage: what did not fit.
      plan: its plan.
      topology: as `plan_stage`.
      most: how many neighbours to compile.
      tell: takes each as it is known.
    """
    failed = {each.name for each in plan.programs if not each.fits}
    found: list[Neighbour] = []
    for changes, _ in zip(neighbours(stage, plan), range(most), strict=False):
        near = changed(stage, changes)
        try:
            part = plan_stage(near, topology, mfu=plan.mfu, only=failed)
            if part.fits:
                part = plan_stage(near, topology, mfu=plan.mfu, known=part.programs)
            found.append(Neighbour(changes, part))
        except ValueError as error:
            found.append(Neighbour(changes, None, str(error)))
        if tell is not None:
            tell(found[-1])
        if found[-1].fits:
            break
    return found


def _rows_of_example(stage: Stage) -> int:
    """Most rows that an example may be cut into: its completions, where each has a prompt of its own."""
    if getattr(stage.method, "share_prompt", True):
        return 1
    return getattr(stage.method, "num_generations", 2)


def _product(mesh: dict[str, int], axes: tuple[str, ...]) -> int:
    total = 1
    for axis in axes:
        total *= mesh[axis]
    return total
