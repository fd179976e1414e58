"""What of a stage's state is sharded how, and how much of it each device holds."""

from __future__ import annotations

from jaxalign.planning.programs import stage_programs
from jaxalign.run.prepare import Prepared
from jaxalign.sharding import describe_shardings

Row = tuple[str, str, str, int, int]


def describe_stage(ready: Prepared) -> list[Row]:
    """A row per array that lies on the devices between programs.

    Returns:
      Name (`group/path`), shape with dtype, mesh axis per dimension, bytes in all and on each device.
    """
    training = stage_programs(ready).training
    state = training.state
    held = {"params": state.params, "frozen": training.frozen, "opt_state": state.opt_state}
    return [
        (f"{group}/{x.path}", f"{x.dtype}[{','.join(map(str, x.shape))}]", x.spec, x.total_bytes, x.device_bytes)
        for group, tree in held.items()
        for x in describe_shardings(tree, ready.mesh).arrays
    ]
