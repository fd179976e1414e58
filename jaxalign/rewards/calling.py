"""Calling reward functions: side by side, within a time limit, and never taking a failure for a score."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsFloat

import numpy as np

from jaxalign.rewards.contract import Reward, RewardError, Text, text_of
from jaxalign.rewards.threads import start_thread

ON_ERROR = ("raise", "none")
_MEND = (
    "Give it more time (in a run rollout.reward_timeout, else timeout), or let what fails have no score (in a run "
    "rollout.on_reward_error: none, else on_error)"
)
_log = logging.getLogger("jaxalign")


def call_rewards(
    rewards: Sequence[Reward],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
    *,
    timeout: float = 60.0,
    on_error: str = "raise",
) -> np.ndarray:
    """Scores completions with every reward.

    Synchronous functions run in a daemon thread each, asynchronous ones together on one event loop; all overlap.

    Args:
      rewards: from `load_reward`.
      prompts: n texts or lists of messages.
      completions: n texts or lists of messages.
      columns: further columns of the data set by name, n values each; `completion_ids` (token ids) among them.
      timeout: seconds for the whole batch; a reward that ends its own work in time has as many as that may take
        (`Reward.longest`).
      on_error: "raise", or "none": what fails gives no score and a warning in the log. When a function raises, it is
        called again one sample at a time, to keep the other samples' scores (or to name the sample).

    Returns:
      float64 `[n, rewards]`; NaN where a function returned None.

    Raises:
      RewardError: a function raised, did not return in time, or returned another number of scores, NaN, an infinity or
        what is no number; names the function and the sample.
      ValueError: columns are missing or of different lengths, or `on_error` is unknown.
    """
    return start_rewards(rewards, prompts, completions, columns, timeout=timeout, on_error=on_error).result()


def start_rewards(
    rewards: Sequence[Reward],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
    *,
    timeout: float = 60.0,
    on_error: str = "raise",
) -> Future[np.ndarray]:
    """As `call_rewards`, but returns at once, so that scoring overlaps with other work; errors come with the result."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r} is unknown; known: {', '.join(ON_ERROR)}")
    given = {"prompts": list(prompts), "completions": list(completions), **{k: list(v) for k, v in columns.items()}}
    n = len(given["completions"])
    for name, values in given.items():
        if len(values) != n:
            raise ValueError(f"{name!r} has {len(values)} values for {n} completions")
    for reward in rewards:
        reward.check_columns(columns)
    future, _ = start_thread(partial(_score, rewards, given, n, timeout, on_error == "none"), "jaxalign-rewards")
    return future


def _score(
    rewards: Sequence[Reward], given: Mapping[str, list[Any]], n: int, timeout: float, keep_going: bool
) -> np.ndarray:
    scores = np.full((n, len(rewards)), np.nan)
    if not n or not rewards:
        return scores
    start = time.monotonic()
    calls = _start(rewards, given, n, keep_going, timeout)
    texts = [text_of(completion) for completion in given["completions"]]
    for number, (reward, (future, thread)) in enumerate(zip(rewards, calls, strict=True)):
        limit = timeout if reward.longest is None else max(timeout, reward.longest(n))
        wait([future], max(0.0, start + limit - time.monotonic()))
        if future.done():
            checked = _check(reward.name, future.result(), texts)
        else:
            told = f"reward {reward.name!r} has not returned after {limit:g} s for {n} samples, the first of which "
            checked = [RewardError(f"{told}starts {_start_of(texts[0])}{_where(thread)}. {_MEND}")] * n
        failures = [score for score in checked if isinstance(score, Exception)]
        if failures and not keep_going:
            raise failures[0]
        if failures:
            _log.warning("%d of %d scores are missing: %s", len(failures), n, failures[0])
        scores[:, number] = [np.nan if score is None or isinstance(score, Exception) else score for score in checked]
    return scores


_Call = tuple[Future[Any], threading.Thread]


def _start(
    rewards: Sequence[Reward], given: Mapping[str, list[Any]], n: int, keep_going: bool, timeout: float
) -> list[_Call]:
    """Starts every reward: the asynchronous ones in one thread, each other one in its own."""
    waiting: list[tuple[Reward, Future[Any]]] = [(reward, Future()) for reward in rewards if reward.is_async]

    async def together() -> None:
        async def one(reward: Reward, future: Future[Any]) -> None:
            future.set_result(await _call_async(reward, given, n, keep_going))

        _, late = await asyncio.wait([asyncio.ensure_future(one(*item)) for item in waiting], timeout=timeout)
        for task in late:
            task.cancel()

    shared = start_thread(lambda: asyncio.run(together()), "jaxalign-async-rewards")[1] if waiting else None
    futures = iter([future for _, future in waiting])
    return [
        (next(futures), shared)
        if shared is not None and reward.is_async
        else start_thread(partial(_call, reward, given, n, keep_going), f"jaxalign-reward-{reward.name}")
        for reward in rewards
    ]


@dataclass(frozen=True)
class _Raised:
    """What a call raised, in the place of what it returns."""

    error: BaseException


def _call(reward: Reward, given: Mapping[str, list[Any]], n: int, keep_going: bool) -> Any:
    attempts = _attempts(given, n, keep_going)
    arguments = next(attempts)
    while True:
        try:
            arguments = attempts.send(_attempt(reward, arguments))
        except StopIteration as end:
            return end.value


async def _call_async(reward: Reward, given: Mapping[str, list[Any]], n: int, keep_going: bool) -> Any:
    attempts = _attempts(given, n, keep_going)
    arguments = next(attempts)
    while True:
        try:
            arguments = attempts.send(await _attempt_async(reward, arguments))
        except StopIteration as end:
            return end.value


def _attempts(given: Mapping[str, list[Any]], n: int, keep_going: bool) -> Generator[dict[str, list[Any]], Any, Any]:
    """Yields the arguments of the calls to make and takes their results: the batch, then, if it raises, each sample."""
    result = yield dict(given)
    if not isinstance(result, _Raised):
        return result
    singles: list[Any] = []
    for i in range(n):
        singles.append((yield {name: values[i : i + 1] for name, values in given.items()}))
        if isinstance(singles[-1], _Raised) and not keep_going:
            break
    if not any(isinstance(single, _Raised) for single in singles):
        return result  # the samples together are what it cannot bear
    scores: list[Any] = [None] * n
    for i, single in enumerate(singles):
        values = _listed(single)
        scores[i] = values[0] if values and len(values) == 1 else single
    return scores


def _attempt(reward: Reward, given: Mapping[str, list[Any]]) -> Any:
    try:
        return reward(**given)
    except BaseException as error:  # sys.exit in a reward must not pass for an end
        return _Raised(error)


async def _attempt_async(reward: Reward, given: Mapping[str, list[Any]]) -> Any:
    try:
        return await reward(**given)
    except Exception as error:
        return _Raised(error)


def _check(name: str, returned: Any, texts: Sequence[str]) -> list[float | RewardError | None]:
    """One score, None or error per sample from what a function returned."""
    if isinstance(returned, _Raised):
        error = RewardError(
            f"reward {name!r} raised {_describe(returned.error)} on a batch of {len(texts)}, the first of which starts "
            f"{_start_of(texts[0])}, but on no sample alone"
        )
        error.__cause__ = returned.error
        return [error] * len(texts)
    values = _listed(returned)
    if values is None or len(values) != len(texts):
        what = f"a {type(returned).__name__}" if values is None else f"{len(values)} scores"
        return [
            RewardError(
                f"reward {name!r} returned {what} for {len(texts)} samples, the first of which starts "
                f"{_start_of(texts[0])}; it must return a list with a number or None for each"
            )
        ] * len(texts)
    return [_score_of(name, i, value, texts[i]) for i, value in enumerate(values)]


def _score_of(name: str, i: int, value: Any, text: str) -> float | RewardError | None:
    cause = value.error if isinstance(value, _Raised) else value if isinstance(value, Exception) else None
    if value is None:
        return None
    if cause is not None:
        problem = f"raised {_describe(cause)}" if isinstance(value, _Raised) else str(cause)
    else:
        number = _number(value)
        if number is not None and math.isfinite(number):
            return number
        problem = f"returned {str(value)[:40]!r} ({type(value).__name__}), which is no finite number and not None"
    error = RewardError(f"reward {name!r}, sample {i} (starts {_start_of(text)}): {problem}")
    error.__cause__ = cause
    return error


def _number(value: Any) -> float | None:
    """A scalar of any library as a float; None for what is no real number."""
    if isinstance(value, np.complexfloating) or np.ndim(value):
        return None
    try:
        return float(value) if isinstance(value, SupportsFloat) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _listed(returned: Any) -> list[Any] | None:
    """What a function returned as a list, or None where it is no sequence of scores."""
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        return None
    try:
        return list(returned)
    except TypeError:  # an array without dimensions
        return None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _start_of(text: str) -> str:
    return repr(text[:60] + ("..." if len(text) > 60 else ""))


def _where(thread: threading.Thread) -> str:
    """The line that a thread is at."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return ""
    at = traceback.extract_stack(frame)[-1]
    return f"; it is at {at.filename}:{at.lineno} in {at.name}"
