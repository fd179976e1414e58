"""The rewards that come with jaxalign, by name, and those among them that look at a text alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxalign.rewards.answers import answer_match, gsm8k, math_equivalence, need, reasoning_gym
from jaxalign.rewards.contract import Reward, Scores, text_of
from jaxalign.rewards.programs import python_tests
from jaxalign.rewards.tasks import check_schema, combine_flags
from jaxalign.rewards.workers import Workers

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_MODES = ("search", "match", "fullmatch")
_SIDES = ("both", "above", "below")


def json_valid(*, schema: Mapping[str, Any] | None = None, fence: bool = True, seconds: float = 5.0) -> Reward:
    """1 where a completion is one JSON value (RFC 8259, so no NaN), and satisfies a schema if one is given, else 0.

    Args:
      schema: a JSON schema; needs jsonschema.
      fence: the value may stand in a block of three backquotes that is the whole completion.
      seconds: for comparing one value with the schema, in a worker process: its patterns may backtrack for ever.

    Raises:
      ValueError: the schema is none, or there is one and jsonschema is not installed.
    """
    workers = None
    if schema is not None:
        need("jsonschema", "json_valid")
        check_schema(dict(schema))
        workers = Workers("schema", {"schema": dict(schema)}, seconds=seconds)

    def read(text: str) -> list[Any]:
        """The value in a list, or an empty list."""
        text = text.strip()
        fenced = _FENCE.fullmatch(text) if fence else None
        try:
            return [json.loads(fenced[1] if fenced else text, parse_constant=_refuse)]
        except (ValueError, RecursionError):
            return []

    def reward(prompts, completions, **columns) -> Scores:
        values = [read(text_of(completion)) for completion in completions]
        if workers is None:
            return [float(bool(value)) for value in values]
        checked = iter(workers.map([value for value in values if value]))
        return [_as_score(next(checked)) if value else 0.0 for value in values]

    return Reward("json_valid", reward, longest=None if workers is None else workers.longest)


def regex(*, pattern: str, flags: str = "", mode: str = "search", seconds: float = 1.0) -> Reward:
    """1 where a regular expression matches a completion, else 0.

    Args:
      pattern: in the syntax of `re`.
      flags: of the letters i, m, s, x and a.
      mode: "search", "match" (from the start) or "fullmatch".
      seconds: for one completion, in a worker process; a pattern that backtracks longer is an error.
    """
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r} is unknown; known: {', '.join(_MODES)}")
    try:
        re.compile(pattern, combine_flags(flags))
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error
    workers = Workers("regex", {"pattern": pattern, "flags": flags, "mode": mode}, seconds=seconds)

    def reward(prompts, completions, **columns) -> Scores:
        return [_as_score(value) for value in workers.map([(text_of(completion),) for completion in completions])]

    return Reward("regex", reward, longest=workers.longest)


def format_tags(*, tags: Sequence[str] = ("think", "answer"), partial: bool = False, opened: bool = False) -> Reward:
    """1 where a completion is `<think>...</think> <answer>...</answer>` and nothing else, else 0.

    Each tag must occur once, in this order, around something; between them there may be white space only.

    Args:
      tags: names of the tags, in order.
      partial: give each of the opening and closing tags that occurs exactly once its share of 1 instead.
      opened: the prompt ends with the first opening tag, so completions do not have it.
    """
    if not tags or isinstance(tags, str):
        raise ValueError(f"tags={tags!r} must be a list of at least one name")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")][1 if opened else 0 :]

    def score(text: str) -> float:
        once = [text.count(mark) == 1 for mark in marks]
        if partial:
            return sum(once) / len(once)
        if not all(once) or (opened and f"<{tags[0]}>" in text):
            return 0.0
        parts = []
        for mark in marks:
            before, found, text = text.partition(mark)
            parts += [before] if found else []
        # Inside and outside take turns; the first part is outside unless the prompt has opened the first tag.
        inside, outside = (parts[0::2], parts[1::2]) if opened else (parts[1::2], parts[0::2])
        return float(len(parts) == len(marks) and all(map(str.strip, inside)) and not "".join([*outside, text]).strip())

    def reward(prompts, completions, **columns) -> Scores:
        return [score(text_of(completion)) for completion in completions]

    return Reward("format_tags", reward)


def length_target(*, target: int, width: float | None = None, unit: str = "tokens", side: str = "both") -> Reward:
    """A linear penalty on the distance from a length: −min(1, |L − target| / width).

    Args:
      target: the length that costs nothing.
      width: the distance that costs 1; default: the target.
      unit: "tokens" (of `completion_ids`) or "words" (of the text, at white space).
      side: which distance counts: "both", "above" the target or "below" it.
    """
    width = target if width is None else width
    if target < 0 or width <= 0:
        raise ValueError(f"target={target} must be at least 0 and width={width} greater than 0")
    if side not in _SIDES:
        raise ValueError(f"side={side!r} is unknown; known: {', '.join(_SIDES)}")
    lengths, reads = _unit(unit)
    low, high = (side != "above"), (side != "below")

    def reward(prompts, completions, **columns) -> Scores:
        distances = [len(items) - target for items in lengths(completions, columns)]
        return [-min(1.0, max(high * distance, -low * distance, 0) / width) for distance in distances]

    return Reward("length_target", reward, reads=reads)


def overlong(*, max_completion_length: int, soft_punish_cache: int) -> Reward:
    """DAPO's soft punishment of completions that come near the length limit.

    With L tokens (EOS included), limit M and cache C:
      0 where L <= M − C;  ((M − C) − L) / C where M − C < L <= M;  −1 above.

    Args:
      max_completion_length: M.
      soft_punish_cache: C, the last tokens before the limit, over which the punishment grows.

    Reference: Yu et al. 2025, DAPO (arXiv:2503.14476), eq. 13.
    """
    if not 0 < soft_punish_cache <= max_completion_length:
        raise ValueError(
            f"soft_punish_cache={soft_punish_cache} must lie in [1, max_completion_length={max_completion_length}]"
        )
    free = max_completion_length - soft_punish_cache

    def reward(prompts, completions, completion_ids, **columns) -> Scores:
        return [max(-1.0, min(0.0, (free - len(ids)) / soft_punish_cache)) for ids in completion_ids]

    return Reward("overlong", reward)


def repetition_penalty(*, ngram: int = 3, max_penalty: float = 1.0, unit: str = "words") -> Reward:
    """The share of a completion's n-grams that repeat another, times −max_penalty.

    −max_penalty · (1 − distinct n-grams / n-grams); 0 for a completion shorter than one n-gram.

    Args:
      ngram: n.
      max_penalty: what a completion of one n-gram repeated for ever comes near.
      unit: "words" (of the text, lower case) or "tokens" (of `completion_ids`).

    Reference: Yeo et al. 2025 (arXiv:2502.03373), section 4.2.
    """
    if ngram < 1 or max_penalty < 0:
        raise ValueError(f"ngram={ngram} must be at least 1 and max_penalty={max_penalty} at least 0")
    units, reads = _unit(unit)

    def score(items: Sequence[Any]) -> float:
        grams = [tuple(items[i : i + ngram]) for i in range(len(items) - ngram + 1)]
        return -max_penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0

    def reward(prompts, completions, **columns) -> Scores:
        return [score(items) for items in units(completions, columns)]

    return Reward("repetition_penalty", reward, reads=reads)


def _unit(unit: str) -> tuple[Callable[..., list[Sequence[Any]]], tuple[str, ...]]:
    """`(completions, columns) -> items of each completion`, and the columns that this reads."""
    if unit not in _UNITS:
        raise ValueError(f"unit={unit!r} is unknown; known: {', '.join(_UNITS)}")
    return _UNITS[unit]


_UNITS: dict[str, tuple[Callable[..., list[Sequence[Any]]], tuple[str, ...]]] = {
    "tokens": (lambda _, columns: [[int(i) for i in ids] for ids in columns["completion_ids"]], ("completion_ids",)),
    "words": (lambda completions, _: [text_of(completion).lower().split() for completion in completions], ()),
}


def _as_score(value: Any) -> float | Exception:
    return value if isinstance(value, Exception) else float(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


REWARD_FUNCTIONS: dict[str, Callable[..., Reward]] = {
    "answer_match": answer_match,
    "format_tags": format_tags,
    "gsm8k": gsm8k,
    "json_valid": json_valid,
    "length_target": length_target,
    "math_equivalence": math_equivalence,
    "overlong": overlong,
    "python_tests": python_tests,
    "reasoning_gym": reasoning_gym,
    "regex": regex,
    "repetition_penalty": repetition_penalty,
}
"""By name: a function of a reward's options that returns the reward."""
