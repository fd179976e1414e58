"""What a person sees of the loop: a progress bar, and samples as a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Metric, label, format.
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("device_memory_gib", "memory", "{:.1f} GiB"),
    ("process_memory_gib", "process memory", "{:.1f} GiB"),
)
MOST_PROMPT, MOST_COMPLETION = 300, 600  # characters of a sample in a table


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


def samples_table(step: int, records: Sequence[Mapping[str, Any]]) -> Table:
    """Records of `samples.jsonl` as a table: prompt, completion, and a column for each reward.

    Args:
      step: after which they were drawn.
      records: with `prompt` and `completion`; where they were scored, `rewards` (by name, None = none), `tokens` and
        `ended`. Long prompts lose their beginning, long completions their end.
    """
    scored = any("rewards" in record for record in records)
    names = list(dict.fromkeys(name for record in records for name in record.get("rewards", {})))
    table = Table(title=f"step {step}", show_lines=True)
    for name in ("prompt", "completion"):
        table.add_column(name, overflow="fold")
    for name in [*names, *(["tokens"] if scored else [])]:
        table.add_column(name, justify="right")
    for record in records:
        prompt, completion = str(record["prompt"]), str(record["completion"])
        if len(prompt) > MOST_PROMPT:
            prompt = f"...{prompt[-MOST_PROMPT:]}"
        if len(completion) > MOST_COMPLETION:
            completion = f"{completion[:MOST_COMPLETION]}..."
        scores = [record.get("rewards", {}).get(name) for name in names]
        cells = ["-" if score is None else f"{score:.4g}" for score in scores]
        if scored:
            cells.append(f"{record['tokens']}{'' if record['ended'] else ' (cut)'}")
        # As Text: what a model writes is no markup.
        table.add_row(*map(Text, [prompt.strip(), completion.strip(), *cells]))
    return table
