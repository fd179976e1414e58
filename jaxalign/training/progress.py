"""A progress bar for the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Metric, label, format.
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("device_memory_gib", "memory", "{:.1f} GiB"),
)


@contextlib.contextmanager
def progress_bar(
    num_steps: int, start: int = 0, console: Console | None = None, title: str = "train"
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Shows steps, loss, tokens per second, MFU, memory and the time left while the context is open.

    Args:
      num_steps: steps of the whole run.
      start: steps done before (they do not count for the time left).
      console: where to draw; None takes the terminal.
      title: stands before the bar.

    Yields:
      What `fit` takes as `progress`: (step, metrics) -> None; of the metrics those that are absent are not shown.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=console) as bar:
        task = bar.add_task(title, total=num_steps, completed=start, shown="")
        yield lambda step, metrics: bar.update(task, completed=step, shown=shown(metrics))


def shown(metrics: Mapping[str, float]) -> str:
    """The line of numbers beside the bar."""
    return "  ".join(f"{label} {form.format(metrics[name])}" for name, label, form in SHOWN if name in metrics)
