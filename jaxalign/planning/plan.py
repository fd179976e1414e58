"""The plan of a stage: its programs compiled for some devices, and what a step takes of memory and time."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxalign import data
from jaxalign.planning.assumed import assumed_data, has_data, without_data
from jaxalign.planning.measure import Measured, measure
from jaxalign.planning.programs import stage_programs
from jaxalign.planning.targets import Chip, chip_of, find_devices
from jaxalign.run.prepare import Prepared, prepare
from jaxalign.sections import Stage
from jaxalign.sharding import MeshConfig, process_count, undivided
from jaxalign.types import PyTree


@dataclass(frozen=True)
class Plan:
    """What a stage needs.

    Attributes:
      stage: its name or its method's.
      target: the slice, or the kind of this machine's devices.
      devices: how many.
      hosts: that own them, each with a process of the run.
      slices: that they lie on.
      kind: as jax calls them.
      mesh: devices per axis.
      chip: what each can do.
      shape: micro-batches, rows and tokens per row of a step's batch.
      assumptions: what was taken for granted, in words.
      programs: as they come in a step.
      tokens: that a step learns from.
      mfu: the stated share of the peak.
    """

    stage: str
    target: str
    devices: int
    hosts: int
    slices: int
    kind: str
    mesh: dict[str, int]
    chip: Chip
    shape: tuple[int, ...]
    assumptions: tuple[str, ...]
    programs: tuple[Measured, ...]
    tokens: int
    mfu: float

    @property
    def peak(self) -> int:
        """Bytes of one device in the program that needs most."""
        return max(each.memory.total for each in self.programs)

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(each.fits for each in self.programs)

    def step_seconds(self, mfu: float | None = None) -> float | None:
        """Seconds per optimiser step with its share of rollouts and passes, one after the other."""
        parts = [each.seconds(self.chip, self.devices, mfu) for each in self.programs]
        if any(part is None for part in parts):
            return None
        return sum((part or 0.0) * each.runs for part, each in zip(parts, self.programs, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain dicts, lists and numbers, for JSON; memory in bytes, times in seconds."""
        plain = asdict(self)
        for each, found in zip(plain["programs"], self.programs, strict=True):
            each["memory"]["total"] = found.memory.total
            each["seconds"] = found.seconds(self.chip, self.devices)
            each["seconds_at_mfu"] = found.seconds(self.chip, self.devices, self.mfu)
        step = {"roofline": self.step_seconds(), "at_mfu": self.step_seconds(self.mfu)}
        rates = {name: seconds and self.tokens / seconds for name, seconds in step.items()}
        return {**plain, "peak": self.peak, "fits": self.fits, "step_seconds": step, "tokens_per_second": rates}


def plan_stage(
    stage: Stage,
    topology: str | None = None,
    *,
    slices: int = 1,
    mfu: float = 0.4,
    chip: Chip | None = None,
    only: Container[str] | None = None,
    known: Sequence[Measured] = (),
    prepared: tuple[Prepared, tuple[str, ...]] | None = None,
) -> Plan:
    """Compiles a stage's programs for a slice or for this machine; nothing is loaded and nothing runs.

    Args:
      stage: its inputs resolved to paths; of models only the config.json is read.
      topology: a TPU slice, for example `v5p:2x2x2`; None for this machine's devices.
      slices: how many of them, connected by the data centre's network.
      mfu: share of the peak at which the time of a step is given too, in (0, 1].
      chip: what a device can do; by default what is known of its kind.
      only: names of the programs to measure; all by default.
      known: programs of this very stage and target that were measured before.
      prepared: this very stage as `prepare_plan` gives it for these devices, where that was done before.

    Raises:
      FileNotFoundError: no such model.
      ValueError: no such slice, a mesh that does not divide it, or anything else that `run` would refuse.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu}: a share of the peak, above 0 and at most 1")
    devices = find_devices(topology, slices)
    ready, notes = prepared or prepare_plan(stage, devices)
    programs, chip = stage_programs(ready), chip or chip_of(devices[0])
    before = {each.name: each for each in known}
    found = tuple(
        before.get(each.name) or measure(each, programs, chip, len(devices))
        for each in programs.programs
        if only is None or each.name in only
    )
    rows = programs.programs[-1].arguments[2].rows.tokens
    kind = devices[0].device_kind
    name = topology or f"{len(devices)} × {kind}"
    return Plan(
        stage=stage.name or stage.method_name,
        target=name if slices == 1 else f"{slices} slices of {name}",
        devices=len(devices),
        hosts=process_count(ready.mesh),
        slices=slices,
        kind=kind,
        mesh=dict(ready.mesh.shape),
        chip=chip,
        shape=tuple(rows.shape),
        assumptions=(*notes, *_whole(ready, programs.training.state.params, programs.training.frozen)),
        programs=found,
        tokens=programs.tokens,
        mfu=mfu,
    )


def _whole(ready: Prepared, *trees: PyTree) -> list[str]:
    """A line per mesh axis with what stays whole along it, as it does not divide it."""
    found: dict[str, list[tuple[str, int]]] = {}
    for name, axis, size in undivided(ready.mesh, trees):
        found.setdefault(axis, []).append((name.split("/", 1)[1], size))
    return [
        f"{axis}={ready.mesh.shape[axis]} does not divide {_shown([name for name, _ in each])}, "
        f"{sum(size for _, size in each):,} bytes in all: they stay whole along it"
        for axis, each in found.items()
    ]


def _shown(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def prepare_plan(stage: Stage, devices: Sequence[Any] | None = None) -> tuple[Prepared, tuple[str, ...]]:
    """The stage prepared as `run` does, with assumed examples where its data are not here; and what was assumed."""
    notes = ["one process describes all devices"]
    found: data.Data | None = None
    if not has_data(stage):
        stage = without_data(stage)
        found, line = assumed_data(stage)
        notes.append(line)
    ready = prepare(stage, devices=None if devices is None else list(devices), found=found)
    return ready, tuple(notes)


def changed(stage: Stage, changes: dict[str, Any]) -> Stage:
    """The stage with settings `section.key`, or `rollout.mesh.axis`, replaced."""
    for name, value in changes.items():
        section, _, key = name.partition(".")
        whole = getattr(stage, section)
        if key.startswith("mesh."):
            key, value = "mesh", replace(whole.mesh or MeshConfig(), **{key.removeprefix("mesh."): value})
        stage = replace(stage, **{section: replace(whole, **{key: value})})
    return stage
