"""The process that runs one untrusted program: it confines a child, watches it, and ends all of its descendants.

`sandbox` starts it with a bare interpreter, sends a specification as JSON on its standard input and reads one JSON
object from its standard output. It imports the standard library and `isolation` alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jaxalign.rewards import isolation

_REPORT = 3  # the descriptor that results are written to
_POLL = 0.02  # seconds
_WATCH = 0.03  # seconds between two looks at the processes and their memory
_REPORT_BYTES = 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Reads a specification, runs it, writes the result."""
    isolation.die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.umask(0o022)
    spec = json.load(sys.stdin)
    try:
        result = _supervise(spec)
    except Exception as error:  # the host raises it: nothing was run
        result = {"failed": _describe(error)}
    except SystemExit:  # whoever started this is gone, and will not delete the folder
        from shutil import rmtree

        os.chdir("/")
        rmtree(spec["folder"], ignore_errors=True)
        raise
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()


def _supervise(spec: Mapping[str, Any]) -> dict[str, Any]:
    isolation.adopt_orphans()
    in_namespace = "namespaces" not in spec["without"] and isolation.enter_pid_namespace()
    nonce = os.urandom(16).hex()
    (report, report_end), (output, output_end) = os.pipe(), os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(spec, nonce, report_end, output_end, in_namespace)
    os.close(report_end)
    os.close(output_end)
    readers = {report: _Reader(_REPORT_BYTES), output: _Reader(spec["limits"]["output_kb"] * 1024)}
    try:
        ended = _watch(child, readers, start, spec["limits"])
    finally:
        _end_all(child)
    while _drain(readers, 0):
        pass
    result = _read_report(readers[report].data, nonce, len(spec["tests"]))
    if result.get("active") is None and result.get("failed") is None:
        result["failed"] = f"the child was gone before it ran anything ({ended})"
    return {
        **result,
        "ended": ended,
        "seconds": time.monotonic() - start,
        "output": readers[output].data.decode(errors="replace"),
    }


class _Reader:
    """Keeps the first bytes of a stream; the rest is read and forgotten, so that the writer does not block."""

    def __init__(self, size: int):
        self.data, self.size, self.open = b"", size, True

    def read(self, file: int) -> None:
        data = os.read(file, 65536)
        self.open = bool(data)
        self.data += data[: max(0, self.size - len(self.data))]


def _drain(readers: Mapping[int, _Reader], seconds: float) -> bool:
    """Reads what has come, or waits this long for it; False when nothing came."""
    ready, _, _ = select.select([file for file, reader in readers.items() if reader.open], [], [], seconds)
    for file in ready:
        readers[file].read(file)
    return bool(ready)


def _watch(child: int, readers: Mapping[int, _Reader], start: float, limits: Mapping[str, Any]) -> str:
    """Waits for the child; says how it ended, or for what it has to be ended."""
    looked = start
    while True:
        _drain(readers, _POLL)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return "finished" if code == 0 else f"exit status {code}" if code > 0 else f"signal {-code}"
        now = time.monotonic()
        if now - start > limits["seconds"]:
            return "time limit"
        if now - looked > _WATCH:
            looked = now
            processes = _descendants()
            if len(processes) > limits["processes"] + 1:  # process 1 of a namespace is ours
                return "process limit"
            if sum(map(_own_memory, processes)) > limits["memory_mb"] * 2**20:
                return "memory limit"


def _end_all(child: int) -> None:
    """Kills every descendant, however it detached itself, and waits until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        seen: set[int] = set()
        # Stopped first: what is killed one by one could fork in the meantime.
        while found := set(_descendants()) - seen:
            seen |= found
            for pid in found:
                _signal(pid, signal.SIGSTOP)
        for pid in seen:
            _signal(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _descendants() -> list[int]:
    """Every descendant of this process; an orphan is ours too, because we adopt it. Without /proc, none."""
    if not os.path.isdir("/proc/self"):
        return []
    children = _children if os.path.exists(f"/proc/self/task/{os.getpid()}/children") else _scan()
    found, queue = [], [os.getpid()]
    while queue:
        queue += (below := children(queue.pop()))
        found += below
    return found


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def _scan() -> Callable[[int], list[int]]:
    """The children of a process from one pass over /proc, where the kernel does not list them."""
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            parents.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(name))
    return lambda pid: parents.get(pid, [])


def _own_memory(pid: int) -> int:
    """Bytes of a process in memory that are not a file's."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return 0
    return (resident - shared) * _PAGE


def _read_report(data: bytes, nonce: str, tests: int) -> dict[str, Any]:
    """What the child wrote; a line without the nonce is the tested code's and counts for nothing."""
    result: dict[str, Any] = {"passed": [False] * tests, "errors": [None] * tests}
    for line in data.decode(errors="replace").splitlines():
        head, _, text = line.partition(" ")
        if head != nonce:
            continue
        entry = json.loads(text)
        if "test" in entry:
            result["passed"][entry["test"]] = entry["error"] is None
            result["errors"][entry["test"]] = entry["error"]
        else:
            result |= entry
    return result


def _child(spec: Mapping[str, Any], nonce: str, report: int, output: int, in_namespace: bool) -> NoReturn:
    """Confines itself, and in a namespace becomes its process 1, which starts the program and reaps orphans."""
    try:
        isolation.die_with_parent(signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        # Out of the way of its new number first.
        os.dup2(os.dup(report), _REPORT, inheritable=False) if report != _REPORT else None
        os.closerange(_REPORT + 1, 1024)

        def write(entry: dict[str, Any]) -> None:
            os.write(_REPORT, f"{nonce} {json.dumps(entry)}\n".encode())

        try:
            active = isolation.confine(spec, in_pid_namespace=in_namespace)
        except Exception as error:
            write({"failed": _describe(error)})
            os._exit(1)
        sys.path[:] = [path for path in sys.path if path] + spec["packages"]
        write({"active": active})
        program = os.fork() if in_namespace else 0
        if program == 0:
            isolation.die_with_parent(signal.SIGKILL)
            _run(spec["code"], spec["setup"], spec["tests"], write)
            os._exit(0)
        os.closerange(0, _REPORT + 1)
        while True:
            pid, status = os.wait()
            if pid == program:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
    finally:
        os._exit(1)


def _run(code: str, setup: str, tests: list[str], write: Callable[[dict[str, Any]], None]) -> None:
    """Runs the code, then every test in what the code has defined; writes one entry per test.

    What the code replaces in `builtins` does not reach the names taken here, but it runs in this very interpreter.
    """
    everything, describe, flush, execute, compiled = BaseException, _describe, sys.stdout.flush, exec, compile
    scope: dict[str, Any] = {"__name__": "completion", "__builtins__": __builtins__}
    try:
        execute(compiled(code, "<completion>", "exec"), scope)
        execute(compiled(setup, "<setup>", "exec"), scope)
    except everything as error:
        write({"error": describe(error)})
        return
    for number, test in enumerate(tests):
        failure = None
        try:
            execute(compiled(test, "<test>", "exec"), scope)
        except everything as error:
            failure = describe(error)
        write({"test": number, "error": failure})
    with contextlib.suppress(everything):
        flush()


def _describe(error: BaseException) -> str:
    """An exception's type and text, short enough to be written in one piece."""
    try:
        return f"{type(error).__name__}: {error}"[:400]
    except BaseException:  # an exception of the tested code whose text cannot be had
        return "an exception without a text"
