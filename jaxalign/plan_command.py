"""The command `jaxalign plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

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
    stage: Annotated[str | None, typer.Option(help="Stage of a config with several; the first by default.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak FLOP/s at which times are given too.")] = 0.4,
    shardings: Annotated[bool, typer.Option("--shardings", help="Only say what is sharded how.")] = False,
    neighbours: Annotated[int, typer.Option(help="Configs nearby to compile where it does not fit.")] = 6,
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan here too.")] = None,
) -> None:
    """Compile a run's programs for devices that need not be here: memory, traffic, time, and what to change."""
    from jaxalign.config import load_config, shipped_configs
    from jaxalign.planning.targets import find_devices

    find_devices(topology)  # before anything else asks jax for devices: a slice is planned on the CPU
    from jaxalign import planning
    from jaxalign.run import pick_stage

    file = config if config.is_file() else shipped_configs().get(str(config), config)
    picked = pick_stage(load_config(file, overrides or [], data_needed=False), stage)
    if shardings:
        ready, _ = planning.prepare_plan(picked, find_devices(topology))
        console.print(planning.shardings_table(planning.describe_stage(ready)))
        return
    made = planning.plan_stage(picked, topology, mfu=mfu)
    for part in planning.plan_tables(made):
        console.print(part, highlight=False, soft_wrap=True)
    tried = []
    if not made.fits and neighbours:
        _say("compiling configs nearby:")
        tried = planning.what_fits(
            picked, made, topology, most=neighbours, tell=lambda each: _say(planning.neighbour_line(each))
        )
    if output is not None:
        near = [{"changes": each.changes, "plan": each.plan and each.plan.to_dict()} for each in tried]
        output.write_text(json.dumps({**made.to_dict(), "neighbours": near}, indent=1) + "\n")
    if not made.fits:
        raise typer.Exit(1)


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
