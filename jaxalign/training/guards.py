"""What surrounds a step in the loop: stop signals, counted compilations, transfers forbidden in steady state."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger("jaxalign")

# Seconds within which signals are one wish to stop: a launcher and the terminal may both send theirs.
TOGETHER = 1.0
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM and SIGINT into a question that the loop asks after each step; a later second one raises at once.

    With several processes JAX's preemption service takes SIGTERM, and all processes stop after the same step. Outside
    the main thread, where Python has no signal handlers, nothing stops the loop.

    Yields:
      Step number -> whether to save and stop after it.
    """
    if jax.process_count() > 1:
        yield lambda step: bool(multihost_utils.reached_preemption_sync_point(step))
        return
    asked, first = threading.Event(), [math.inf]

    def handle(number: int, _: object) -> None:
        first[0] = min(first[0], time.monotonic())
        if asked.is_set() and time.monotonic() - first[0] >= TOGETHER:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}: stopped without a checkpoint")
        asked.set()

    handled = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def count_compiles() -> Iterator[Callable[[], int]]:
    """Counts the programs that XLA compiles for this thread while the context is open."""
    thread, events = threading.get_ident(), []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == COMPILE_EVENT and threading.get_ident() == thread:
            events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(events)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@dataclass
class Dispatcher:
    """Calls a jitted step, without waiting for it, and watches for compilations.

    A batch shape that is new may compile; it is logged quietly. One that was seen runs with implicit transfers from and
    to the host forbidden, and compiling again is warned of: it means that shardings or static arguments changed.

    Attributes:
      step: `(state, frozen, batch) -> (state, metrics)`, jitted.
      compiles: how many programs were compiled so far.
      shapes: batch shapes seen.
      recompiled: steps that compiled for a shape seen before.
    """

    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    compiles: Callable[[], int]
    shapes: set = field(default_factory=set)
    recompiled: list[int] = field(default_factory=list)

    def __call__(self, number: int, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any, float]:
        """The step's result, and the seconds spent here when something was compiled (else 0)."""
        shape = batch_shape(batch)
        steady, before, start = shape in self.shapes, self.compiles(), time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=number), _transfers("disallow" if steady else "allow"):
            state, metrics = self.step(state, frozen, batch)
        self.shapes.add(shape)
        if self.compiles() == before:
            return state, metrics, 0.0
        self._report(number, shape, steady)
        return state, metrics, time.perf_counter() - start

    def _report(self, number: int, shape: Any, steady: bool) -> None:
        if steady:
            self.recompiled.append(number)
            logger.warning("step %d was compiled again for a batch shape seen before: %s", number, shape[1])
        else:
            logger.info("step %d: compiled for batch shape %d, %s", number, len(self.shapes), shape[1])


@contextlib.contextmanager
def _transfers(level: str) -> Iterator[None]:
    with jax.transfer_guard_host_to_device(level), jax.transfer_guard_device_to_host(level):
        yield


def batch_shape(batch: Any) -> tuple:
    """Structure, shapes and dtypes of a batch, hashable."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((jax.numpy.shape(leaf), str(jax.numpy.result_type(leaf))) for leaf in leaves)
