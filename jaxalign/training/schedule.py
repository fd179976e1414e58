"""When what is done in a run: intervals, the best evaluation, early stopping, and the sums carried between logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxalign.training.metrics import Interval


@dataclass(frozen=True)
class Config:
    """How long to train, and what is done every how many steps (0 or None: never).

    Attributes:
      num_steps: optimiser updates of the whole run, those before a resume included.
      logging_steps: a line of metrics, merged over these steps; the last step is always logged.
      save_steps: a checkpoint; also after the last step, on a stop signal, and at every new best.
      eval_steps: an evaluation; also after the last step.
      sample_steps: samples for `samples.jsonl`.
      metric_for_best_model: an evaluation metric, with or without `eval_`; its best checkpoint is kept.
      greater_is_better: None means yes unless the metric's name ends with "loss".
      load_best_model_at_end: give back the best checkpoint's state; always so after early stopping.
      early_stopping_patience: stop after so many evaluations in a row without improvement.
      early_stopping_threshold: what counts as improvement here: more than this.
      samples_per_step: examples in a batch, for `train_samples_per_second`.
      flops_per_step: floating-point operations of a step, for `mfu`.
      peak_flops: per second, of all devices together, for `mfu`.
    """

    num_steps: int
    logging_steps: int = 10
    save_steps: int = 500
    eval_steps: int | None = None
    sample_steps: int | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    samples_per_step: int | None = None
    flops_per_step: float | None = None
    peak_flops: float | None = None


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: its step and the metric's value."""

    step: int
    value: float


@dataclass(frozen=True)
class Tally:
    """What the loop carries from step to step; saved as JSON with every checkpoint.

    Attributes:
      step: updates made.
      interval: metrics since the last log.
      total: the loss over the whole run.
      tokens: `num_tokens` of the latest step.
      best: the best evaluation.
      stale: evaluations since the last improvement.
      seconds: wall-clock time of earlier processes of this run.
      written: whether what is due after this step was done: log, evaluation, samples.
    """

    step: int = 0
    interval: Interval = field(default_factory=Interval)
    total: Interval = field(default_factory=Interval)
    tokens: float = 0.0
    best: Best | None = None
    stale: int = 0
    seconds: float = 0.0
    written: bool = True

    def to_json(self, seconds: float) -> dict[str, Any]:
        """This, after so many seconds of wall-clock time in all."""
        best = self.best and {"step": self.best.step, "value": self.best.value}
        sums = {"interval": self.interval.to_json(), "total": self.total.to_json()}
        rest = {"tokens": self.tokens, "best": best, "stale": self.stale, "seconds": seconds}
        return {"step": self.step, "written": self.written, **sums, **rest}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Tally:
        """The inverse of `to_json`."""
        interval, total = (Interval.from_json(state[name]) for name in ("interval", "total"))
        best = Best(**state["best"]) if state["best"] else None
        rest = {name: state[name] for name in ("step", "tokens", "stale", "seconds")}
        return cls(**rest, interval=interval, total=total, best=best, written=state.get("written", True))


def every(interval: int | None, number: int) -> bool:
    """Whether the interval ends with this step; an interval of 0 or None never does."""
    return bool(interval) and number % interval == 0


def due(config: Config, number: int) -> bool:
    """Whether something needs the state after this step."""
    intervals = (config.save_steps, config.eval_steps, config.sample_steps)
    return number == config.num_steps or any(every(interval, number) for interval in intervals)


def ended(config: Config, done: Tally, stop: bool) -> str | None:
    """Why the run ends after this step, None when it goes on."""
    if done.step >= config.num_steps:
        return "completed"
    if config.early_stopping_patience and done.stale >= config.early_stopping_patience:
        return "early_stopped"
    return "terminated" if stop else None


def judge(config: Config, done: Tally, value: float) -> Tally:
    """Best metric and staleness, as transformers' Trainer and its EarlyStoppingCallback."""
    greater = config.greater_is_better
    if greater is None:
        greater = not str(config.metric_for_best_model).endswith("loss")
    gain = np.inf if done.best is None else (value - done.best.value) * (1 if greater else -1)
    if not np.isfinite(value):
        gain = -np.inf
    best = Best(done.step, value) if gain > 0 else done.best
    return replace(done, best=best, stale=0 if gain > config.early_stopping_threshold else done.stale + 1)


def prefixed(name: str) -> str:
    """An evaluation metric's full name."""
    return name if name.startswith("eval_") else f"eval_{name}"


def check(config: Config, has_checkpoints: bool, has_evaluation: bool) -> None:
    """Raises a ValueError where the config asks for what is not given."""
    if config.num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {config.num_steps}")
    wants = [key for key in ("early_stopping_patience", "load_best_model_at_end") if getattr(config, key)]
    if wants and config.metric_for_best_model is None:
        raise ValueError(f"{wants[0]} needs metric_for_best_model")
    if config.metric_for_best_model is not None and not has_evaluation:
        raise ValueError("metric_for_best_model needs an evaluation")
    if wants and not has_checkpoints:
        raise ValueError(f"{wants[0]} needs checkpoints, to give the best state back")
