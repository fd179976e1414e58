"""How close training and sampling come to what one accelerator can do, for models of real size with random weights.

    python benchmarks/gpu.py [--shapes 0.5b 1.5b 8b] [--tasks sft dpo decode] [--trl-python .venv-trl/bin/python]

SFT and DPO: MFU, the FLOPs that a step must do over those that the device could have done in the time. Decode: tokens a
second, and the time in which the device could have read what must be read, over the time taken.

FLOPs are counted from the model and the rows (`counts`): two per multiply-add of matrix products, forward once and
backward twice, in DPO the reference's forward pass once more; the head where a token is predicted, attention over the
keys that a token may see. What is computed again (`model.remat`, the head, attention) is not counted, nor norms,
softmax and the optimiser. jaxalign runs a pair's prompt once for both completions and TRL once for each: each is
counted as it is laid out, so compare the trainers by documents a second, not by MFU.

A decode step must read all weights but an untied embedding table, and the keys and values of every token so far, in
bfloat16. Its time is that of a whole call less that of a call for the first token alone.

Peaks are those of `jaxalign/run/hardware.py`; a CPU's are measured (`--shapes tiny` shows that everything works). Each
figure comes from a fresh process. TRL is left out where its environment is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import gpu_cases

from jaxalign.models.config import count_params, forward_flops
from jaxalign.models.families import from_hf

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# On a GPU jax takes three quarters of the memory by default; the largest shape wants more.
OURS = {
    "PYTHONPATH": str(ROOT),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92"),
}
PASSES = {"sft": 3, "dpo": 4}
BYTES = 2  # of bfloat16


class Counted(NamedTuple):
    """What cannot be left out: of a training step, or of drawing all tokens of a call after the first.

    Attributes:
      documents: rows, pairs or completions.
      tokens: that run through the model; for DPO each prompt once per copy.
      flops: operations.
      moved: bytes read; 0 for training, where they are not what takes the time.
    """

    documents: int
    tokens: int
    flops: float
    moved: float


def counts(shape: str, task: str, work: gpu_cases.Work, *, shared: bool = True) -> Counted:
    """Counts a step, or a call, from the model and the rows; `shared`: a prompt runs once for both completions."""
    model = from_hf(gpu_cases.SHAPES[shape])
    if task == "decode":
        tables = model.vocab_size * model.embed_dim * (not model.tie_embeddings)
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * BYTES
        # The token drawn as number i, from 1, is read with the i tokens of the completion so far and the prompt.
        seen = work.slots * sum(work.prompt + i for i in range(1, work.new))
        steps = work.new - 1
        moved = steps * (count_params(model) - tables) * BYTES + seen * per_token
        tokens = work.slots * steps
        return Counted(work.slots, tokens, forward_flops(model, tokens, seen, tokens), moved)
    if task == "sft":
        # The last token of a document is only a target.
        read = predicted = work.length - 1
        attended = _causal(read)
    else:
        prompt, completion, _ = gpu_cases.pair_sizes(work).values()
        copies, predicted = 1 if shared else 2, 2 * completion
        read = copies * prompt + 2 * (completion - 1)
        attended = copies * _causal(prompt) + 2 * ((completion - 1) * prompt + _causal(completion - 1))
    flops = PASSES[task] * forward_flops(model, read, attended, predicted)
    return Counted(work.documents, work.documents * read, work.documents * flops, 0.0)


def _causal(tokens: int) -> int:
    """Pairs of a token and a key not later than it."""
    return tokens * (tokens + 1) // 2


def figures(task: str, counted: Counted, measured: dict[str, Any], peaks: dict[str, Any]) -> dict[str, float]:
    """Rates of one measurement; those that need a peak are absent where the device is unknown."""
    seconds = statistics.median(measured["seconds"])
    if task == "decode":
        seconds -= statistics.median(measured["first_token_seconds"])
    found = {
        "seconds": seconds,
        "documents_per_second": counted.documents / seconds,
        "tokens_per_second": counted.tokens / seconds,
        "flops_per_second": counted.flops / seconds,
    }
    if task != "decode" and peaks.get("peak_flops"):
        found["mfu"] = found["flops_per_second"] / peaks["peak_flops"]
    if task == "decode" and peaks.get("peak_bandwidth"):
        found["of_bandwidth_floor"] = counted.moved / peaks["peak_bandwidth"] / seconds
    if "peak_bytes" in measured:
        found["peak_gib"] = measured["peak_bytes"] / 2**30
    return found


COLUMNS = {
    "step s": ("seconds", "{:.4g}"),
    "documents/s": ("documents_per_second", "{:.4g}"),
    "tokens/s": ("tokens_per_second", "{:.0f}"),
    "TFLOP/s": ("flops_per_second", "{:.3g}"),
    "MFU": ("mfu", "{:.1%}"),
    "of the bandwidth floor": ("of_bandwidth_floor", "{:.1%}"),
    "peak GiB": ("peak_gib", "{:.1f}"),
}


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [record["shape"], record["task"], record["trainer"]]
    if "failed" in record:
        return f"| {' | '.join(cells)} | failed: {record['failed']} |"
    found = dict(record["figures"]) | {"flops_per_second": record["figures"]["flops_per_second"] / 1e12}
    cells += [form.format(found[name]) if name in found else "" for name, form in COLUMNS.values()]
    return f"| {' | '.join(cells)} |"


def header() -> str:
    """The table's head."""
    names = ["shape", "task", "trainer", *COLUMNS]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def measure(python: str, trainer: str, shape: str, task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one measurement in a fresh process; a failure is recorded with the end of its output."""
    command = [python, str(HERE / f"gpu_{trainer}.py"), "--shape", shape, "--task", task]
    command += ["--work", args.work, "--steps", str(args.steps)]
    environment = os.environ | (OURS if trainer == "ours" else {})
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=environment)
    if done.returncode:
        return {"failed": ((done.stderr or done.stdout).strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=gpu_cases.SHAPES, default=["0.5b", "1.5b", "8b"])
    parser.add_argument("--tasks", nargs="+", choices=gpu_cases.TASKS, default=list(gpu_cases.TASKS))
    parser.add_argument("--trl-python", default=str(ROOT / ".venv-trl/bin/python"), help="of TRL's environment")
    parser.add_argument("--work", default="{}", help='JSON: other sizes than usual, for example {"documents": 8}')
    parser.add_argument("--steps", type=int, default=10, help="steps of a round; of decode calls, a third of them")
    parser.add_argument("--results", type=Path, help="a file that gets a JSON line for each measurement")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measures, prints the table as it grows, and returns 1 if something failed."""
    args, failed, device = parse(argv), False, ""
    trainers = {"ours": sys.executable} | ({"trl": args.trl_python} if shutil.which(args.trl_python) else {})
    if "trl" not in trainers:
        print(f"TRL is left out: there is no {args.trl_python} (`make bench-envs` makes it).")
    for shape in args.shapes:
        for task in args.tasks:
            peaks: dict[str, Any] = {}
            for trainer, python in trainers.items():
                measured = measure(python, trainer, shape, task, args)
                record = {"shape": shape, "task": task, "trainer": trainer, **measured}
                if "failed" not in measured:
                    peaks = peaks or measured
                    counted = counts(shape, task, gpu_cases.chosen(shape, args.work), shared=trainer == "ours")
                    record["figures"] = figures(task, counted, measured, peaks)
                    if not device:
                        device = measured["device"]
                        print(f"{device}, {measured['versions']}\n\n{header()}", flush=True)
                failed |= "failed" in measured
                print(line(record), flush=True)
                if args.results:
                    with args.results.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
