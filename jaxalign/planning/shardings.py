"""What of a stage's state is sharded how, and how much of it each device holds."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxalign.planning.programs import Programs, device_bytes, stage_programs
from jaxalign.run.prepare import Prepared
from jaxalign.sharding import path_name

Row = tuple[str, str, str, int, int]


def describe_stage(ready: Prepared) -> list[Row]:
    """A row per array that lies on the devices between programs.

    Returns:
      Name (`group/path`), shape with dtype, mesh axis per dimension, bytes in all and on each device.
    """
    return [row for name, tree in _held(stage_programs(ready)).items() for row in _rows(name, tree)]


def _held(programs: Programs) -> dict[str, Any]:
    state = programs.training.state
    return {"params": state.params, "frozen": programs.training.frozen, "opt_state": state.opt_state}


def _rows(group: str, tree: Any) -> list[Row]:
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shape = f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        axes = ", ".join(str(axis) if axis else "-" for axis in leaf.sharding.spec) or "replicated"
        total = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
        rows.append((f"{group}/{path_name(path)}", shape, axes, total, device_bytes(leaf)))
    return rows
