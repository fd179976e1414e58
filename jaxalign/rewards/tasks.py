"""What runs in worker processes, because it may take for ever and cannot be interrupted in a thread.

A worker (see `workers`) is a process of its own with the packages of this one. It reads and writes lines of JSON, and
the kernel ends it when a task takes too long.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

Task = Callable[..., Any]


def regex(*, pattern: str, flags: str, mode: str) -> Task:
    """Whether a text matches: `mode` is search, match or fullmatch."""
    matches = getattr(re.compile(pattern, combine_flags(flags)), mode)
    return lambda text: matches(text) is not None


def combine_flags(flags: str) -> int:
    """Letters (i, m, s, x, a) as flags of `re`; raises ValueError for another letter."""
    unknown = set(flags) - set("imsxa")
    if unknown:
        raise ValueError(f"flags={flags!r}: {sorted(unknown)[0]!r} is unknown; known letters: i, m, s, x, a")
    return sum(re.RegexFlag[letter.upper()] for letter in flags)


def check_schema(schema: dict[str, Any]) -> None:
    """Raises ValueError for what is no JSON schema."""
    jsonschema = importlib.import_module("jsonschema")
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"schema is no JSON schema: {error.message}") from error


def schema(*, schema: dict[str, Any]) -> Task:
    """Whether a JSON value satisfies a JSON schema."""
    return importlib.import_module("jsonschema").validators.validator_for(schema)(schema).is_valid


def math() -> Task:
    """Whether a completion's answer equals a reference; None where the reference cannot be read."""
    math_verify = importlib.import_module("math_verify")
    # The library's own time limits are signals that it handles in Python, which a C function does not let through.
    configs = (math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig())

    def read(text: str) -> list[Any]:
        return math_verify.parse(text, extraction_config=configs, parsing_timeout=None)

    def equal(reference: str, completion: str) -> bool | None:
        marked = any(mark in reference for mark in ("$", "\\boxed", "\\(", "\\["))
        gold = read(reference) if marked else read(f"${reference}$") or read(reference)
        return math_verify.verify(gold, read(completion), timeout_seconds=None) if gold else None

    return equal


def reasoning_gym() -> Task:
    """The score that a task of reasoning-gym gives an answer."""
    get_score = importlib.import_module("reasoning_gym").get_score_answer_fn

    def score(entry: dict[str, Any] | str, answer: str | None) -> float:
        read = json.loads(entry) if isinstance(entry, str) else entry
        name = read["metadata"]["source_dataset"]
        return float(get_score(name)(answer, read))

    return score


TASKS: dict[str, Callable[..., Task]] = {
    "math": math,
    "reasoning_gym": reasoning_gym,
    "regex": regex,
    "schema": schema,
}


def main() -> None:
    """Serves one kind of task: a line of settings, then for each line of arguments a line with the value or error."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    settings = json.loads(sys.stdin.readline())
    with contextlib.suppress(OSError, ValueError):
        size = settings["memory_mb"] * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    task = _attempt(lambda: TASKS[settings["task"]](**settings["options"]))
    _write(reply, {"error": task.get("error")})
    for line in sys.stdin:
        # Not handled: the default is the end of this process, even inside a C function.
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
        result = _attempt(lambda line=line: task["value"](*json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(reply, result)


def _attempt(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": function()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _write(file: Any, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()
