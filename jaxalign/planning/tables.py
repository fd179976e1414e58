"""Plans as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from jaxalign.planning.measure import Measured
from jaxalign.planning.neighbours import Neighbour
from jaxalign.planning.plan import Plan
from jaxalign.planning.shardings import Row

GIB = 2**30


def plan_tables(plan: Plan) -> list[Table | str]:
    """Memory, then work and time, then what comes of them."""
    return [*_head(plan), _memory(plan), _time(plan), *_summary(plan)]


def neighbour_line(neighbour: Neighbour) -> str:
    """What became of a config nearby."""
    changes = " ".join(f"{name}={value}" for name, value in neighbour.changes.items())
    if neighbour.plan is None:
        return f"  {changes}: {neighbour.refused}"
    plan = neighbour.plan
    worst = max(plan.programs, key=lambda each: each.memory.total)
    verdict = "fits" if plan.fits else f"does not fit ({worst.name})"
    return f"  {changes}: {verdict}, {plan.peak / GIB:.2f} of {plan.chip.memory / GIB:.2f} GiB"


def shardings_table(rows: Sequence[Row]) -> Table:
    """The rows of `describe_stage`."""
    table = Table("array", "shape", "axes", "MiB", "MiB per device", box=None)
    for name, shape, axes, total, own in rows:
        table.add_row(name, shape, axes, f"{total / 2**20:,.2f}", f"{own / 2**20:,.2f}")
    table.add_row(
        "all", "", "", f"{sum(row[3] for row in rows) / 2**20:,.2f}", f"{sum(row[4] for row in rows) / 2**20:,.2f}"
    )
    return table


def _head(plan: Plan) -> list[str]:
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    micro, rows, length = plan.shape
    return [
        f"{plan.stage} on {plan.target}: {plan.devices} devices ({plan.kind}) of {plan.hosts} host(s), {mesh}",
        f"a step: {micro} micro-batch(es) of {rows} rows of {length} tokens, {plan.tokens:,} of them real",
        *plan.assumptions,
    ]


def _memory(plan: Plan) -> Table:
    columns = ["parameters", "optimizer", "other models", "arguments", "activations and temporaries", "of it cache"]
    columns += ["workspace", "total", "spare"]
    table = Table("GiB per device", *columns, "fits", "compiled in", box=None)
    for each in plan.programs:
        m = each.memory
        sizes = (m.parameters, m.optimizer, m.models, m.arguments, m.temporary, m.cache, m.workspace, m.total)
        sizes = (*sizes, plan.chip.memory - m.total)
        verdict = "yes" if each.fits else "no, the compiler says" if each.refused else "no"
        table.add_row(each.name, *(f"{size / GIB:.3f}" for size in sizes), verdict, f"{each.compiled_in:.0f} s")
    return table


def _time(plan: Plan) -> Table:
    columns = ["per step", "TFLOP", "with remat", "GiB moved", "collectives (GiB)", "roofline s", "bound by"]
    table = Table("one run", *columns, f"s at MFU {plan.mfu:g}", box=None)
    for each in plan.programs:
        moved = "-" if each.traffic is None else f"{each.traffic.moved / GIB:.2f}"
        seconds = (each.seconds(plan.chip, plan.devices), each.seconds(plan.chip, plan.devices, plan.mfu))
        table.add_row(
            each.name, f"{each.runs:g}", f"{each.flops / 1e12:.4g}", f"{each.computed / 1e12:.4g}", moved,
            _collectives(each), _number(seconds[0]), _bound(each), _number(seconds[1]),
        )  # fmt: skip
    return table


def _summary(plan: Plan) -> list[str]:
    lines = [
        f"{each.name}: " + ", ".join(f"{name} {flops / 1e12:.4g} TFLOP" for name, flops in each.parts.items())
        for each in plan.programs
        if each.parts
    ]
    for each in plan.programs:
        if each.traffic is not None and each.traffic.network:
            seconds = each.roofline["network"]
            time = "at a bandwidth that is not known, not counted" if seconds is None else f"{seconds:.3g} s"
            lines.append(f"{each.name}: {each.traffic.network / GIB:.3g} GiB per device to other slices, {time}")
    for name, seconds in (("roofline", plan.step_seconds()), (f"MFU {plan.mfu:g}", plan.step_seconds(plan.mfu))):
        if seconds:
            lines.append(f"step at {name}: {seconds:.3g} s, {plan.tokens / seconds:,.0f} tokens/s")
    have = plan.chip.memory / GIB
    verdict = "fits" if plan.fits else "does NOT fit"
    return [*lines, f"{verdict}: {plan.peak / GIB:.2f} of {have:.2f} GiB per device at the peak"]


def _collectives(each: Measured) -> str:
    if each.traffic is None:
        return "-"
    found = each.traffic.collectives.items()
    return ", ".join(f"{count} {kind} ({size / GIB:.3g})" for kind, (count, size) in sorted(found)) or "none"


def _bound(each: Measured) -> str:
    known = {name: value for name, value in each.roofline.items() if value is not None}
    return max(known, key=lambda name: known[name]) if known else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
