"""Runs untrusted Python programs, each in a process of its own with limits, and reports which tests passed.

docs/rewards.md says what this protects from and what not; `describe_sandbox` says what holds on this machine.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from jaxalign.rewards import isolation
from jaxalign.rewards.threads import map_in_threads

LAYERS = ("namespaces", "landlock")
_GRACE = 15.0  # seconds beyond the time limit after which the launcher itself is given up
_log = logging.getLogger("jaxalign")
_numbers = count()


class SandboxError(RuntimeError):
    """The sandbox could not run a program; it says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
      seconds: wall-clock time.
      cpu_seconds: processor time of each process.
      memory_mb: address space of each process, and memory of all of them together.
      processes: processes and threads at once.
      open_files: open files of each process.
      file_mb: size of a file.
      disk_mb: all files together, where the kernel gives the program its own root file system.
      output_kb: output that is kept; the rest is read and dropped.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mb: int = 512
    processes: int = 16
    open_files: int = 64
    file_mb: int = 16
    disk_mb: int = 64
    output_kb: int = 16

    def __post_init__(self):
        """Raises ValueError for a limit that allows nothing."""
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be greater than 0")


@dataclass(frozen=True)
class Program:
    """Code and what is asked of it.

    Attributes:
      code: run first.
      tests: Python sources, each run in what the code and the set-up have defined; one that raises has failed.
      setup: run between the code and the tests.
    """

    code: str
    tests: Sequence[str]
    setup: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a program did.

    Attributes:
      passed: per test; False also for those that were never reached.
      errors: per test the exception, or None.
      error: the exception of the code or the set-up themselves, or None.
      ended: "finished", "time limit", "memory limit", "process limit", "exit status n" or "signal n".
      output: the start of what it printed.
      seconds: wall-clock time.
    """

    passed: tuple[bool, ...]
    errors: tuple[str | None, ...]
    error: str | None
    ended: str
    output: str
    seconds: float


def run_program(
    program: Program,
    limits: Limits | None = None,
    *,
    site_packages: bool = False,
    without: Collection[str] | None = None,
) -> Outcome:
    """Runs a program in a fresh process and ends everything that it started.

    Args:
      program: the program.
      limits: what it may use; default `Limits()`.
      site_packages: whether it may import the packages installed beside jaxalign, not only the standard library.
      without: layers of `LAYERS` that are left out; default: those that fail on this machine.

    Raises:
      SandboxError: the sandbox itself failed.
    """
    if without is None:
        without = _layers_that_fail()
    result = _launch(program, limits or Limits(), site_packages, without)
    return Outcome(
        passed=tuple(result["passed"]),
        errors=tuple(result["errors"]),
        error=result.get("error"),
        ended=result["ended"],
        output=result["output"],
        seconds=result["seconds"],
    )


def run_programs(
    programs: Sequence[Program],
    limits: Limits | None = None,
    *,
    site_packages: bool = False,
    workers: int | None = None,
) -> list[Outcome | SandboxError]:
    """Runs programs, `workers` at a time (default: as many as there are cores); an error takes its outcome's place."""
    without = _layers_that_fail() if programs else ()

    def one(program: Program) -> Outcome | SandboxError:
        try:
            return run_program(program, limits, site_packages=site_packages, without=without)
        except SandboxError as error:
            return error

    return map_in_threads(one, programs, workers)


def longest_run(limits: Limits) -> float:
    """Seconds after which a program has ended, or the sandbox has been given up."""
    return limits.seconds + 2 * _GRACE


def describe_sandbox(without: Collection[str] | None = None) -> dict[str, Any]:
    """What holds on this machine, found out by running an empty program.

    Args:
      without: as `run_program`.

    Returns:
      `processes`: "namespace" (the kernel ends all of a program's processes with it) or "followed" (they are searched
        for and killed).
      `network`: "none", "no TCP" or "open".
      `files`: of "private root" (only the system's and Python's files exist) and "landlock" (only they can be opened,
        only the program's own folder written to) those that hold.
      `user`: "own" (a user that owns nothing) or "shared" (the user that trains).
      `limits`: the resource limits that the system took.
      `without`: layers that failed here and are left out.

    Raises:
      SandboxError: no program can be run at all.
    """
    without = _layers_that_fail() if without is None else without
    active = _launch(Program("", ()), Limits(), False, without)["active"]
    return {name: value for name, value in active.items() if name != "box"} | {"without": list(without)}


@functools.cache
def _layers_that_fail() -> tuple[str, ...]:
    """The fewest layers to leave out so that a program that does nothing succeeds; warns about what is left open."""
    failure = None
    for without in ((), ("landlock",), ("namespaces",), LAYERS):
        try:
            active = _launch(Program("import json, random", ("pass",)), Limits(), False, without)
        except SandboxError as error:
            failure = error
            continue
        if active["passed"] != [True]:
            failure = SandboxError(f"a program that does nothing failed: {active}")
            continue
        open_sides = [name for name in ("files", "network") if active["active"][name] in ([], "open")]
        if open_sides:
            _log.warning("this system lets tested code use the %s of this user: see docs/rewards.md", open_sides)
        return without
    raise SandboxError("no program can be run here") from failure


def _launch(program: Program, limits: Limits, site_packages: bool, without: Collection[str]) -> dict[str, Any]:
    unknown = set(without) - set(LAYERS)
    if unknown:
        raise ValueError(f"without={sorted(unknown)} is unknown; known: {', '.join(LAYERS)}")
    folder = tempfile.mkdtemp(prefix="jaxalign-code-")
    packages = isolation.existing(site.getsitepackages()) if site_packages else []
    spec = {
        **asdict(program),
        "limits": asdict(limits),
        "folder": os.path.realpath(folder),
        "packages": packages,
        "readable": [*_python_folders(), *packages],
        "uid": isolation.FIRST_UID + (os.getpid() + next(_numbers)) % isolation.UIDS,
        "without": list(without),
    }
    try:
        return _communicate(spec, limits.seconds + _GRACE)
    finally:
        _remove(folder)


def _communicate(spec: dict[str, Any], timeout: float) -> dict[str, Any]:
    try:
        process = subprocess.Popen(
            # No site packages, no user's packages, no current folder on the path.
            [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "-c", bootstrap("launcher")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=spec["folder"],
            env={
                "PATH": "/usr/bin:/bin",
                "LANG": "C.UTF-8",
                # The order of a set, and so a score, does not change between two runs.
                "PYTHONHASHSEED": "0",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"the sandbox cannot start Python: {error}") from error
    with process:
        try:
            output, errors = process.communicate(json.dumps(spec).encode(), timeout)
        except subprocess.TimeoutExpired as error:
            _stop(process)
            raise SandboxError(f"the sandbox did not answer within {timeout:g} s") from error
    try:
        result = json.loads(output)
    except ValueError as error:
        told = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise SandboxError(f"the sandbox ended with status {process.returncode} {told}") from error
    if result.get("failed"):
        raise SandboxError(f"the sandbox failed before it ran the code: {result['failed']}")
    return result


def _stop(process: subprocess.Popen) -> None:
    process.terminate()  # the launcher then ends what it started
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def bootstrap(module: str) -> str:
    """Python source that runs `main` of a module beside this one without importing jaxalign's dependencies."""
    return (
        "import sys, types\n"
        "for name in ('jaxalign', 'jaxalign.rewards'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        f"sys.modules['jaxalign.rewards'].__path__ = [{str(Path(__file__).parent)!r}]\n"
        f"from jaxalign.rewards.{module} import main\n"
        "main()\n"
    )


@functools.cache
def _python_folders() -> tuple[str, ...]:
    """Where the interpreter and its standard library lie, links followed and not."""
    paths = [sys.base_prefix, sys.base_exec_prefix, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))]
    paths.append(os.path.dirname(os.path.realpath(sys.executable)))
    return tuple(dict.fromkeys(path for name in paths for path in (name, os.path.realpath(name))))


def _remove(folder: str) -> None:
    try:
        for parent, names, _ in os.walk(folder):
            for name in names:
                os.chmod(os.path.join(parent, name), 0o700, follow_symlinks=False)
        shutil.rmtree(folder)
    except (OSError, RecursionError, NotImplementedError) as error:
        _log.warning("%s, the folder of a program, is left behind: %s", folder, error)
