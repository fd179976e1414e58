"""What the command line prints: lines, tables, completions, a progress bar."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()


def say(line: str) -> None:
    """Prints a line as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress(num_steps: int, start: int, title: str) -> Any:
    """The progress bar of a stage."""
    from jaxalign.training.progress import progress_bar

    return progress_bar(num_steps, start, console, title)


def show_samples(step: int, records: Any) -> None:
    """Sample answers of a training step, as a table."""
    from jaxalign.training.progress import samples_table

    console.print(samples_table(step, records))


def show_completions(rows: Any) -> None:
    """Each prompt once, where there are several rows, and what came of it."""
    from jaxalign.evaluation import readable

    last = None
    for row in rows:
        if len(rows) > 1 and row["prompt"] is not last:
            console.print(readable(row["prompt"]), style="bold", markup=False, highlight=False)
        if len(rows) > 1 or "score" in row:
            ended = f"{len(row['completion_ids'])} tokens, {row['finish']}"
            scored = "".join(f", {name} {value}" for name, value in row.get("scores", {}).items())
            console.print(f"[{ended}{scored}]", style="dim", markup=False, highlight=False)
        console.print(readable(row["completion"]).strip(), markup=False, highlight=False)
        last = row["prompt"]


def metrics_table(title: str, metrics: dict[str, float]) -> None:
    """Prints the numbers among metrics."""
    table = Table("metric", title, box=None)
    for name, value in metrics.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.6g}")
    console.print(table)
