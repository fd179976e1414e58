"""Daemon threads: a function that never returns holds up neither its caller's other work nor the end of the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def start_thread(function: Callable[[], _Result], name: str) -> tuple[Future[_Result], threading.Thread]:
    """Runs a function in a daemon thread; the pools of `concurrent.futures` would be waited for at exit."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return future, thread


def map_in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int | None = None
) -> list[_Result]:
    """`[function(item) for item in items]`, `workers` items at a time (default: as many as there are cores)."""
    todo = list(items)
    results: list[Any] = [None] * len(todo)
    numbers, lock = iter(range(len(todo))), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            results[number] = function(todo[number])

    started = [start_thread(work, "jaxalign-reward-item") for _ in range(min(workers or cores(), len(todo)))]
    for future, _ in started:
        future.result()
    return results


def rounds(items: int, workers: int | None = None) -> int:
    """How many items `map_in_threads` does at most one after the other in a thread, where each takes as long."""
    return -(-items // (workers or cores()))


def cores() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
