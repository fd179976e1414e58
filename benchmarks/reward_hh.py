"""Held-out accuracy of a reward model on human preferences between dialogues, with its confidence interval.

    python benchmarks/reward_hh.py hh_harmless_1600.jsonl.gz [train.seed=43 ...]

The file holds 1,600 pairs of HH-RLHF (Bai et al. 2022), `chosen` and `rejected` dialogues; it is not part of this
repository, for it has offensive text. The first 1,300 train a reward model that begins as SmolLM2-135M-Instruct, once
through; the last 300 are held out; pairs of more than 640 tokens are left out of both. Beside the accuracy stands what
the longer, and the shorter, answer would have got.
Further words are settings of the run, as `jaxalign run` takes them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import subprocess
import sys
from pathlib import Path

CONFIG = """
model: {path: models/smollm2-135m-instruct.gguf, remat: none}
data: {path: %s, eval_path: %s, format: hh, max_length: 640, on_bad: drop}
method: {name: reward}
optimizer: {learning_rate: 2.0e-5, warmup_steps: 4}
train: {batch_size: 32, micro_batch_size: 4, num_train_epochs: 1, save_steps: 100}
log: {logging_steps: 5}
"""
TRAIN, HELD_OUT = 1300, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("settings", nargs="*", help="a.b=value")
    parser.add_argument("--work", type=Path, default=Path(".cache/benchmarks/hh"))
    args = parser.parse_args()
    content = args.pairs.read_bytes()
    lines = (gzip.decompress(content) if args.pairs.suffix == ".gz" else content).decode().splitlines()
    if len(lines) < TRAIN + HELD_OUT:
        sys.exit(f"{args.pairs} holds {len(lines)} pairs; {TRAIN + HELD_OUT} are needed")
    parts = {"train": lines[:TRAIN], "held_out": lines[TRAIN : TRAIN + HELD_OUT]}
    args.work.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (args.work / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    config = args.work / "reward_hh.yaml"
    config.write_text(CONFIG.lstrip() % (args.work / "train.jsonl", args.work / "held_out.jsonl"))
    folder = args.work / "runs" / "reward_hh"
    settings = [f"runs_dir={folder.parent}", f"name={folder.name}", *args.settings]
    subprocess.run([sys.executable, "-m", "jaxalign", "run", str(config), "--fresh", *settings], check=True)

    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["eval_accuracy"] for line in logged if "eval_accuracy" in line][-1]
    # The run's own words say how many pairs were judged: those that are too long are not.
    checked = subprocess.run([sys.executable, "-m", "jaxalign", "data", "check", str(config)], capture_output=True)
    judged = int(re.findall(r"eval: (\d+) of \d+ examples", checked.stdout.decode())[0])
    longer = sum(map(longer_is_chosen, parts["held_out"])) / HELD_OUT
    low, high = wilson(accuracy, judged)
    print(f"held-out accuracy {accuracy:.1%} of {judged} pairs, 95 % confidence {low:.1%} to {high:.1%}")
    print(f"the longer answer: {longer:.1%}, the shorter: {1 - longer:.1%}")


def longer_is_chosen(line: str) -> float:
    """1 where the chosen answer has more characters than the rejected one, 0.5 where it has as many."""
    pair = json.loads(line)
    chosen, rejected = len(pair["chosen"]), len(pair["rejected"])
    return float(chosen > rejected) + 0.5 * (chosen == rejected)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of `count` trials, at 95 % by default."""
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


if __name__ == "__main__":
    main()
