"""The collectives of a compiled program: what stands in its text, loop bodies as often as they run."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8, "s64": 8, "u64": 8}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction.

    Attributes:
      kind: of `KINDS`.
      shapes: of what it gives, as `f32[4,8]`; an instruction may carry several arrays.
      bytes: of these, per device.
      times: how often it runs.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    times: int


def collectives(text: str) -> list[Collective]:
    """Of an executable's `as_text()`."""
    bodies, entry = _computations(text)
    return list(_walk(bodies, entry, 1))


def count(found: list[Collective], kind: str, least_bytes: int = 0) -> int:
    """How many of a kind run, of so many bytes or more."""
    return sum(each.times for each in found if each.kind == kind and each.bytes >= least_bytes)


def total(found: list[Collective], *kinds: str) -> int:
    """Bytes of all that run."""
    return sum(each.times * each.bytes for each in found if each.kind in (kinds or KINDS))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head.group(1)
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _walk(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in bodies[name]:
        if found := _COLLECTIVE.search(line):
            shapes = _SHAPE.findall(found.group(1))
            sizes = [WIDTHS[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes]
            names = tuple(f"{kind}[{dims}]" for kind, dims in shapes)
            yield Collective(found.group(2), names, sum(sizes), times)
            continue
        inner = times * _trips(bodies, line) if " while(" in line else times
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"[\w.-]+", branches)
        for each in called:
            yield from _walk(bodies, each, inner)


def _trips(bodies: dict[str, list[str]], line: str) -> int:
    """How often a loop runs: as XLA says, else what its condition compares with."""
    if said := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(said.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", line)
    assert condition is not None
    limits = re.findall(r"s32\[\] constant\((\d+)\)", "\n".join(bodies[condition.group(1)]))
    assert limits, f"nobody knows how often this loop runs: {line}"
    return max(map(int, limits))
