"""The reward for code: the completion's last Python block against unit tests, in the sandbox."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from typing import Any

from jaxalign.rewards.contract import Reward, Scores, text_of
from jaxalign.rewards.sandbox import Limits, Outcome, Program, SandboxError, describe_sandbox, longest_run, run_programs
from jaxalign.rewards.threads import rounds

_FENCE = re.compile(r"[ \t]*```[ \t]*([\w+-]*)")
_PYTHON = ("", "py", "python", "python3")
_SCORES = ("share", "all")


def python_tests(
    *,
    column: str = "tests",
    setup_column: str | None = None,
    entry_point_column: str | None = None,
    score: str = "share",
    seconds: float = 10.0,
    memory_mb: int = 512,
    processes: int = 16,
    site_packages: bool = False,
    workers: int | None = None,
    strict: bool = False,
) -> Reward:
    """What the completion's last ```` ```python ```` block makes of unit tests; 0 without such a block.

    The code runs in the sandbox: see docs/rewards.md for what that protects from.

    Args:
      column: the tests: a list of statements (`assert add(1, 2) == 3`), each one test, or the source of a test file, in
        which each function `test...()` is one test, a function `check(candidate)` is called with the entry point, and
        without either the whole source is one test. A list may come as JSON text. None gives no score.
      setup_column: sources that run between the code and its tests, such as imports.
      entry_point_column: names of the functions that `check` is called with.
      score: "share" of the tests that pass, or 1 when "all" do and else 0.
      seconds: wall-clock time for one completion.
      memory_mb: memory for one completion.
      processes: processes and threads for one completion.
      site_packages: whether the code may import installed packages, not only the standard library.
      workers: completions that run at once; default: as many as there are cores.
      strict: raise where the kernel does not keep the code from the network, from this user's files or from leaving
        processes behind.
    """
    if score not in _SCORES:
        raise ValueError(f"score={score!r} is unknown; known: {', '.join(_SCORES)}")
    limits = Limits(seconds=seconds, cpu_seconds=int(seconds) + 1, memory_mb=memory_mb, processes=processes)
    if strict:
        _require_isolation()

    def judge(outcome: Outcome | SandboxError) -> float | Exception:
        if isinstance(outcome, SandboxError):
            return outcome
        share = sum(outcome.passed) / len(outcome.passed)
        return share if score == "share" else float(share == 1)

    def reward(prompts, completions, **columns) -> Scores:
        n = len(completions)
        setups = columns[setup_column] if setup_column else [None] * n
        entry_points = columns[entry_point_column] if entry_point_column else [None] * n
        scores: list[float | Exception | None] = [0.0] * n
        programs: dict[int, Program] = {}
        for i, completion in enumerate(completions):
            code = last_python_block(text_of(completion))
            try:
                setup, tests = split_tests(columns[column][i], entry_points[i])
            except ValueError as error:
                scores[i] = error
                continue
            if columns[column][i] is None:
                scores[i] = None
            elif code is not None:
                programs[i] = Program(code, tests, f"{setups[i] or ''}\n{setup}")
        outcomes = run_programs(list(programs.values()), limits, site_packages=site_packages, workers=workers)
        for i, outcome in zip(programs, outcomes, strict=True):
            scores[i] = judge(outcome)
        return scores

    def longest(completions: int) -> float:
        return rounds(completions, workers) * longest_run(limits)

    reads = tuple(filter(None, (column, setup_column, entry_point_column)))
    return Reward("python_tests", reward, reads=reads, longest=longest)


def last_python_block(text: str) -> str | None:
    """The last complete fenced block marked python, py or not at all; None without one."""
    last, language, block = None, "", None
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if block is None:
            language, block = (fence[1].lower(), []) if fence else ("", None)
        elif line.strip() == "```":
            last, block = ("\n".join([*block, ""]) if language in _PYTHON else last), None
        elif fence and fence[1]:  # the block before was never closed
            language, block = fence[1].lower(), []
        else:
            block.append(line)
    return last


def split_tests(tests: Any, entry_point: str | None = None) -> tuple[str, list[str]]:
    """A set-up and single tests from a value of the tests' column; raises ValueError for one without a test."""
    if tests is None:
        return "", []
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            tests = json.loads(tests)
    if not isinstance(tests, str):
        listed = [str(test) for test in tests]
        if not listed:
            raise ValueError("there are no tests for this sample")
        return "", listed
    try:
        tree = ast.parse(tests)
    except SyntaxError as error:
        raise ValueError(f"the tests for this sample are no Python: {error}") from error
    if not tree.body:
        raise ValueError("there are no tests for this sample")
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if "check" in functions and entry_point:
        return tests, [f"check({entry_point})"]
    named = [f"{name}()" for name in functions if name.startswith("test")]
    return (tests, named) if named else ("", [tests])


def _require_isolation() -> None:
    active = describe_sandbox()
    missing = [
        *(["files"] if not active["files"] else []),
        *(["network"] if active["network"] != "none" else []),
        *(["processes"] if active["processes"] != "namespace" else []),
    ]
    if missing:
        raise SandboxError(
            f"strict=true, but this system does not isolate tested code's {', '.join(missing)}: {active}"
        )
