"""Peak memory and time per step of DPO on SmolLM2-135M: full fine-tuning, LoRA, and LoRA over 8 and 4 bits.

    python benchmarks/lora_memory.py [--steps 3] [--kinds full lora int8 nf4] [--remat none]

Each kind is a run of its own in a process of its own, with the data and the batches of the quickstart. Peaks are
resident memory (`ru_maxrss`), up to the last step and up to the end of the export.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct.gguf"
KINDS: dict[str, dict] = {
    "full": {},
    "lora": {"lora": {"r": 8}},
    "int8": {"lora": {"r": 8}, "model": {"quantization": "int8"}},
    "nf4": {"lora": {"r": 8}, "model": {"quantization": "nf4"}},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.steps, options.remat)))
        return
    found = {}
    for kind in options.kinds:
        command = [sys.executable, __file__, "--child", kind, "--steps", str(options.steps), "--remat", options.remat]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[kind] = json.loads(printed.splitlines()[-1])
        share = found[kind]["train_gib"] / found["full"]["train_gib"] if "full" in found else float("nan")
        numbers = "  ".join(f"{name} {value:.2f}" for name, value in found[kind].items())
        print(f"{kind:5} {numbers}  of full {share:.0%}", flush=True)


def measure(kind: str, steps: int, remat: str) -> dict[str, float]:
    """Runs one kind; GiB and seconds."""
    from jaxalign.config import parse_config
    from jaxalign.run import run

    peaks = {}

    @contextlib.contextmanager
    def make_progress(total, done, title):
        def progress(step, metrics):
            peaks["train_gib"] = peak()

        yield progress

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "name": kind,
            "runs_dir": folder,
            "method": {"name": "preference", "precompute_ref_log_probs": True},
            "data": {
                "path": str(ROOT / "data/concise/train.jsonl"),
                "split": f"train[:{16 * steps}]",
                "max_length": 256,
            },
            "train": {"batch_size": 16, "micro_batch_size": 4, "max_steps": steps},
            "log": {"logging_steps": 1},
            **KINDS[kind],
            "model": {"path": str(MODEL), "remat": remat, **KINDS[kind].get("model", {})},
        }
        result = run(parse_config(settings), make_progress=make_progress)
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    times = [line["step_time"] for line in lines if "step_time" in line]
    return {**peaks, "whole_gib": peak(), "step_s": min(times)}


def peak() -> float:
    """Most resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
