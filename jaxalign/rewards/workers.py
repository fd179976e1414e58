"""Worker processes for what cannot be interrupted in a thread: a regular expression, computer algebra."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.rewards.sandbox import bootstrap
from jaxalign.rewards.threads import cores, map_in_threads, rounds

MOST = 16  # workers at once
START = 20.0  # seconds in which a worker has started, and its libraries are there


class TaskError(RuntimeError):
    """A task raised in its worker, or its worker could not start."""


class TaskKilled(TaskError):
    """A task's worker ended on it: it took too long, or more than there is."""


class Workers:
    """Processes that serve one kind of task, started when needed and kept.

    Args:
      task: key in `tasks.TASKS`.
      options: the task's settings.
      seconds: for one task; a worker that takes longer is ended and replaced.
      memory_mb: address space of a worker.
    """

    def __init__(self, task: str, options: Mapping[str, Any], *, seconds: float, memory_mb: int = 4096):
        if seconds <= 0:
            raise ValueError(f"seconds={seconds} must be greater than 0")
        self._settings = {"task": task, "options": dict(options), "seconds": seconds, "memory_mb": memory_mb}
        self._idle: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end, self._idle)

    def map(self, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """The task's value for each list of arguments (JSON data), or a `TaskError` in its place."""
        return map_in_threads(self._run, arguments, min(cores(), MOST))

    def longest(self, tasks: int) -> float:
        """Seconds that `map` takes at most, where each task is ended in a worker that had to be started."""
        return rounds(tasks, min(cores(), MOST)) * (self._settings["seconds"] + START)

    def _run(self, arguments: Sequence[Any]) -> Any:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        try:
            process = process or self._start()
        except TaskError as error:
            return error
        reply = _ask(process, list(arguments))
        if reply is None:
            _end([process])
            if process.returncode == -signal.SIGALRM:
                return TaskKilled(f"took longer than {self._settings['seconds']:g} s")
            return TaskKilled(f"its worker process ended with status {process.returncode}")
        with self._lock:
            self._idle.append(process)
        return TaskError(reply["error"]) if "error" in reply else reply["value"]

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", bootstrap("tasks")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        reply = _ask(process, self._settings)
        if reply is None or reply["error"]:
            _end([process])
            raise TaskError(f"its worker process does not start: {reply['error'] if reply else process.returncode}")
        return process


def _ask(process: subprocess.Popen[str], message: Any) -> Any | None:
    """Sends a line and reads one; None when the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        return None
    return json.loads(line) if line.endswith("\n") else None


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close() if pipe else None  # a worker without input ends
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    processes.clear()
