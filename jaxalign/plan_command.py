"""The command `jaxalign plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

# Tables are wide; a pipe has no width.
console = Console(width=None if sys.stdout.isatty() else 200)


def plan(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config that comes with jaxalign.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=value]...", help="Settings that replace the file's.")
    ] = None,
    topology: Annotated[
        str | None, typer.Option(help="A TPU slice that need not be here: v5p:2x2x2. This machine's devices without.")
    ] = None,
    slices: Annotated[int, typer.Option(help="How many slices of that shape.")] = 1,
    stage: Annotated[str | None, typer.Option(help="Only this stage of a config with several.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak FLOP/s at which times are given too.")] = 0.4,
    shardings: Annotated[bool, typer.Option("--shardings", help="Only say what is sharded how.")] = False,
    neighbours: Annotated[int, typer.Option(help="Configs nearby to compile where it does not fit.")] = 6,
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan here too.")] = None,
) -> None:
    """Compile a run's programs for devices that need not be here: memory, traffic, time, and what to change."""
    from jaxalign.config import load_config, shipped_configs
    from jaxalign.planning.targets import find_devices

    devices = find_devices(topology, slices)  # before anything else asks jax for them: a slice is planned on the CPU
    from jaxalign import planning

    file = config if config.is_file() else shipped_configs().get(str(config), config)
    settings = load_config(file, overrides or [], data_needed=False)
    plans: list[dict[str, Any]] = []
    with TemporaryDirectory() as exports:
        for each, ready, notes in planning.planned_stages(settings, devices, Path(exports), stage):
            if shardings:
                _say(each.name or each.method_name)
                console.print(planning.shardings_table(planning.describe_stage(ready)))
                continue
            made = planning.plan_stage(each, topology, slices=slices, mfu=mfu, prepared=(ready, notes))
            for part in planning.plan_tables(made):
                console.print(part, highlight=False, soft_wrap=True)
            tried = []
            if not made.fits and neighbours:
                _say("compiling configs nearby:")
                tried = planning.what_fits(
                    each, made, topology, slices=slices, most=neighbours,
                    tell=lambda near: _say(planning.neighbour_line(near)),
                )  # fmt: skip
            near = [{"changes": each.changes, "plan": each.plan and each.plan.to_dict()} for each in tried]
            plans.append({**made.to_dict(), "neighbours": near})
    if shardings:
        return
    short = [each["stage"] for each in plans if not each["fits"]]
    if len(plans) > 1:
        _say(f"{len(plans)} stages: " + (f"{', '.join(short)} will NOT fit" if short else "all fit"))
    if output is not None:
        output.write_text(json.dumps({"fits": not short, "stages": plans}, indent=1) + "\n")
    if short:
        raise typer.Exit(1)


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
