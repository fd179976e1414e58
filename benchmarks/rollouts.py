"""What sampling and GRPO have in common for every library: prompts as words, the ends, the reward, the report.

Needs only numpy, so that it runs unchanged in each library's own environment.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import numpy as np


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line that every library's script shares; `--batch-size` are the prompts of a step."""
    parser = cases.arguments(description, ("sample", "sample-ragged", "grpo", "ppo"))
    parser.add_argument("--prompts", type=int, default=16, help="sampling: prompts per call")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--generations", type=int, default=8, help="grpo: completions per prompt")
    parser.add_argument("--epochs", type=int, default=4, help="ppo: passes over a rollout")
    parser.add_argument("--ending-share", type=float, default=0.04, help="sample-ragged: share of tokens that end")
    return parser


def read_prompts(path: Path, count: int) -> list[list[int]]:
    """The prompts of the first `count` pairs.

    Raises:
      ValueError: The file is too short.
    """
    return [pair.prompt_ids for (pair,) in cases.read_batches(path, 1, count)]


def describe(model: Path) -> dict:
    """The config.json of a model folder."""
    return json.loads((model / "config.json").read_text())


def pad_id(model: Path) -> int:
    """The folder's padding id, its EOS id if it has none."""
    config = describe(model)
    return config["eos_token_id"] if config.get("pad_token_id") is None else config["pad_token_id"]


def ending_ids(args: argparse.Namespace) -> list[int]:
    """Tokens that end a completion: evenly spread over the vocabulary in `sample-ragged`, none elsewhere.

    No library has a length per prompt, so lengths are made ragged by ends that are drawn by chance.
    """
    if args.task != "sample-ragged":
        return []
    gap = round(1 / args.ending_share)
    return list(range(gap // 2, describe(args.model)["vocab_size"], gap))


def share_of_even(completions: Sequence[Sequence[int]]) -> list[float]:
    """The reward: which share of a completion's tokens have an even id."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completions]


def to_text(ids: Sequence[int]) -> str:
    """Token ids as words, for libraries that take prompts as text."""
    return " ".join(f"<{token}>" for token in ids)


def from_text(text: str) -> list[int]:
    """The token ids of `to_text`."""
    return [int(word[1:-1]) for word in text.split()]


def read_bandwidth(size: int, threads: int) -> float:
    """Bytes a second at which `threads` cores read `size` bytes over and over, the best of ten.

    What fits into a cache is read from there, as a small model's weights are.
    """
    parts = np.array_split(np.ones(max(size // 4, threads), np.float32), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def time_calls(args: argparse.Namespace, call: Callable[[int], Sequence[int]]) -> tuple[list[float], list[list[int]]]:
    """Runs the warm-up and the measured calls.

    Args:
      args: the command line.
      call: seed -> lengths of the completions.

    Returns:
      Wall seconds and lengths of each call.
    """
    seconds, lengths = [], []
    for seed in range(args.warmup + args.steps):
        start = time.perf_counter()
        drawn = call(seed)
        seconds.append(time.perf_counter() - start)
        lengths.append([int(length) for length in drawn])
    return seconds, lengths


def report(
    args: argparse.Namespace,
    *,
    trainer: str,
    versions: dict[str, str],
    settings: dict[str, object],
    seconds: list[float],
    lengths: list[list[int]],
    extra: dict[str, object] | None = None,
) -> None:
    """Prints one JSON line: settings, wall seconds and completion lengths of each call or step, peak memory.

    `seconds` and `lengths` have one entry per call, warm-up included.
    """
    record = {
        "trainer": trainer,
        "versions": versions,
        "task": args.task,
        "model": args.model.name,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "warmup": args.warmup,
        "settings": settings,
        "seconds": seconds,
        "lengths": lengths,
        "compile_seconds": cases.compile_seconds(seconds, args.warmup),
        "peak_memory_mib": cases.peak_memory_mib(),
    }
    print(json.dumps(record | (extra or {})))
