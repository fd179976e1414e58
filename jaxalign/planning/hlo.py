"""What a compiled program does, read from its text: collectives, and bytes that pass between memory and cores.

Loops are counted as often as they run: XLA writes how often where it knows (`known_trip_count`), and the caller says it
for those that end by what they compute. `compiled.cost_analysis()` counts the body of a loop once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# They move nothing themselves: names, or calls whose bodies are counted.
FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"})
FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done"}
READERS = ("dynamic-slice", "slice", "gather")
# They write into their first operand in place: which operand it is that they write.
WRITERS = {"dynamic-update-slice": 1, "scatter": 2}
WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|token|opaque|(?:bf|f|s|u|c)\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_PRODUCT = re.compile(r'custom_call_target="[^"]*(matmul|gemm|dot)', re.IGNORECASE)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Fusions that run beside a collective name it too, from where it starts to where it is done, and pass its arrays on.
_STARTS = 'custom_call_target="AsyncCollectiveStart"'
_ALIASES = re.compile(r"\{(\d*)\}: \((\d+), \{\}")


@dataclass
class Instruction:
    """A line of a computation.

    Attributes:
      name: its own.
      type: of its result, as written.
      op: opcode.
      operands: names.
      arguments: the text between its parentheses.
      rest: what follows, attributes and all.
      root: it is its computation's result.
    """

    name: str
    type: str
    op: str
    operands: list[str]
    arguments: str
    rest: str
    root: bool


Computation = dict[str, Instruction]


@dataclass
class Traffic:
    """What one device does while a program runs once.

    Attributes:
      moved: bytes read from and written to the device's memory.
      collectives: by kind, how many run and the bytes of what each gathers, sums or sends, added up.
      wire: bytes that a ring of the devices involved sends through each device's links for them.
      network: bytes that a device sends to other slices for them, where each slice sends what it must once.
      largest: bytes of the largest of them.
    """

    moved: float = 0.0
    collectives: dict[str, tuple[int, float]] = field(default_factory=dict)
    wire: float = 0.0
    network: float = 0.0
    largest: float = 0.0

    def add(self, other: Traffic, times: int = 1) -> None:
        """Adds another's traffic, so many times."""
        self.moved += times * other.moved
        self.wire += times * other.wire
        self.network += times * other.network
        self.largest = max(self.largest, other.largest)
        for kind, (count, size) in other.collectives.items():
            have = self.collectives.get(kind, (0, 0.0))
            self.collectives[kind] = (have[0] + times * count, have[1] + times * size)


def traffic(text: str, trips: Sequence[int] = (), devices: int = 1, slices: Sequence[int] = ()) -> Traffic:
    """What a compiled program moves.

    Args:
      text: `compiled.as_text()`.
      trips: how often loops run that XLA does not know the length of, by how many such loops are around them.
      devices: of the program, for collectives that do not name theirs.
      slices: number of each device's slice, in the program's order; empty for one slice.
    """
    computations, entry = parse(text)
    return _Reader(computations, tuple(trips), devices, tuple(slices)).read(entry, 0)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the entry."""
    found: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            header = _HEADER.match(line)
            if header:
                current = found.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
            continue
        instruction = _instruction(line)
        if instruction is not None:
            current[instruction.name] = instruction
    return found, entry


def largest_product(text: str) -> float:
    """Bytes of both operands, taken whole, of the matrix product that has most of them; 0 where there is none."""
    most = 0.0
    for computation in parse(text)[0].values():
        for each in computation.values():
            if each.op == "dot" or (each.op == "custom-call" and _PRODUCT.search(each.rest)):
                most = max(most, sum(_operand(computation, each, i, memory=False) for i in (0, 1)))
    return most


def size(type_text: str, *, memory: bool = False) -> float:
    """Bytes of a type; with `memory` without what lies in a core's own memory (a space other than the default)."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(type_text):
        space = _SPACE.search(layout)
        if memory and space and space[1] != "0":
            continue
        digits = re.search(r"\d+", dtype)
        width = WIDTHS[dtype] if dtype in WIDTHS else int(digits[0]) / 8 if digits else 0
        total += width * math.prod(int(n) for n in dims.split(",") if n)
    return total


class _Reader:
    """Walks through computations; what a fusion does inside stays in registers, but for its operands and result."""

    def __init__(
        self, computations: dict[str, Computation], trips: tuple[int, ...], devices: int, slices: tuple[int, ...]
    ):
        self._computations, self._trips, self._devices = computations, trips, devices
        self._slices = slices or (0,) * devices
        self._done: dict[tuple[str, int], Traffic] = {}
        starting = [each for each in computations.values() if any(_STARTS in inner.rest for inner in each.values())]
        self._carried = {channel for each in starting for inner in each.values() if (channel := _channel(inner))}

    def read(self, name: str, depth: int) -> Traffic:
        key = (name, depth)
        if key not in self._done:
            total = Traffic()
            computation = self._computations.get(name, {})
            for each in computation.values():
                self._count(total, computation, each, depth)
            self._done[key] = total
        return self._done[key]

    def _count(self, total: Traffic, computation: Computation, each: Instruction, depth: int) -> None:
        if each.op == "while":
            known = self._length(each)
            times = known if known is not None else self._trips[depth] if depth < len(self._trips) else 1
            for part in ("body", "condition"):
                total.add(self.read(_called(each, part)[0], depth + (known is None)), times)
        elif each.op == "conditional":
            names = _called(each, "branch_computations") or [
                *_called(each, "true_computation"),
                *_called(each, "false_computation"),
            ]
            total.add(max((self.read(name, depth) for name in names), key=lambda found: found.moved + found.wire))
        elif each.op in ("call", "async-start"):
            for name in _called(each, "to_apply") or _called(each, "calls"):
                total.add(self.read(name, depth))
        kind = each.op.removesuffix("-start")
        if kind in COLLECTIVES:
            _add_collective(total, kind, computation, each, self._slices)
        if each.op == "fusion":
            for name in _called(each, "calls"):
                inside = self._computations.get(name, {})
                starts = any(_STARTS in inner.rest for inner in inside.values())
                for inner in inside.values():
                    if _channel(inner) in self._carried and not starts:
                        continue
                    if (kind := inner.op.removesuffix("-start")) in COLLECTIVES:
                        kind = "reduce-scatter" if "reduce-scatter" in each.name + name else kind
                        _add_collective(total, kind, inside, inner, self._slices)
        if each.op not in FREE and not each.op.endswith("-done"):
            total.moved += self._moved(computation, each)

    def _length(self, loop: Instruction) -> int | None:
        """How often a loop runs: as XLA says, or (its TPU compiler does not) to where a counter from 0 is compared."""
        known = _TRIPS.search(loop.rest)
        if known:
            return int(known[1])
        condition = self._computations.get(_called(loop, "condition")[0], {})
        root = next((each for each in condition.values() if each.root), None)
        if root is None or root.op != "compare" or "direction=LT" not in root.rest:
            return None
        limits = [condition[name] for name in root.operands if name in condition and condition[name].op == "constant"]
        return int(limits[0].arguments) if limits and limits[0].arguments.isdigit() else None

    def _moved(self, computation: Computation, each: Instruction) -> float:
        """Bytes of operands and result, where a slice stands for the array that it is of."""
        own = size(each.type, memory=True)
        if each.op == "copy-start":
            return own  # its type has source and target
        if each.op in ("slice-start", "dynamic-slice-start"):
            return _element(each.type, 1, memory=False) + _element(each.type, 1)  # the source comes first
        if each.op in READERS:
            return 2 * own
        if each.op in WRITERS:
            return 2 * _operand(computation, each, WRITERS[each.op])
        inside = self._computations.get(next(iter(_called(each, "calls")), ""), {}) if each.op == "fusion" else {}
        if not inside:
            return own + sum(_operand(computation, each, i) for i in range(len(each.operands)))
        if any(_channel(inner) in self._carried for inner in inside.values()):
            passed = _aliases(each)
            own -= sum(_element(each.type, made) for made, _ in passed)
            kept = set(range(len(each.operands))) - {given for _, given in passed}
            return own + sum(self._read_by(computation, each, inside, i) for i in kept)
        updates = {
            inner.operands[0]: _operand(inside, inner, WRITERS[inner.op], memory=False)
            for inner in inside.values()
            if inner.op in WRITERS and inner.operands
        }
        written = own
        if updates and (root := next((inner for inner in inside.values() if inner.root), None)) is not None:
            origin = _origin(inside, root)
            written = updates[origin.operands[0]] if origin.op in WRITERS else own
        return written + sum(self._read_by(computation, each, inside, i) for i in range(len(each.operands)))

    def _read_by(self, computation: Computation, each: Instruction, inside: Computation, place: int) -> float:
        """Bytes that a fusion reads of an operand: only what it slices, where it does nothing else with it."""
        whole = _operand(computation, each, place)
        parameter = next(
            (i for i in inside.values() if i.op == "parameter" and i.arguments.strip() == str(place)), None
        )
        if parameter is None:
            return whole
        names, users = {parameter.name}, []
        for inner in inside.values():
            if inner.op == "bitcast" and names & set(inner.operands):
                names.add(inner.name)
            elif names & set(inner.operands):
                users.append(inner)
        read = 0.0
        for user in users:
            if user.op in READERS and user.operands[0] in names:
                read += size(user.type)
            elif user.op in WRITERS and user.operands[0] in names:
                read += 0.0  # written in place
            else:
                return whole
        return min(read, whole) if users else whole


def _instruction(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if start is None:
        return None
    place = start.end()
    end = _closing(line, place) if line[place] == "(" else line.find(" ", place)
    opened = line.find("(", end)
    if end < 0 or opened < 0:
        return None
    closed = _closing(line, opened)
    arguments = line[opened + 1 : closed - 1]
    names = re.findall(r"%([\w.\-]+)", arguments)
    return Instruction(
        start[2], line[place:end], line[end:opened].strip(), names, arguments, line[closed:], bool(start[1])
    )


def _closing(text: str, opened: int) -> int:
    """Where the bracket that opens here is closed, plus one."""
    depth = 0
    for place in range(opened, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    return len(text)


def _called(each: Instruction, attribute: str) -> list[str]:
    found = re.search(attribute + r"=(\{[^}]*\}|%?[\w.\-]+)", each.rest)
    return re.findall(r"[\w.\-]+", found[1]) if found else []


def _channel(each: Instruction) -> str:
    """The channel of a collective; empty if it is none."""
    found = _CHANNEL.search(each.rest) if each.op.removesuffix("-start") in COLLECTIVES else None
    return found[1] if found else ""


def _aliases(each: Instruction) -> list[tuple[int, int]]:
    """Results and operands, by place, that are one array."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", each.rest)
    return [(int(made or 0), int(given)) for made, given in _ALIASES.findall(found[1])] if found else []


def _element(type_text: str, place: int, *, memory: bool = True) -> float:
    """Bytes of one array of a type, see `size`."""
    return sum(size(found[0], memory=memory) for found in [*re.finditer(_ARRAY, type_text)][place : place + 1])


def _origin(inside: Computation, root: Instruction) -> Instruction:
    while root.op in ("bitcast", "copy", "convert") and root.operands and root.operands[0] in inside:
        root = inside[root.operands[0]]
    return root


def _operand(computation: Computation, each: Instruction, place: int, *, memory: bool = True) -> float:
    name = each.operands[place] if place < len(each.operands) else ""
    return size(computation[name].type, memory=memory) if name in computation else 0.0


def _add_collective(
    total: Traffic, kind: str, computation: Computation, each: Instruction, slices: tuple[int, ...]
) -> None:
    given, made = sum(_operand(computation, each, i, memory=False) for i in range(len(each.operands))), size(each.type)
    # The result of a start has its operands beside it.
    payload = max(given, made - given if each.op.endswith("-start") else made)
    groups = _groups(each.rest, len(slices))
    count = len(groups[0])
    if count == 1:
        return
    crossed = max(len({slices[device] for device in group}) for group in groups)
    within = count // crossed
    wire = _share(kind, within) * payload if within > 1 else 0.0
    network = _share(kind, crossed) * payload if crossed > 1 else 0.0
    if kind not in ("all-to-all", "ragged-all-to-all", "collective-permute"):
        network /= within  # the devices of a slice share what it sends
    total.add(Traffic(0.0, {kind: (1, payload)}, wire, network, payload))


def _share(kind: str, count: int) -> float:
    """The part of a collective's bytes that each of so many sends."""
    return {"all-reduce": 2 * (count - 1) / count, "collective-permute": 1.0}.get(kind, (count - 1) / count)


def _groups(rest: str, devices: int) -> list[list[int]]:
    """The devices, by number, that take part in a collective together."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", rest)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if named:
        return _mesh_groups(named[1], named[2])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, order = [int(n) for n in iota[2].split(",")], iota[3] and [int(n) for n in iota[3].split(",")]
        numbers = np.arange(math.prod(shape)).reshape(shape).transpose(order or range(len(shape)))
        return numbers.reshape([int(n) for n in iota[1].split(",")]).tolist()
    return [list(range(devices))]


def _mesh_groups(axes: str, along: str) -> list[list[int]]:
    """Groups along axes of a mesh; a part of an axis is written 'name':(before)size."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)}
    shape, moved = [], []
    for name, whole in sizes.items():
        before, size = (int(n) if n else 0 for n in parts.get(name, ("", "")))
        if name in parts and size:
            moved.append(len(shape) + 1)
            shape += [before, size, whole // before // size]
        else:
            moved += [len(shape)] if name in parts else []
            shape.append(whole)
    kept = [place for place in range(len(shape)) if place not in moved]
    numbers = np.arange(math.prod(shape)).reshape(shape).transpose([*kept, *moved])
    return numbers.reshape(-1, math.prod(shape[place] for place in moved)).tolist()
