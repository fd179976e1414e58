"""What of a stage's state is sharded how, and how much of it each device holds."""

from __future__ import annotations

from typing import Any

import jax

from jaxalign.planning.program import COPY, OPTIMIZER, PARAMETERS
from jaxalign.planning.programs import stage_programs
from jaxalign.run.prepare import Prepared
from jaxalign.sharding import AXES, describe_shardings
from jaxalign.training.offload import HOST

Row = tuple[str, str, str, int, int]


def describe_stage(ready: Prepared) -> list[Row]:
    """A row per array that lies on the devices between programs, the copy for decoding among them; compiles nothing.

    Returns:
      Name (`group/path`), shape with dtype, mesh axis per dimension, bytes in all and on each device.
    """
    programs = stage_programs(ready)
    (params, frozen), (optimizer, *_) = programs.held[PARAMETERS], programs.held[OPTIMIZER]
    groups: dict[str, Any] = {"params": params, "frozen": frozen, "opt_state": optimizer}
    groups |= {name: tree for name, tree in programs.held.items() if name not in (PARAMETERS, OPTIMIZER, COPY)}
    for program in programs.programs:
        if program.name == COPY:
            groups[COPY] = jax.eval_shape(program.run, *program.arguments)
    rows = []
    for group, tree in groups.items():
        # As `sampling.make_decoding` places it.
        axes = ("tensor", "expert") if group == COPY else AXES
        placed = describe_shardings(tree, ready.mesh, axes).arrays
        for x, leaf in zip(placed, jax.tree.leaves(tree), strict=True):
            away = getattr(leaf.sharding, "memory_kind", None) == HOST
            spec = f"{x.spec} in the host's memory" if away else x.spec
            shape = f"{x.dtype}[{','.join(map(str, x.shape))}]"
            rows.append((f"{group}/{x.path}", shape, spec, x.total_bytes, 0 if away else x.device_bytes))
    return rows
