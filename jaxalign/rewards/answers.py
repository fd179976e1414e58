"""Rewards for a final answer that can be checked: equal text, equal number, equal mathematics, a task's own rule."""

from __future__ import annotations

import importlib.util
import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from jaxalign.extras import install
from jaxalign.rewards.contract import Reward, Scores, text_of
from jaxalign.rewards.workers import TaskKilled, Workers

_log = logging.getLogger("jaxalign")
# Digits, in groups of three or plain; a minus after a digit or a letter is none, as in 5-3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212])?[$€£]?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
_ANSWER_IS = re.compile(r"\banswer(?: is\b|\s*[:=])", re.IGNORECASE)
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def answer_match(
    *, column: str = "answer", extract: str = "all", ignore_case: bool = True, ignore_punctuation: bool = True
) -> Reward:
    """1 where the answer equals the reference, or one of several, else 0.

    Both are brought to Unicode's NFKC form and their white space is made single spaces.

    Args:
      column: the references: a text, a number, or a list of those that are right. None gives no score.
      extract: what of a completion is its answer, a key in `EXTRACTORS`.
      ignore_case: small and capital letters are equal.
      ignore_punctuation: marks around the answer, as in "(Paris).", do not count.
    """
    if extract not in EXTRACTORS:
        raise ValueError(f"extract={extract!r} is unknown; known: {', '.join(EXTRACTORS)}")
    find = EXTRACTORS[extract]

    def normal(text: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", text).split())
        text = text.strip(" .,;:!?\"'`()[]{}*_") if ignore_punctuation else text
        return text.casefold() if ignore_case else text

    def score(reference: Any, completion: str) -> float | Exception | None:
        if reference is None:
            return None
        right = {normal(str(one)) for one in (reference if isinstance(reference, list | tuple) else [reference])}
        if not right - {""}:
            return ValueError(f"the reference in the column {column!r} is empty")
        answer = find(completion)
        return float(answer is not None and normal(answer) in right)

    def reward(prompts, completions, **columns) -> Scores:
        return [score(*pair) for pair in zip(columns[column], map(text_of, completions), strict=True)]

    return Reward("answer_match", reward, reads=(column,))


def gsm8k(*, column: str = "answer", strict: bool = False) -> Reward:
    """1 where the completion's final number equals the reference's, else 0.

    Args:
      column: the references: worked solutions with the number after `####`, or the number itself (the last one in it).
      strict: only a number after `####` counts. Otherwise the first of these that the completion has, each time the
        last one in it: the number after `####`, in `\\boxed{}`, after "answer is" or "answer:", any number.
    """

    def score(reference: Any, completion: str) -> float | Exception | None:
        if reference is None:
            return None
        right = final_number(str(reference))
        if right is None:
            return ValueError(f"the reference {str(reference)[-40:]!r} in the column {column!r} has no number")
        return float(final_number(completion, strict=strict) == right)

    def reward(prompts, completions, **columns) -> Scores:
        return [score(*pair) for pair in zip(columns[column], map(text_of, completions), strict=True)]

    return Reward("gsm8k", reward, reads=(column,))


def math_equivalence(*, column: str = "answer", seconds: float = 5.0, unreadable: str = "raise") -> Reward:
    """1 where math-verify finds the completion's answer equal to the reference, else 0.

    Runs in worker processes; what cannot be compared within the time is not right, and is logged.

    Args:
      column: the references: LaTeX or an expression, with or without dollar signs or `\\boxed{}`.
      seconds: for one comparison.
      unreadable: what a reference means that math-verify cannot read: "raise" an error, or "none", no score.

    Raises:
      ValueError: math-verify is not installed.
    """
    need("math_verify", "math_equivalence")
    if unreadable not in ("raise", "none"):
        raise ValueError(f"unreadable={unreadable!r} is unknown; known: raise, none")
    workers = Workers("math", {}, seconds=seconds)

    def score(reference: Any, value: Any, of_reference: Any) -> float | Exception | None:
        if isinstance(of_reference, Exception):
            return ValueError(f"the reference {str(reference)[:40]!r} in the column {column!r} {of_reference}")
        if isinstance(value, TaskKilled):
            _log.warning("math_equivalence: an answer that %s counts as wrong", value)
            return 0.0
        if value is None and unreadable == "raise":
            return ValueError(
                f"math-verify cannot read the reference {str(reference)[:40]!r} in the column {column!r}; "
                "unreadable=none gives such samples no score"
            )
        return value if value is None or isinstance(value, Exception) else float(value)

    def reward(prompts, completions, **columns) -> Scores:
        references = ["" if one is None else str(one) for one in columns[column]]
        values = workers.map(list(zip(references, map(text_of, completions), strict=True)))
        # Was it the completion that took too long, or the reference, which then does so with any answer?
        killed = [i for i, value in enumerate(values) if isinstance(value, TaskKilled)]
        of_reference = dict(zip(killed, workers.map([(references[i], "$0$") for i in killed]), strict=True))
        return [
            None if reference is None else score(reference, value, of_reference.get(i))
            for i, (reference, value) in enumerate(zip(columns[column], values, strict=True))
        ]

    # What is ended is asked about a second time.
    return Reward("math_equivalence", reward, reads=(column,), longest=lambda n: 2 * workers.longest(n))


def reasoning_gym(*, column: str = "entry", extract: str = "tag", seconds: float = 10.0) -> Reward:
    """The score, 0 to 1, that a task of reasoning-gym gives the completion's answer.

    Args:
      column: the entries as the library makes them: `question`, `answer` and `metadata` with `source_dataset`; or the
        same as JSON text.
      extract: what of a completion is its answer, a key in `EXTRACTORS`; a completion without one scores what the task
        gives to no answer.
      seconds: for one answer.

    Raises:
      ValueError: reasoning-gym is not installed.
    """
    need("reasoning_gym", "reasoning_gym")
    if extract not in EXTRACTORS:
        raise ValueError(f"extract={extract!r} is unknown; known: {', '.join(EXTRACTORS)}")
    workers = Workers("reasoning_gym", {}, seconds=seconds)

    def reward(prompts, completions, **columns) -> Scores:
        answers = [EXTRACTORS[extract](text_of(completion)) for completion in completions]
        return workers.map(list(zip(columns[column], answers, strict=True)))

    return Reward("reasoning_gym", reward, reads=(column,), longest=workers.longest)


def final_number(text: str, *, strict: bool = False) -> Decimal | None:
    """The number that a worked solution ends with, as `gsm8k` finds it; None without one."""
    _, marker, after = text.rpartition("####")
    if marker or strict:
        return _first_number(after) if marker else None
    boxed = last_boxed(text)
    if boxed is not None:
        return _first_number(boxed)
    announced = [match.end() for match in _ANSWER_IS.finditer(text)]
    number = _first_number(text[announced[-1] :]) if announced else None
    if number is not None:
        return number
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{}`, its inner braces balanced; None without a complete one."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]
    return None


def need(module: str, reward: str) -> None:
    """Raises ValueError, naming the extra, when an optional package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"the reward {reward!r} needs {module.replace('_', '-')}: {install('rlvr')}")


def _first_number(text: str) -> Decimal | None:
    match = _NUMBER.search(text)
    return _decimal(match.group()) if match else None


def _decimal(number: str) -> Decimal:
    return Decimal(re.sub(r"[,$€£]", "", number.replace("\u2212", "-")))


def _tagged(text: str) -> str | None:
    found = _TAG.findall(text)
    return found[-1] if found else None


def _marked(text: str) -> str | None:
    _, marker, after = text.rpartition("####")
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    after = after if marker else text[ends[-1] :] if ends else None
    return after.strip().split("\n")[0] if after is not None else None


def _last_line(text: str) -> str | None:
    lines: Sequence[str] = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "all": lambda text: text,
    "boxed": last_boxed,
    "last_line": _last_line,
    "marker": _marked,
    "tag": _tagged,
}
"""What of a completion is its answer: all of it; in the last `\\boxed{}`; its last line; what follows the last `####`,
or else "answer is" or "answer:", on its line; in the last `<answer>` tag. None where there is none."""
