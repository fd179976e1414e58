"""RESULTS.md out of results.json: a section for each task and model, and how the variants compare."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Run = Mapping[str, Any]
Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def timing(runs: list[Run]) -> Row:
    """What every task has: a table row out of the repetitions of one variant on one case."""
    seconds = after_warmup(runs, "seconds")
    return {
        "trainer": runs[0]["trainer"],
        "median": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "speed": 1 / statistics.median(seconds),
        "compile": statistics.median(run.get("compile_seconds", 0.0) for run in runs),
        "memory": max(run["peak_memory_mib"] for run in runs),
        "floor": statistics.median(run["floor_seconds"] for run in runs) if "floor_seconds" in runs[0] else None,
        "parts": runs[0].get("floor"),
    }


def trained(runs: list[Run]) -> Row:
    """SFT and DPO."""
    row, seconds = timing(runs), after_warmup(runs, "seconds")
    real, rows = after_warmup(runs, "real_tokens"), after_warmup(runs, "row_tokens")
    return row | {
        "examples": runs[0]["batch_size"] / row["median"],
        "tokens": sum(real) / sum(seconds),
        "efficiency": sum(real) / sum(rows),
    }


def sampled(runs: list[Run]) -> Row:
    """Sampling; lengths are chance, so tokens per second are what is compared."""
    lengths = [length for call in after_warmup(runs, "lengths") for length in call]
    tokens = sum(lengths) / sum(after_warmup(runs, "seconds"))
    return timing(runs) | {"tokens": tokens, "speed": tokens, "length": statistics.mean(lengths)}


def iterated(runs: list[Run]) -> Row:
    """A rollout and its update."""
    drawing = after_warmup(runs, "sampling_seconds")
    rest = [whole - part for whole, part in zip(after_warmup(runs, "seconds"), drawing, strict=True)]
    return timing(runs) | {"drawing": statistics.median(drawing), "rest": statistics.median(rest)}


def after_warmup(runs: list[Run], name: str) -> list[Any]:
    """The measured entries of a list that has one entry per step or call."""
    return [entry for run in runs for entry in run[name][run["warmup"] :]]


class Kind(NamedTuple):
    """How the results of a task are shown.

    Attributes:
      title: of its sections.
      unit: what `seconds` are seconds of.
      batch: what `batch_size` counts.
      summary: repetitions of one variant -> a row.
      columns: those between the time and the compile time.
    """

    title: str
    unit: str
    batch: str
    summary: Callable[[list[Run]], Row]
    columns: Columns


TRAINED: Columns = {
    "examples/s": lambda row: f"{row['examples']:.2f}",
    "tokens/s": lambda row: f"{row['tokens']:.0f}",
    "real/row tokens": lambda row: f"{row['efficiency']:.2f}",
}
SAMPLED: Columns = {
    "new tokens/s": lambda row: f"{row['tokens']:.0f}",
    "mean length": lambda row: f"{row['length']:.1f}",
}
ITERATED: Columns = {
    "of it sampling s": lambda row: f"{row['drawing']:.3f}",
    "the rest s": lambda row: f"{row['rest']:.3f}",
}
KINDS = {
    "sft": Kind("SFT", "step", "rows a step", trained, TRAINED),
    "dpo": Kind("DPO", "step", "pairs a step", trained, TRAINED),
    "sample": Kind("Sampling", "call", "completions at the same time", sampled, SAMPLED),
    "sample-ragged": Kind("Sampling, ragged lengths", "call", "completions at the same time", sampled, SAMPLED),
    "grpo": Kind("GRPO", "step", "prompts a step", iterated, ITERATED),
    "ppo": Kind("PPO", "iteration", "prompts a rollout", iterated, ITERATED),
}


def page(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """RESULTS.md.

    Args:
      sections: by `model/task`, with `/batch 32` or `/prompts of 8 to 24` where they are not the usual ones, as
        `run.py` keeps them in results.json.
    """
    lines = [
        "# Results",
        "",
        "README.md says what is measured and how. At the end: memory of adapters and of long rows.",
    ]
    order = list(KINDS)
    for name in sorted(sections, key=lambda name: (name.split("/")[0], order.index(name.split("/")[1]), name)):
        lines += ["", *section(name, sections[name])]
    # Written by hand, one level of headings up.
    memory = (Path(__file__).parent / "MEMORY.md").read_text().replace("\n## ", "\n### ")
    return "\n".join(lines) + "\n\n#" + memory


def section(name: str, found: Mapping[str, Any]) -> list[str]:
    """One task on one model."""
    model, task, *other = name.split("/")
    kind, runs = KINDS[task], found["runs"]
    versions = {
        run["trainer"]: ", ".join(f"{library} {number}" for library, number in run["versions"].items())
        for run in runs
        if "failed" not in run
    }
    return [
        f"## {', '.join([kind.title, model, *other])}",
        "",
        f"Command: `{found['command']}`  ",
        f"Machine: {found['machine']}, {found['date']}  ",
        f"Versions: {'; '.join(versions.values())}  ",
        f"{found['batch_size']} {kind.batch}; {found['repeats']} interleaved repetitions of {found['steps']} measured "
        f"{kind.unit}s after {found['warmup']}; {found['threads']} threads.",
        "",
        *table(kind, runs),
    ]


def table(kind: Kind, runs: list[Run]) -> list[str]:
    """The variants of a case one by one, and compared; failures are named."""
    names = ["variant", f"{kind.unit} s: median (min to max)", *kind.columns, "compile s", "peak MiB"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    rows, failures = {}, []
    for name in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == name]
        failed = [run for run in mine if "failed" in run]
        if failed:
            failures.append(f"- `{name}` failed in {len(failed)} of {len(mine)} runs: {' '.join(failed[0]['failed'])}")
            continue
        row = rows[name] = kind.summary(mine)
        cells = [
            name,
            f"{row['median']:.3f} ({row['least']:.3f} to {row['most']:.3f})",
            *(show(row) for show in kind.columns.values()),
            f"{row['compile']:.1f}",
            f"{row['memory']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *comparison(kind, rows), *failures]


def comparison(kind: Kind, rows: Mapping[str, Row]) -> list[str]:
    """Speed and memory of each of our variants beside all others, and its time over its floor."""
    lines = []
    for name in (name for name, row in rows.items() if row["trainer"] == "jaxalign"):
        ours, others = rows[name], {other: row for other, row in rows.items() if other != name}
        if others:
            shares = (f"{ours['speed'] / row['speed']:.2f} times `{other}`'s" for other, row in others.items())
            lines.append(f"- `{name}`'s speed is {', '.join(shares)}.")
            shares = (f"{ours['memory'] / row['memory']:.2f} of `{other}`'s" for other, row in others.items())
            lines.append(f"- `{name}`'s peak memory is {', '.join(shares)}.")
        if ours["floor"]:
            lines.append(
                f"- `{name}`'s floor is {ours['floor']:.3f} s a {kind.unit}, "
                f"{100 * ours['floor'] / ours['median']:.0f} % of the measured time."
            )
        if ours["parts"]:
            lines.append(floor_line(ours["parts"]))
    return lines


def floor_line(parts: Mapping[str, float]) -> str:
    """Where a floor of sampling comes from."""
    return (
        f"  In it: {parts['decode_steps']} decode steps, {parts['bytes_per_token'] / 1e6:.2f} MB and "
        f"{parts['flops_per_token'] / 1e6:.1f} MFLOP per new token, at {parts['bytes_per_second'] / 1e9:.1f} GB/s and "
        f"{parts['decode_flops_per_second'] / 1e9:.0f} GFLOP/s {parts['decode_seconds']:.3f} s; the prompts' "
        f"{parts['prefill_flops'] / 1e9:.1f} GFLOP at {parts['flops_per_second'] / 1e9:.0f} GFLOP/s "
        f"{parts['seconds'] - parts['decode_seconds']:.3f} s."
    )
