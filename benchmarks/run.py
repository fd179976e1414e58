"""Times jaxalign against TRL and Tunix on this machine, interleaved, and writes the results.

Needs only the standard library; every trainer runs with the Python of its own environment (see README.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error"}


class Variant(NamedTuple):
    """One way to run one trainer."""

    trainer: str
    dtype: str
    flags: tuple[str, ...] = ()


VARIANTS = {
    "jaxalign": Variant("jaxalign", "float32", ("--micro-batch-size", "2")),
    "trl": Variant("trl", "float32"),
    "tunix": Variant("tunix", "float32"),
    "trl-checkpointing": Variant("trl", "float32", ("--checkpointing",)),
    "trl-padding-free": Variant("trl", "float32", ("--padding-free",)),
    "trl-eager": Variant("trl", "float32", ("--attention", "eager")),
    "trl-compile": Variant("trl", "float32", ("--compile",)),
    "trl-bf16": Variant("trl", "bfloat16"),
    "trl-bf16-autocast": Variant("trl", "bfloat16", ("--autocast",)),
    "tunix-remat": Variant("tunix", "float32", ("--remat", "decoder")),
    "tunix-bf16": Variant("tunix", "bfloat16"),
    "jaxalign-bf16": Variant("jaxalign", "bfloat16", ("--micro-batch-size", "2")),
}
SCRIPTS = {"jaxalign": "ours.py", "trl": "peer_trl.py", "tunix": "peer_tunix.py"}
PATHS = {"--python-jaxalign", "--python-trl", "--python-tunix", "--gguf", "--work", "--results", "--table"}
SFT_ONLY = {"trl-padding-free"}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python-jaxalign", type=Path, default=ROOT / ".venv/bin/python")
    parser.add_argument("--python-trl", type=Path, default=ROOT / ".venv-trl/bin/python")
    parser.add_argument("--python-tunix", type=Path, default=ROOT / ".venv-tunix/bin/python")
    parser.add_argument("--tasks", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"])
    parser.add_argument("--models", nargs="+", default=["llama5m", "smollm2"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["jaxalign", "trl", "tunix", "trl-bf16"])
    parser.add_argument("--batch-size", type=int, default=8, help="examples per step")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of one repetition")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gguf", type=Path, default=ROOT / "models/smollm2-135m-instruct.gguf")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/benchmarks", help="model folders and rows")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--table", type=Path, default=HERE / "RESULTS.md")
    return parser.parse_args(argv)


def without_paths(argv: list[str]) -> list[str]:
    """The arguments that decide what is measured; where environments and files lie is this machine's matter."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            skip = word.split("=")[0] in PATHS
        if not skip:
            kept.append(word)
    return kept


def interpreter(args: argparse.Namespace, trainer: str) -> Path:
    """The Python of a trainer's environment.

    Raises:
      FileNotFoundError: The environment is missing.
    """
    python = getattr(args, f"python_{trainer}")
    if not python.exists():
        raise FileNotFoundError(f"{python} is missing: run `make bench-envs` or give --python-{trainer}.")
    return python


def prepare(args: argparse.Namespace, model: str) -> tuple[Path, Path]:
    """The model folder and the rows of one model, made once."""
    folder, rows = args.work / model, args.work / f"{model}.jsonl"
    python = interpreter(args, "jaxalign")
    if model == "smollm2" and not (folder / "config.json").exists():
        convert = "from jaxalign.cli import main; main()"
        subprocess.run([python, "-c", convert, "convert", args.gguf, folder], check=True, env=ENVIRONMENT)
    count = args.batch_size * (args.steps + args.warmup)
    subprocess.run([python, HERE / "cases.py", "--model", folder, "--data", rows, "--count", str(count)], check=True)
    return folder, rows


def measure(args: argparse.Namespace, name: str, task: str, folder: Path, rows: Path) -> dict:
    """Runs one variant once in a fresh process; a failure is recorded with the end of its output, never hidden."""
    variant = VARIANTS[name]
    command = [interpreter(args, variant.trainer), HERE / SCRIPTS[variant.trainer], "--task", task]
    command += ["--model", folder, "--data", rows, "--steps", args.steps, "--warmup", args.warmup]
    command += ["--batch-size", args.batch_size, "--dtype", variant.dtype, "--threads", args.threads, *variant.flags]
    started = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=HERE, env=ENVIRONMENT)
    record = {"variant": name, "task": task, "model": folder.name, "process_seconds": time.perf_counter() - started}
    if done.returncode:
        return record | {"failed": (done.stderr or done.stdout).strip().splitlines()[-3:]}
    return record | json.loads(done.stdout.strip().splitlines()[-1])


def summary(runs: list[dict]) -> dict:
    """One table row out of the repetitions of one variant on one case."""
    measured = [step for run in runs for step in run["seconds"][run["warmup"] :]]
    real = [tokens for run in runs for tokens in run["real_tokens"][run["warmup"] :]]
    rows = [tokens for run in runs for tokens in run["row_tokens"][run["warmup"] :]]
    median = statistics.median(measured)
    return {
        "median": median,
        "least": min(measured),
        "most": max(measured),
        "examples": runs[0]["batch_size"] / median,
        "tokens": sum(real) / sum(measured),
        "efficiency": sum(real) / sum(rows),
        "compile": statistics.median(run.get("compile_seconds", 0.0) for run in runs),
        "memory": max(run["peak_memory_mib"] for run in runs),
        "floor": statistics.median(run["floor_seconds"] for run in runs) if "floor_seconds" in runs[0] else None,
    }


def case_lines(runs: list[dict]) -> list[str]:
    """The table of one task and model, and how much faster jaxalign is than the fastest peer of each dtype."""
    lines = [
        "| variant | step s: median (min to max) | examples/s | tokens/s | real/row tokens | compile s | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    rows, failures = {}, []
    for name in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == name]
        failed = [run for run in mine if "failed" in run]
        if failed:
            failures.append(f"- `{name}` failed in {len(failed)} of {len(mine)} runs: {' '.join(failed[0]['failed'])}")
            continue
        row = rows[name] = summary(mine)
        lines.append(
            f"| {name} | {row['median']:.3f} ({row['least']:.3f} to {row['most']:.3f}) | {row['examples']:.2f} "
            f"| {row['tokens']:.0f} | {row['efficiency']:.2f} | {row['compile']:.1f} | {row['memory']:.0f} |"
        )
    return [*lines, "", *comparison(rows), *failures]


def comparison(rows: dict[str, dict]) -> list[str]:
    """Ratios of step time and memory, and the step time over its floor."""
    lines = []
    for name in (name for name in rows if VARIANTS[name].trainer == "jaxalign"):
        ours = rows[name]
        peers = {peer: row for peer, row in rows.items() if VARIANTS[peer].trainer != "jaxalign"}
        for dtype in ("float32", "bfloat16"):
            times = {peer: row["median"] for peer, row in peers.items() if VARIANTS[peer].dtype == dtype}
            if times:
                fastest = min(times, key=lambda peer: times[peer])
                ratio = times[fastest] / ours["median"]
                lines.append(f"- `{name}` is {ratio:.2f} times as fast as `{fastest}`, the fastest peer in {dtype}.")
        if peers:
            shares = (f"{ours['memory'] / row['memory']:.2f} of `{peer}`'s" for peer, row in peers.items())
            lines.append(f"- `{name}`'s peak memory is {', '.join(shares)}.")
        if ours["floor"]:
            lines.append(
                f"- `{name}`'s floor is {ours['floor']:.3f} s a step, "
                f"{100 * ours['floor'] / ours['median']:.0f} % of the measured time."
            )
    return lines


def processor() -> str:
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        names = [line.split(":", 1)[1].strip() for line in described.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{name}, {cores} cores"


def page(args: argparse.Namespace, command: str, runs: list[dict]) -> str:
    """RESULTS.md."""
    versions = {
        run["trainer"]: ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        for run in runs
        if "failed" not in run
    }
    lines = [
        "# Results",
        "",
        f"Command: `{command}`  ",
        f"Machine: {processor()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}  ",
        "Versions: " + "; ".join(versions.values()) + "  ",
        f"Batches of {args.batch_size} examples (rows for SFT, pairs for DPO); {args.repeats} interleaved repetitions "
        f"of {args.steps} measured steps after {args.warmup}; {args.threads} threads. README.md says what is measured.",
    ]
    for model in args.models:
        for task in args.tasks:
            chosen = [run for run in runs if run["model"] == model and run["task"] == task]
            lines += ["", f"## {task.upper()}, {model}", "", *case_lines(chosen)]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Runs everything in interleaved order and writes the JSON after each run, the table after each repetition."""
    args = parse(argv)
    places = {model: prepare(args, model) for model in args.models}
    command = shlex.join(["python", "benchmarks/run.py", *without_paths(argv)])
    runs: list[dict] = []
    for repeat in range(args.repeats):
        for model in args.models:
            for task in args.tasks:
                for name in args.variants:
                    if task == "dpo" and name in SFT_ONLY:
                        continue
                    run = measure(args, name, task, *places[model])
                    runs.append(run | {"repeat": repeat})
                    args.results.write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
                    state = "failed" if "failed" in run else f"{statistics.median(run['seconds'][args.warmup :]):.3f} s"
                    print(f"{repeat + 1}/{args.repeats} {model} {task} {name}: {state}", flush=True)
        args.table.write_text(page(args, command, runs))


if __name__ == "__main__":
    main(sys.argv[1:])
