"""Writes train.jsonl and held_out.jsonl: sums, differences and products of small numbers, each question once."""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELD_OUT = 80
PHRASES = ("What is {}?", "Calculate {}.", "How much is {}?", "Compute {}.")


def questions() -> list[tuple[str, int]]:
    """Every question with its answer: a + b and a - b up to 15 without negative answers, a * b from 2 to 12."""
    sums = [(f"{a} + {b}", a + b) for a in range(1, 16) for b in range(1, 16)]
    differences = [(f"{a} - {b}", a - b) for a in range(2, 16) for b in range(1, a + 1)]
    products = [(f"{a} * {b}", a * b) for a in range(2, 13) for b in range(2, 13)]
    mixed = [*sums, *differences, *products]
    random.Random(7).shuffle(mixed)
    return mixed


def main() -> None:
    """Writes both files; no question is in both."""
    rng = random.Random(11)
    rows = [
        {"prompt": [{"role": "user", "content": rng.choice(PHRASES).format(text)}], "answer": str(answer)}
        for text, answer in questions()
    ]
    for name, part in (("held_out", rows[:HELD_OUT]), ("train", rows[HELD_OUT:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (HERE / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
