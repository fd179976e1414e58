"""Build the concise-answers data set from written questions and answers and a model's own answers.

    python data/concise/make.py

Reads ``questions.jsonl`` and one or more files of answers as ``jaxalign sample`` writes them (``prompt`` and
``completion``), and writes ``train.jsonl`` and ``held_out.jsonl``: preference pairs in TRL's conversational columns.
The result is a pure function of its inputs: no clock, no random numbers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jaxalign.evaluation import readable
from jaxalign.evaluation.rules import concise, mentions, sentence_ends, violations

FOLDER = Path(__file__).parent
ANSWERS = ("answers_greedy.jsonl", "answers_sampled.jsonl")
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def dumps(rows: list[Row]) -> str:
    """Rows as JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def asked(row: Row) -> str:
    """The question of a row: the last message of its prompt."""
    return row["prompt"][-1]["content"]


def answers_by_question(rows: list[Row]) -> dict[str, str]:
    """Completion of each question, with plain quotes and dashes."""
    return {asked(row): readable(row["completion"]).strip().translate(PLAIN) for row in rows}


def cut(text: str) -> str:
    """The text up to its last sentence or line end, so that a token limit leaves no half sentence."""
    end = max([*sentence_ends(text), text.rfind("\n"), 0])
    return text[:end].strip() or text


def rejected(candidates: list[str]) -> str | None:
    """The first answer that rambles (several sentences, or more than 25 words) and is plain ASCII, cut; else None."""
    for candidate in map(cut, candidates):
        if candidate.isascii() and {"sentences", "too long"} & set(violations(candidate)):
            return candidate
    return None


def pairs(questions: list[Row], answers: list[dict[str, str]]) -> list[Row]:
    """Preference pairs; question i takes its rejected answer from file i modulo their number, or from the next ones.

    Raises:
        ValueError: a file of answers lacks a question.
    """
    rows = []
    for number, question in enumerate(questions):
        prompt = asked(question)
        missing = [index for index, file in enumerate(answers) if prompt not in file]
        if missing:
            raise ValueError(f"answers file {missing[0] + 1} has no answer to {prompt!r}: sample it again")
        start = number % len(answers)
        answer = rejected([file[prompt] for file in answers[start:] + answers[:start]])
        if answer is None:
            continue
        row = {
            "prompt": question["prompt"],
            "chosen": [{"role": "assistant", "content": question["answer"]}],
            "rejected": [{"role": "assistant", "content": answer}],
        }
        rows.append(row | ({"keywords": question["keywords"]} if "keywords" in question else {}))
    return rows


def build(questions: list[Row], answers: list[dict[str, str]]) -> dict[str, str]:
    """Contents of the two output files by name."""
    return {
        f"{split}.jsonl": dumps(pairs([question for question in questions if question["split"] == split], answers))
        for split in ("train", "held_out")
    }


def main() -> None:
    """Build the files, and say how the answers do on the held-out questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, default=FOLDER / "questions.jsonl")
    parser.add_argument("--answers", type=Path, nargs="+", default=[FOLDER / name for name in ANSWERS])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the two files")
    arguments = parser.parse_args()
    questions = read(arguments.questions)
    answers = [answers_by_question(read(path)) for path in arguments.answers]
    for name, content in build(questions, answers).items():
        (arguments.output / name).write_text(content, encoding="utf-8")
        print(f"{name}: {content.count(chr(10))} rows")
    held_out = [question for question in questions if question["split"] == "held_out"]
    for path, file in zip(arguments.answers, answers, strict=True):
        right = sum(mentions(file[asked(question)], question["keywords"]) for question in held_out)
        short = sum(concise(file[asked(question)]) for question in held_out)
        print(f"{path.name}, held out: {short} of {len(held_out)} concise, {right} mention their keywords")


if __name__ == "__main__":
    main()
