"""Writes thumbs, rankings and judged steps about small sums, each as a training and a held-out file.

A thumb is up where an answer is right. A ranking has three answers: right, wrong by one or two, and no number at all. A
sum of three or four numbers is worked out step by step; from the first wrong step on, every step is wrong.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = {"train": 160, "held_out": 40}
UNHELPFUL = ("I cannot say.", "That is a good question.", "It depends.", "Numbers are fun.")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}


def question(number: int) -> tuple[str, int]:
    """A sum or difference of its own for every number below 800, and its answer."""
    a, b = 21 + number % 40, 1 + number // 40
    sign = "+" if number % 3 else "-"
    return f"{a} {sign} {b}", OPERATIONS[sign](a, b)


def user(content: str) -> list[dict[str, str]]:
    """A user's message."""
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, str]]:
    """An assistant's message."""
    return [{"role": "assistant", "content": content}]


def missed(rng: random.Random, answer: int) -> int:
    """A number near the answer."""
    return answer + rng.choice((-2, -1, 1, 2))


def thumb(rng: random.Random, number: int) -> dict:
    """An answer with a thumb; three of five are right, and some of the wrong ones are no numbers."""
    text, answer = question(number)
    if good := rng.random() < 0.6:
        said = f"{text} = {answer}."
    else:
        said = rng.choice((f"{text} = {missed(rng, answer)}.", rng.choice(UNHELPFUL)))
    seen = 1_700_000_000 + 60 * number
    prompt = user(f"What is {text}?")
    return {"prompt": prompt, "completion": assistant(said), "thumbs": "up" if good else "down", "timestamp": seen}


def ranking(rng: random.Random, number: int) -> dict:
    """Three answers in any order, with scores."""
    text, answer = question(number)
    scored = [(2, f"{text} = {answer}."), (1, f"{text} = {missed(rng, answer)}."), (0, rng.choice(UNHELPFUL))]
    rng.shuffle(scored)
    scores, said = zip(*scored, strict=True)
    return {
        "prompt": user(f"What is {text}?"),
        "completions": [assistant(each) for each in said],
        "scores": list(scores),
    }


def steps(rng: random.Random, number: int) -> dict:
    """A sum of three or four numbers, step by step; in half of them one step goes wrong."""
    text, total = question(number)
    terms = [rng.randint(2, 9) for _ in range(rng.randint(1, 2))]
    wrong = rng.randrange(2 * (len(terms) + 1))  # beyond the last step: none is
    said, labels, so_far = [], [], f"{text}"
    for i in range(len(terms) + 1):
        if i:
            so_far, total = f"{total} + {terms[i - 1]}", total + terms[i - 1]
        if i == wrong:
            total = missed(rng, total)
        said.append(f"{so_far} = {total}.")
        labels.append(i < wrong)
    asked = " + ".join([text, *map(str, terms)])
    return {"prompt": f"What is {asked}? Step by step.\n", "completions": said, "labels": labels}


def main() -> None:
    """Writes all files; no question is in two of them that belong together."""
    for name, make in (("thumbs", thumb), ("rankings", ranking), ("steps", steps)):
        rng = random.Random(name)
        numbers = rng.sample(range(800), sum(SIZES.values()))
        for part, size in SIZES.items():
            taken, numbers = numbers[:size], numbers[size:]
            lines = "".join(json.dumps(make(rng, number)) + "\n" for number in taken)
            (HERE / f"{name}_{part}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
