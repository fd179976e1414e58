"""What to change when a stage does not fit: configs near it, each compiled before anything is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from jaxalign.methods.offline import check_split
from jaxalign.planning.plan import Plan, changed, plan_stage
from jaxalign.planning.program import COPY, DRAWING
from jaxalign.planning.targets import find_devices
from jaxalign.run.kernels import check_offloading
from jaxalign.sections import Stage
from jaxalign.sharding import BATCH_AXES, make_mesh, remesh

ROLLOUT = {COPY, DRAWING}  # programs that the settings of a rollout change


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


def neighbours(stage: Stage, plan: Plan, devices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Changes that save memory where it is short, cheapest in time first, each with those before it that cost little.

    Layouts that the processes of these devices could not share, which `run` refuses, are none of them.
    """
    failed = {each.name for each in plan.programs if not each.fits}
    drawing, training = failed & ROLLOUT, failed - ROLLOUT
    allowed = partial(_allowed, stage, devices)
    # Where there are several slices, the data axis stays what connects them.
    slices = plan.slices if not stage.mesh.dcn else max(stage.mesh.dcn.get("data", 1), 1)
    base: dict[str, Any] = {}
    if training and stage.model.remat != "full":
        base = {"model.remat": "full"}
        yield base
    whole = {"mesh.data": slices, "mesh.fsdp": plan.mesh["data"] * plan.mesh["fsdp"] // slices}
    if plan.mesh["data"] > slices and allowed({**base, **whole}):
        base = {**base, **whole}
        yield base
    away = {**base, "model.offload_reference": True}
    if any(each.memory.models for each in plan.programs) and not stage.model.offload_reference and allowed(away):
        base = away
        yield base
    shards, per_row = _product(plan.mesh, BATCH_AXES), _rows_of_example(stage)
    micro = _micro(stage)
    while training and micro % 2 == 0 and micro * per_row > shards:
        micro //= 2
        smaller = {**base, "train.micro_batch_size": micro}
        if not allowed(smaller):
            break
        yield smaller
        base = smaller
    for tensor in (2, 4, 8) if drawing else ():
        apart = {**base, "rollout.mesh.tensor": tensor}
        if stage.rollout.mesh is None and tensor > plan.mesh["tensor"] and allowed(apart):
            yield apart
    if drawing and stage.rollout.slots is None:
        yield {**base, "rollout.slots": 8 * shards}
        yield {**base, "rollout.slots": 2 * shards}
    fsdp = base.get("mesh.fsdp", plan.mesh["fsdp"])
    for tensor in (2, 4, 8):
        split = {**base, "mesh.fsdp": fsdp // tensor, "mesh.tensor": plan.mesh["tensor"] * tensor}
        if fsdp % tensor == 0 and fsdp > tensor and allowed(split):
            yield split


def what_fits(
    stage: Stage,
    plan: Plan,
    topology: str | None,
    *,
    slices: int = 1,
    most: int = 6,
    tell: Callable[[Neighbour], None] | None = None,
) -> list[Neighbour]:
    """Compiles neighbours of a stage until one fits.

    The programs that did not fit are compiled first, and the others only if these do.

    Args:
      stage: what did not fit.
      plan: its plan.
      topology: as `plan_stage`; so is `slices`.
      slices: of that topology.
      most: how many neighbours to compile.
      tell: takes each as it is known.
    """
    failed = {each.name for each in plan.programs if not each.fits}
    found: list[Neighbour] = []
    compiled = partial(plan_stage, topology=topology, slices=slices, mfu=plan.mfu, chip=plan.chip)
    for changes in islice(neighbours(stage, plan, find_devices(topology, slices)), most):
        try:
            near = changed(stage, changes)
            part = compiled(near, only=failed)
            if part.fits:
                part = compiled(near, known=part.programs)
            found.append(Neighbour(changes, part))
        except ValueError as error:
            found.append(Neighbour(changes, None, str(error)))
        if tell is not None:
            tell(found[-1])
        if found[-1].fits:
            break
    return found


def _allowed(stage: Stage, devices: Sequence[Any], changes: dict[str, Any]) -> bool:
    """Whether `run` would take the changed stage's mesh, as far as that can be told from the config."""
    near = changed(stage, changes)
    try:
        mesh = make_mesh(near.mesh, devices)
        remesh(mesh, near.rollout.mesh, "rollout.mesh")
        check_split(mesh, _micro(near))
        check_offloading(near, mesh)
    except ValueError:
        return False
    return True


def _micro(stage: Stage) -> int:
    return stage.train.micro_batch_size or stage.train.batch_size


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
