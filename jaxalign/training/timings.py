"""What the clock measures in a run: which metrics these are, and the speed over a stretch of steps."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from jaxalign.training.schedule import Config, Tally
from jaxalign.types import Mean

# Measured by the clock, or of this process alone: all other metrics of a resumed run are those of an uninterrupted one,
# bit for bit.
TIMINGS = frozenset(
    {
        "step_time",
        "tokens_per_second",
        "mfu",
        "device_memory_gib",
        "process_memory_gib",
        "eval_runtime",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "timing_s/sampling",
        "timing_s/scoring",
        "timing_s/passes",
        "timing_s/training",
    }
)


@dataclass(frozen=True)
class Lap:
    """Where a stretch of timed steps began.

    Attributes:
      time: by the clock, moved on by what is not counted.
      step: updates made until then.
      tokens: `num_tokens` until then.
      elsewhere: seconds since then that the source says it took for its rollouts; None where it never said any.
    """

    time: float
    step: int
    tokens: float
    elsewhere: float | None = None


def elsewhere(lap: Lap, extra: Mapping[str, object]) -> float | None:
    """`Lap.elsewhere` after the source has said this of a batch."""
    seconds = [each.total for name, each in extra.items() if name in TIMINGS and isinstance(each, Mean)]
    return float((lap.elsewhere or 0.0) + sum(seconds)) if seconds else lap.elsewhere


def speed(config: Config, done: Tally, lap: Lap) -> dict[str, float]:
    """Speed since `lap`, without compilations, evaluations, samples and the blocking part of saves."""
    seconds, steps = time.perf_counter() - lap.time, done.step - lap.step
    if steps < 1 or seconds <= 0:
        return {}
    timings = {"step_time": seconds / steps}
    if lap.elsewhere is not None:
        timings["timing_s/training"] = (seconds - lap.elsewhere) / steps
    if done.tokens > lap.tokens:
        timings["tokens_per_second"] = (done.tokens - lap.tokens) / seconds
    if config.flops_per_step and config.peak_flops:
        timings["mfu"] = config.flops_per_step * steps / seconds / config.peak_flops
    return {**timings, **_memory()}


def _memory() -> dict[str, float]:
    """Most memory in use so far: on one device, or on CPU, whose devices tell nothing, by the process."""
    devices = jax.local_devices()
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if not peaks and devices[0].platform == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return {"process_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    return {"device_memory_gib": max(peaks) / 2**30} if peaks else {}
