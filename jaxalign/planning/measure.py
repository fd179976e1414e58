"""One program compiled: what it needs of a device's memory, what it moves, and how long that takes at best."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxalign.planning.hlo import Traffic, largest_product, traffic
from jaxalign.planning.program import OPTIMIZER, PARAMETERS, Program, Programs, device_bytes, tree_of
from jaxalign.planning.targets import Chip

# How the TPU compiler says that a program does not fit: of all that it needs, or of temporaries alone.
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device while a program runs.

    Attributes:
      parameters: of what is trained, with frozen parts.
      optimizer: the optimiser's state.
      models: other models that are there: reference, reward models, the copy for decoding.
      arguments: further arguments: the batch, prompts, and what layouts pad; an array that is passed twice counts once.
      temporary: all else at its peak: activations, gradients, caches, results that take no argument's place.
      workspace: of CPUs alone, which copy the operands of a matrix product before they multiply: those of the largest.
      cache: of what is temporary, keys and values of a rollout.
    """

    parameters: int
    optimizer: int
    models: int
    arguments: int
    temporary: int
    workspace: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return self.parameters + self.optimizer + self.models + self.arguments + self.temporary + self.workspace


@dataclass(frozen=True)
class Measured:
    """One program of a plan.

    Attributes:
      name: the program's.
      runs: how often it runs per optimiser step.
      memory: of one device.
      fits: whether that is no more than the device has.
      refused: the compiler found no place for it; `memory.temporary` is then what it says that it would need.
      flops: of the model, over all devices, when it runs once.
      computed: with what rematerialisation computes again.
      parts: FLOPs of what it does one after the other, where that is told apart.
      tokens: read or drawn.
      traffic: of one device when it runs once; None where it was refused.
      compiled_in: seconds.
      roofline: by `compute`, `memory`, `links` and, between slices, `network`, seconds that each alone would take; None
        where a figure is unknown.
    """

    name: str
    runs: float
    memory: Memory
    fits: bool
    refused: bool
    flops: float
    computed: float
    parts: Mapping[str, float]
    tokens: int
    traffic: Traffic | None
    compiled_in: float
    roofline: Mapping[str, float | None]

    def seconds(self, chip: Chip, devices: int, mfu: float | None = None) -> float | None:
        """Seconds per run: at the roofline, or no faster than the model's FLOPs at a share `mfu` of the peak."""
        known = [value for value in self.roofline.values() if value is not None]
        if chip.flops is None or not known:
            return None
        return max(*known, self.flops / (chip.flops * devices * mfu) if mfu else 0.0)


def measure(program: Program, programs: Programs, chip: Chip, devices: int) -> Measured:
    """Compiles a program for its devices and reads what the compiler made of it."""
    start = time.perf_counter()
    refused, found = False, None
    held = {name: device_bytes(tree_of(programs.held[name])) for name in program.beside}
    taken = sum(device_bytes(tree_of(programs.taken[name])) for name in program.takes)
    arguments = temporary = workspace = 0
    try:
        compiled, seconds = program.timed
    except jax.errors.JaxRuntimeError as error:
        refused, temporary = True, _temporary(error, taken)
        compiled, seconds = None, time.perf_counter() - start
    if compiled is not None:
        sizes = compiled.memory_analysis()
        # XLA leaves out arguments that the program does not read; they are there all the same.
        arguments = max(sizes.argument_size_in_bytes - taken, 0)
        temporary = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        text = compiled.as_text()
        members = _devices(programs)
        found = traffic(text, program.trips, devices, [getattr(each, "slice_index", None) or 0 for each in members])
        # Eigen copies what it multiplies, outside of what XLA plans.
        workspace = int(largest_product(text)) if members[0].platform == "cpu" else 0
    own = {name: held.pop(name, 0) for name in (PARAMETERS, OPTIMIZER)}
    memory = Memory(own[PARAMETERS], own[OPTIMIZER], sum(held.values()), arguments, temporary, workspace, program.cache)
    return Measured(
        program.name, program.runs, memory, not refused and memory.total <= chip.memory, refused,
        program.work.flops, program.work.computed, {name: part.flops for name, part in program.parts.items()},
        program.work.tokens, found, seconds,
        _roofline(program, found, chip, devices),
    )  # fmt: skip


def _devices(programs: Programs) -> list[Any]:
    """The devices in the programs' order."""
    (first, *_) = jax.tree.leaves(programs.training.state)
    return list(first.sharding.mesh.devices.flat)


def _roofline(program: Program, found: Traffic | None, chip: Chip, devices: int) -> dict[str, float | None]:
    def over(amount: float | None, rate: float | None) -> float | None:
        return None if amount is None or rate is None else amount / rate

    across = {} if found is None or not found.network else {"network": over(found.network, chip.network)}
    return {
        **across,
        "compute": over(program.work.computed / devices, chip.flops),
        "memory": over(found and found.moved, chip.bandwidth),
        "links": over(found and found.wire, chip.links),
    }


def _temporary(error: Exception, taken: int) -> int:
    """Bytes beside its arguments that a refused program would need; any other error goes on its way."""
    for pattern, given in ((_USED, taken), (_TEMPORARIES, 0)):
        found = pattern.search(str(error))
        if found is not None:
            return int(float(found[1]) * _UNITS[found[2]]) - given
    raise error
