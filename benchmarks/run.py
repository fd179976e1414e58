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

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error"}


class Variant(NamedTuple):
    """One way to run one trainer.

    Attributes:
      trainer: whose script and environment.
      dtype: of weights, or of the computation.
      flags: further arguments of the script.
      tasks: where the variant differs from the others; empty = everywhere.
    """

    trainer: str
    dtype: str
    flags: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


OFFLINE, SAMPLING = ("sft", "dpo"), ("sample", "sample-ragged")
VARIANTS = {
    "jaxalign": Variant("jaxalign", "float32", ("--remat", "dots_attention")),
    "jaxalign-keep-all": Variant("jaxalign", "float32", ("--remat", "none"), (*OFFLINE, "grpo", "ppo")),
    "jaxalign-waves": Variant("jaxalign", "float32", ("--waves",), ("sample-ragged",)),
    "trl": Variant("trl", "float32"),
    "tunix": Variant("tunix", "float32"),
    "trl-checkpointing": Variant("trl", "float32", ("--checkpointing",), (*OFFLINE, "grpo")),
    "trl-padding-free": Variant("trl", "float32", ("--padding-free",), ("sft",)),
    "trl-static": Variant("trl", "float32", ("--cache", "static"), (*SAMPLING, "grpo")),
    "trl-continuous": Variant("trl", "float32", ("--continuous",), SAMPLING),
    "trl-eager": Variant("trl", "float32", ("--attention", "eager")),
    "trl-compile": Variant("trl", "float32", ("--compile",)),
    "trl-bf16": Variant("trl", "bfloat16"),
    "trl-bf16-autocast": Variant("trl", "bfloat16", ("--autocast",), (*OFFLINE, "grpo")),
    "tunix-remat": Variant("tunix", "float32", ("--remat", "decoder"), OFFLINE),
    "tunix-bf16": Variant("tunix", "bfloat16"),
    "jaxalign-bf16": Variant("jaxalign", "bfloat16"),
}
OLDER_TRL = "trl-1.12.0"
SCRIPTS = {"jaxalign": "ours", "trl": "peer_trl", "tunix": "peer_tunix"}
PATHS = {"--python-jaxalign", "--python-trl", "--python-tunix", "--gguf", "--work", "--results", "--table"}


class Task(NamedTuple):
    """What is measured, unless the command line says otherwise.

    Attributes:
      script: ending of the names of the scripts that do it.
      variants: which.
      batch_size: examples per step, or completions at the same time.
      steps: measured in one process.
      warmup: steps before them.
      repeats: fresh processes of each variant.
      prompts: of one call of a sampler; 0 = as many as `batch_size`.
      micro_batch_size: jaxalign's; 0 = one micro-batch.
    """

    script: str
    variants: tuple[str, ...]
    batch_size: int
    steps: int
    warmup: int
    repeats: int
    prompts: int = 0
    micro_batch_size: int = 0


TASKS = {
    "sft": Task(".py", ("jaxalign", "trl", "tunix", "trl-bf16"), 8, 5, 2, 3, micro_batch_size=4),
    "dpo": Task(".py", ("jaxalign", "trl", "tunix", "trl-bf16"), 8, 5, 2, 3, micro_batch_size=4),
    "sample": Task("_online.py", ("jaxalign", "trl", "tunix"), 16, 3, 1, 2),
    "sample-ragged": Task("_online.py", ("jaxalign", "jaxalign-waves", "trl", "trl-continuous"), 8, 3, 1, 2, 64),
    "grpo": Task("_online.py", ("jaxalign", "trl", "tunix"), 2, 3, 1, 2),
    "ppo": Task("_ppo.py", ("jaxalign", "trl"), 16, 3, 1, 2, micro_batch_size=4),
}
# On the larger model a call takes many seconds.
FEWER = {
    "steps": {"sft": 3, "dpo": 3, "sample": 2, "sample-ragged": 1, "grpo": 2, "ppo": 1},
    "warmup": {"sft": 1, "dpo": 1},
    "repeats": dict.fromkeys(("sft", "dpo", "sample", "sample-ragged", "grpo", "ppo"), 1),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python-jaxalign", type=Path, default=ROOT / ".venv/bin/python")
    parser.add_argument("--python-trl", type=Path, default=ROOT / ".venv-trl/bin/python")
    parser.add_argument("--python-tunix", type=Path, default=ROOT / ".venv-tunix/bin/python")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", default=["llama5m", "smollm2"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="by default a choice that depends on the task")
    parser.add_argument("--batch-size", type=int, help="examples per step, or completions at the same time")
    parser.add_argument("--prompt-lengths", nargs=2, metavar=("LEAST", "MOST"), help="tokens; 60 to 140 by default")
    parser.add_argument("--steps", type=int, help="measured steps of one repetition")
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--repeats", type=int, help="fresh processes of each variant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gguf", type=Path, default=ROOT / "models/smollm2-135m-instruct.gguf")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/benchmarks", help="model folders and rows")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--table", type=Path, default=HERE / "RESULTS.md")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace, model: str, task: str) -> Task:
    """The task with what the command line says of it."""
    usual = {name: fewer[task] for name, fewer in FEWER.items() if model == "smollm2" and task in fewer}
    given = {name: getattr(args, name) for name in ("batch_size", "steps", "warmup", "repeats")}
    found = TASKS[task]._replace(**usual | {name: value for name, value in given.items() if value is not None})
    names = args.variants or found.variants
    return found._replace(variants=tuple(name for name in names if task in (VARIANTS[name].tasks or TASKS)))


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
    """The model folder and the rows of one model."""
    folder, rows = args.work / model, args.work / f"{model}.jsonl"
    python = interpreter(args, "jaxalign")
    if model == "smollm2" and not (folder / "config.json").exists():
        convert = "from jaxalign.cli import main; main()"
        subprocess.run([python, "-c", convert, "convert", args.gguf, folder], check=True, env=ENVIRONMENT)
    tasks = [chosen(args, model, task) for task in args.tasks]
    count = max(max(task.prompts, task.batch_size * (task.steps + task.warmup)) for task in tasks)
    command = [python, HERE / "cases.py", "--model", folder, "--data", rows, "--count", str(count)]
    command += ["--prompt-lengths", *args.prompt_lengths] if args.prompt_lengths else []
    subprocess.run(command, check=True)
    return folder, rows


def measure(args: argparse.Namespace, name: str, task: str, plan: Task, folder: Path, rows: Path) -> dict:
    """Runs one variant once in a fresh process; a failure is recorded with the end of its output, never hidden."""
    variant = VARIANTS[name]
    command = [interpreter(args, variant.trainer), HERE / (SCRIPTS[variant.trainer] + plan.script), "--task", task]
    command += ["--model", folder, "--data", rows, "--steps", plan.steps, "--warmup", plan.warmup]
    command += ["--batch-size", plan.batch_size, "--dtype", variant.dtype, "--threads", args.threads, *variant.flags]
    command += ["--prompts", plan.prompts or plan.batch_size] if task in SAMPLING else []
    command += ["--micro-batch-size", plan.micro_batch_size] if variant.trainer == "jaxalign" else []
    environment = ENVIRONMENT
    if task == "ppo" and variant.trainer == "trl":
        # The last release with PPO lies in a folder of its own, beside the one that all else is measured with.
        environment = ENVIRONMENT | {"PYTHONPATH": str(interpreter(args, "trl").parents[1] / OLDER_TRL)}
    started = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=HERE, env=environment)
    record = {"variant": name, "task": task, "model": folder.name, "process_seconds": time.perf_counter() - started}
    if done.returncode:
        return record | {"trainer": variant.trainer, "failed": (done.stderr or done.stdout).strip().splitlines()[-3:]}
    return record | json.loads(done.stdout.strip().splitlines()[-1])


def processor() -> str:
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        names = [line.split(":", 1)[1].strip() for line in described.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{name}, {cores} cores"


def begin(args: argparse.Namespace, plan: Task, command: str) -> dict:
    """What results.json says of one task on one model, before anything has run."""
    return {
        "command": command,
        "machine": f"{processor()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "threads": args.threads,
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "warmup": plan.warmup,
        "repeats": plan.repeats,
        "runs": [],
    }


def key_of(model: str, task: str, plan: Task, prompt_lengths: list[str] | None) -> str:
    """Where results.json keeps a case; another batch size than usual, or other prompts, make another case."""
    batch = f"/batch {plan.batch_size}" if plan.batch_size != TASKS[task].batch_size else ""
    return f"{model}/{task}{batch}" + (f"/prompts of {' to '.join(prompt_lengths)}" if prompt_lengths else "")


def main(argv: list[str]) -> None:
    """Runs everything in interleaved order and writes the JSON after each run, the page after each repetition.

    A case that has results already gets new ones; those of all others stay.
    """
    args = parse(argv)
    places = {model: prepare(args, model) for model in args.models}
    command = shlex.join(["python", "benchmarks/run.py", *without_paths(argv)])
    sections = json.loads(args.results.read_text())["sections"] if args.results.exists() else {}
    plans = [(model, task, chosen(args, model, task)) for model in args.models for task in args.tasks]
    fresh = {key_of(*each, args.prompt_lengths): begin(args, each[2], command) for each in plans}
    for repeat in range(max(plan.repeats for *_, plan in plans)):
        for model, task, plan in plans:
            key = key_of(model, task, plan, args.prompt_lengths)
            for name in plan.variants if repeat < plan.repeats else ():
                run = measure(args, name, task, plan, *places[model])
                sections[key] = fresh[key]
                sections[key]["runs"].append(run | {"repeat": repeat})
                args.results.write_text(json.dumps({"sections": sections}, indent=1) + "\n")
                measured = run.get("seconds", [])[plan.warmup :]
                state = f"{statistics.median(measured):.3f} s" if measured else "failed"
                print(f"{repeat + 1}/{plan.repeats} {model} {task} {name}: {state}", flush=True)
        args.table.write_text(report.page(sections))


if __name__ == "__main__":
    main(sys.argv[1:])
