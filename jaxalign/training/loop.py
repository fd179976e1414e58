"""The one training loop; knows no method.

What happens at step k, in this order, so that a run killed anywhere continues bit for bit: the step is dispatched; the
metrics of k - 1 are read; where something is due the metrics of k are read too, logged, then evaluation, samples, and
the checkpoint last. A checkpoint at k holds the state after k updates, the source before its batch k + 1, and the sums
behind the next log line; on resume the metric files are cut after step k.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import jax
import numpy as np

from jaxalign.training import guards, schedule
from jaxalign.training.metrics import Interval, JsonLines, Number, Writer
from jaxalign.training.schedule import Best, Config, Tally
from jaxalign.training.state import TrainState
from jaxalign.types import Max, Mean, Metric, Min, PyTree, Sum

if TYPE_CHECKING:
    from jaxalign.training.checkpoint import Checkpoints, Restored

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
    }
)

JittedStep = Callable[[Any, Any, Any], tuple[Any, Mapping[str, Metric | Number]]]
Evaluate = Callable[[Any], Mapping[str, Metric | Number | None]]
OnSample = Callable[[int, Any], Iterable[Mapping[str, Any]]]
Show = Callable[[int, Sequence[Mapping[str, Any]]], None]


class Source(Protocol):
    """Where batches come from."""

    def next(self, state: Any) -> tuple[Any, Mapping[str, Metric | Number]]:
        """The next batch, on the devices, and its metrics: `Metric`s are merged, of plain numbers the latest counts.

        `num_tokens` (all tokens so far) and `epoch` are such numbers. Offline sources ignore the train state.
        """
        ...

    def state(self) -> Any:
        """What `storable.pack` can save, such that a source that restores it gives the same next batch."""
        ...

    def restore(self, state: Any) -> None:
        """Takes up a saved state."""
        ...


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
      state: the last train state, or the best (see `Config.load_best_model_at_end`).
      step: updates made.
      reason: "completed", "early_stopped" or "terminated" (a stop signal; everything is saved).
      best: the best evaluation, None without `metric_for_best_model`.
      metrics: the summary: `train_loss`, `train_runtime` (seconds) and rates; empty when terminated.
    """

    state: Any
    step: int
    reason: str
    best: Best | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Run:
    """The fixed part of a run."""

    config: Config
    source: Source
    checkpoints: Checkpoints | None
    writers: Sequence[Writer]
    evaluate: Evaluate | None
    on_sample: OnSample | None
    samples: JsonLines | None
    show: Show | None
    progress: Callable[[int, Mapping[str, float]], None] | None
    start: float


@dataclass(frozen=True)
class _Lap:
    """Where a stretch of timed steps began."""

    time: float
    step: int
    tokens: float


def fit(
    state: TrainState,
    frozen: PyTree,
    step: JittedStep,
    source: Source,
    config: Config,
    *,
    checkpoints: Checkpoints | None = None,
    restored: Restored | None = None,
    writers: Sequence[Writer] = (),
    evaluate: Evaluate | None = None,
    on_sample: OnSample | None = None,
    samples: JsonLines | None = None,
    show: Show | None = None,
    progress: Callable[[int, Mapping[str, float]], None] | None = None,
) -> FitResult:
    """Trains until `num_steps`, early stopping or a stop signal.

    A run that resumes:

        restored = checkpoints.restore(abstract_state)
        writers = open_writers(folder, resume_step=restored.step if restored else None)
        fit(restored.state if restored else init(), ..., checkpoints=checkpoints, restored=restored, writers=writers)

    Args:
      state: where to start; donated. The restored state when resuming.
      frozen: passed to every step; not donated.
      step: jitted `(state, frozen, batch) -> (state, metrics)` that donates the state.
      source: gives the batches.
      config: lengths and intervals.
      checkpoints: where to save; None saves nothing.
      restored: what `state` was restored from: continues its source, sums, best metric and early stopping.
      writers: get one record per log and per evaluation; the caller closes them.
      evaluate: state -> metrics; `eval_` is put before their names.
      on_sample: (step, state) -> records for `samples`.
      samples: `samples.jsonl`.
      show: (step, the same records) -> None, for a person to look at.
      progress: called after every step with its number and latest metrics, for a progress bar.

    Raises:
      FloatingPointError: the loss or the gradient is not finite; nothing of that step is saved.
      OSError: a checkpoint or a metric cannot be written.
      ValueError: the config asks for what is not given.
    """
    schedule.check(config, checkpoints is not None, evaluate is not None)
    run = _Run(config, source, checkpoints, writers, evaluate, on_sample, samples, show, progress, time.perf_counter())
    done, frozen = _resume(source, restored), _on_devices(frozen)
    lap, waiting, reason = _Lap(run.start, done.step, done.tokens), None, schedule.ended(config, done, False)
    number = done.step
    with guards.stop_signals() as asked, guards.count_compiles() as compiles:
        dispatch = guards.Dispatcher(step, compiles)
        while reason is None:
            number += 1
            with jax.transfer_guard("allow"):
                batch, extra = source.next(state)
                batch = _on_devices(batch)
            state, metrics, pause = dispatch(number, state, frozen, batch)
            lap = replace(lap, time=lap.time + pause)
            if waiting is not None:
                done, lap = _read(run, done, waiting, lap)
            waiting, stop = (number, metrics, extra), asked(number)
            if stop or schedule.due(config, number):
                done, lap = _read(run, done, waiting, lap)
                waiting = None
                done, lap, reason = _act(run, state, done, lap, stop)
    summary, best = _finish(run, done, reason), _best_to_load(config, done, reason)
    if checkpoints is not None and best is not None:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        del state  # room for the other
        loaded = checkpoints.restore(like, best, source=False)
        state = cast("Restored", loaded).state
    return FitResult(state, done.step, reason, done.best, summary)


def _on_devices(tree: PyTree) -> PyTree:
    """Puts what is still on the host on the default device; arrays stay where they are, over processes too."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)


def _resume(source: Source, restored: Restored | None) -> Tally:
    if restored is None:
        return Tally()
    source.restore(restored.source)
    return Tally.from_json(restored.meta)


def _read(run: _Run, done: Tally, waiting: tuple, lap: _Lap) -> tuple[Tally, _Lap]:
    """Waits for a step's metrics, adds them up, and logs when that is due."""
    number, metrics, extra = waiting
    fetched = {**jax.device_get(metrics), **jax.device_get(extra)}
    latest = Interval().add(fetched)
    _check_finite(run, number, latest.values())
    losses = {name: _mean(value) for name, value in fetched.items() if name == "loss"}
    tokens = latest.values().get("num_tokens", done.tokens)
    done = replace(done, total=done.total.add(losses), step=number, interval=done.interval.add(fetched), tokens=tokens)
    if run.progress is not None:
        run.progress(number, {**latest.values(), **_timings(run.config, done, lap)})
    return _log(run, done, lap) if schedule.every(run.config.logging_steps, number) else (done, lap)


def _mean(value: Metric | Number) -> Metric:
    return value if isinstance(value, Mean | Min | Max | Sum) else Mean(float(value), 1.0)


def _log(run: _Run, done: Tally, lap: _Lap) -> tuple[Tally, _Lap]:
    if not done.interval.parts:
        return done, lap
    _write(run, done.step, {**done.interval.values(), **_timings(run.config, done, lap)})
    return replace(done, interval=Interval()), _Lap(time.perf_counter(), done.step, done.tokens)


def _timings(config: Config, done: Tally, lap: _Lap) -> dict[str, float]:
    """Speed since `lap`, without compilations, evaluations, samples and the blocking part of saves."""
    seconds, steps = time.perf_counter() - lap.time, done.step - lap.step
    if steps < 1 or seconds <= 0:
        return {}
    timings = {"step_time": seconds / steps}
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


def _act(run: _Run, state: Any, done: Tally, lap: _Lap, stop: bool) -> tuple[Tally, _Lap, str | None]:
    """Evaluation, samples, checkpoint: whatever is due after this step."""
    start, config, last = time.perf_counter(), run.config, done.step == run.config.num_steps
    before = done.best
    if run.evaluate is not None and (last or schedule.every(config.eval_steps, done.step)):
        done = _evaluate(run, run.evaluate, state, done)
    if run.on_sample is not None and schedule.every(config.sample_steps, done.step):
        _sample(run, run.on_sample(done.step, state), done.step)
    reason = schedule.ended(config, done, stop)
    if reason in ("completed", "early_stopped"):
        done, lap = _log(run, done, lap)
    if run.checkpoints is not None and (reason or done.best != before or schedule.every(config.save_steps, done.step)):
        _save(run, run.checkpoints, state, done)
    return done, replace(lap, time=lap.time + time.perf_counter() - start), reason


def _evaluate(run: _Run, evaluate: Evaluate, state: Any, done: Tally) -> Tally:
    start = time.perf_counter()
    values = {schedule.prefixed(name): value for name, value in Interval().add(evaluate(state)).values().items()}
    _write(run, done.step, {**values, "eval_runtime": time.perf_counter() - start})
    name = run.config.metric_for_best_model
    if name is None:
        return done
    if schedule.prefixed(name) not in values:
        raise ValueError(f"metric_for_best_model: there is no {schedule.prefixed(name)} among {', '.join(values)}")
    return schedule.judge(run.config, done, values[schedule.prefixed(name)])


def _sample(run: _Run, records: Iterable[Mapping[str, Any]], step: int) -> None:
    """All processes draw samples together; those that have a file write them."""
    records = list(records)
    for record in records:
        if run.samples is not None:
            run.samples.write(step, record)
    if run.show is not None and records:
        run.show(step, records)


def _save(run: _Run, checkpoints: Checkpoints, state: Any, done: Tally) -> None:
    seconds = done.seconds + time.perf_counter() - run.start
    keep = () if done.best is None else (done.best.step,)
    checkpoints.save(done.step, state, run.source.state(), done.to_json(seconds), keep=keep)


def _finish(run: _Run, done: Tally, reason: str) -> dict[str, float]:
    """Waits for the last save and writes the summary."""
    if run.checkpoints is not None:
        run.checkpoints.wait()
    summary = {} if reason == "terminated" else _summary(run, done)
    if summary:
        _write(run, done.step, summary)
    return summary


def _best_to_load(config: Config, done: Tally, reason: str) -> int | None:
    """The step whose state is given back instead of the last, if any."""
    wanted = reason == "early_stopped" or (reason == "completed" and config.load_best_model_at_end)
    return done.best.step if wanted and done.best is not None and done.best.step != done.step else None


def _summary(run: _Run, done: Tally) -> dict[str, float]:
    """The last record, named as transformers' `speed_metrics`; over all processes of the run."""
    seconds = done.seconds + time.perf_counter() - run.start
    summary = {"train_runtime": seconds, "train_steps_per_second": done.step / seconds}
    if run.config.samples_per_step:
        summary["train_samples_per_second"] = run.config.samples_per_step * done.step / seconds
    return {**{f"train_{name}": value for name, value in done.total.values().items()}, **summary}


def _write(run: _Run, step: int, record: Mapping[str, float]) -> None:
    for writer in run.writers:
        writer.write(step, record)


def _check_finite(run: _Run, number: int, values: Mapping[str, float]) -> None:
    bad = {name: values[name] for name in ("loss", "grad_norm") if not np.isfinite(values.get(name, 0.0))}
    if not bad:
        return
    if run.checkpoints is not None:
        run.checkpoints.wait()
    steps = run.checkpoints.steps() if run.checkpoints is not None else []
    kept = f"checkpoint {steps[-1]} is kept" if steps else "there is no checkpoint yet"
    found = ", ".join(f"{name} is {value}" for name, value in bad.items())
    raise FloatingPointError(
        f"step {number}: {found}; {kept}. Lower the learning rate, warm up longer, clip gradients (max_grad_norm), or "
        f"compute in float32; look at the batch of this step for extreme lengths"
    )
