"""Several processes as one run: who they are, `jax.distributed` started, and nobody left waiting for the dead.

`jax.distributed` connects the processes and watches over them by heartbeats. Where the address of process 0 is known,
`run/line.py` holds a connection between them besides, so that what goes wrong is said at once and by name.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax

from jaxalign.run.backend import tpu_chips
from jaxalign.run.line import Line, check_address, open_line

# Exit codes, see docs/scale.md: launchers start a run again after any code but 0, 1 and 2.
MEND, SAVED, LOST = 1, 143, 75

NAMES = ("JAXALIGN_COORDINATOR", "JAXALIGN_PROCESSES", "JAXALIGN_PROCESS")
# Where a scheduler says how many processes there are, which one this is, and how many are on its node; the last name is
# there only in what the scheduler started as one of several. The first scheduler that is there counts.
SCHEDULERS = (
    ("SLURM", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"),
)
HEARTBEAT = 30  # seconds without a sign of life after which jax declares a process dead
SHUTDOWN = 60  # seconds that processes which came to their end wait for the others


class ProcessLostError(RuntimeError):
    """The connection to other processes of the run broke."""


@dataclass(frozen=True)
class Group:
    """The processes of a run, as the environment describes them.

    Attributes:
      origin: who says so: `JAXALIGN_*`, `SLURM`, `Open MPI`, `TPU`.
      coordinator: `host:port` of process 0; None where jax finds it out.
      count: number of processes; None where jax finds it out.
      process: number of this one; None likewise.
      local_devices: accelerators of this process, by number; None leaves it to jax.
    """

    origin: str
    coordinator: str | None = None
    count: int | None = None
    process: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_group(environment: Mapping[str, str], *, chips: int = 0) -> Group | None:
    """The processes that the environment speaks of, None for a run of one.

    Args:
      environment: `os.environ`. `JAXALIGN_COORDINATOR=host:port`, `JAXALIGN_PROCESSES` and `JAXALIGN_PROCESS` go before
        everything else; under SLURM and Open MPI the last two may be left away, as may all three. Where there is
        nothing but `JAXALIGN_PROCESSES=auto`, jax has to find the others.
      chips: TPU chips of this machine that jax will use.

    Raises:
      ValueError: something is missing, or no number, or out of range; names the variable.
    """
    given = {name: environment[name].strip() for name in NAMES if environment.get(name, "").strip()}
    scheduler = next((each for each in SCHEDULERS if {each[1], each[2], each[4]} <= set(environment)), None)
    if given.get("JAXALIGN_PROCESSES") == "auto":
        return Group("JAXALIGN_PROCESSES=auto")
    if not given:
        return _from_scheduler(environment, scheduler, chips)
    origin = "JAXALIGN_*"
    if scheduler is not None and "JAXALIGN_COORDINATOR" in given:
        origin, counted = f"JAXALIGN_COORDINATOR and {scheduler[0]}", (scheduler[1], scheduler[2])
        for name, theirs in zip(NAMES[1:], counted, strict=True):
            given.setdefault(name, environment[theirs])
    missing = [name for name in NAMES if name not in given]
    if missing and given.get("JAXALIGN_PROCESSES") == "1" and given.get("JAXALIGN_PROCESS", "0") == "0":
        return None
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: not set, but {', '.join(given)} is. Several processes need all three: "
            "JAXALIGN_COORDINATOR=host:port of process 0, JAXALIGN_PROCESSES=their number, JAXALIGN_PROCESS=0, 1, ..."
        )
    count, process = _number(given, "JAXALIGN_PROCESSES", 1), _number(given, "JAXALIGN_PROCESS", 0)
    if process >= count:
        raise ValueError(f"JAXALIGN_PROCESS={process}: with JAXALIGN_PROCESSES={count} they are 0 to {count - 1}")
    check_address(given["JAXALIGN_COORDINATOR"], "JAXALIGN_COORDINATOR")
    devices = None if scheduler is None else _devices_of_node(environment, scheduler[3])
    return None if count == 1 else Group(origin, given["JAXALIGN_COORDINATOR"], count, process, devices)


@contextlib.contextmanager
def joined(environment: Mapping[str, str] | None = None) -> Iterator[Line | None]:
    """Connects this process with the others of its run while the context is open; without others does nothing.

    `JAXALIGN_START_TIMEOUT` is how many seconds all of them may take to come (300). An error inside the context is told
    to the others, which then stop too.

    Yields:
      The connection to the others; None for a run of one process, and where jax alone knows the others.

    Raises:
      ValueError: the environment contradicts itself, not all came in time, or two say that they are the same one.
      ProcessLostError: the connection to another process broke, and no other process said why.
    """
    environment = os.environ if environment is None else environment
    forced = (environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME") or "").split(",")[0]
    group = find_group(environment, chips=tpu_chips() if forced in ("", "tpu") else 0)
    if group is None:
        yield None
        return
    seconds = _seconds(environment)
    line = None
    if group.coordinator is not None and group.count is not None and group.process is not None:
        line = open_line(group.coordinator, group.count, group.process, seconds, lost=LOST)
    try:
        if not _connect(group, seconds):
            yield None
            return
        if line is not None:
            line.watch()
        yield line
    except BaseException as error:
        code = code_of(error)
        if line is not None:
            line.leave(code, str(error))
        if code == LOST:
            raise ProcessLostError(f"the connection to another process broke: {error}") from error
        raise
    if line is not None:
        line.leave(0, "")


def end(code: int | None, error: Exception | None = None) -> None:
    """Ends this process, of several without the farewell of `jax.distributed`, which waits for those that are gone.

    Args:
      code: the exit status; None: what the error leads to if there are several processes, else nothing happens here.
      error: printed with its traceback before the end.
    """
    if not jax.distributed.is_initialized():
        if code is not None:
            sys.exit(code)
        return
    if error is not None:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if code is not None else LOST if isinstance(error, ProcessLostError) else MEND)


def code_of(error: BaseException) -> int:
    """The exit code that an error leads to: `LOST` where the others may be the cause, and starting again may help."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else MEND
    if isinstance(error, KeyboardInterrupt):
        return 130
    # Of what the runtime raises: connections broken or closed. Memory that ran out or a wrong program does not mend.
    broken = r"Gloo|NCCL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|Connection|socket|heartbeat"
    cause: BaseException | None = error
    while cause is not None:  # a save that failed because another process is gone is an OSError
        if isinstance(cause, jax.errors.JaxRuntimeError) and re.search(broken, str(cause), re.I):
            return LOST
        cause = cause.__cause__
    return MEND


def _connect(group: Group, seconds: float) -> bool:
    """Starts `jax.distributed`; False where jax finds no other process."""
    known = {"coordinator_address": group.coordinator, "num_processes": group.count, "process_id": group.process}
    if group.coordinator is not None:
        known["cluster_detection_method"] = "deactivate"
    if group.local_devices is not None:
        known["local_device_ids"] = group.local_devices
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=math.ceil(seconds),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (ValueError, RuntimeError) as error:
        if group.origin == "TPU" and "coordinator_address" in str(error):
            return False  # one machine with TPU chips and nobody who knows of others
        raise ValueError(
            f"{group.origin}: jax does not find the other processes ({error}); set {', '.join(NAMES)}"
        ) from error
    return True


def _from_scheduler(environment: Mapping[str, str], scheduler: tuple[str, ...] | None, chips: int) -> Group | None:
    if scheduler is not None and _number(environment, scheduler[1], 1) > 1:
        return Group(scheduler[0], local_devices=_devices_of_node(environment, scheduler[3]))
    return Group("TPU") if chips else None


def _devices_of_node(environment: Mapping[str, str], per_node: str) -> tuple[int, ...] | None:
    """All accelerators of the node, where the scheduler started one process there: jax would take the first alone."""
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get(per_node, ""))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    return tuple(range(int(gpus))) if alone and gpus.isdecimal() else None


def _number(given: Mapping[str, str], name: str, least: int) -> int:
    text = given[name].strip()
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text!r}: a whole number from {least} up")
    return int(text)


def _seconds(environment: Mapping[str, str]) -> float:
    text = environment.get("JAXALIGN_START_TIMEOUT", "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        raise ValueError(f"JAXALIGN_START_TIMEOUT={text!r}: seconds, 1 at least")
    return seconds
