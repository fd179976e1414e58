"""What is left out of training data although it could be trained on: ties, duplicates, leaks, lengths.

A filter is an entry in `FILTERS`: it is made once from the configuration, then asked about one example after the
other, and answers with a reason or None.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxalign.data.examples import Examples
from jaxalign.data.formats import Bad, normalise
from jaxalign.data.margins import margin_of, pair_tokens
from jaxalign.data.settings import Filters

PAIRED = ("preference", "ranking")
COMPLETIONS = ("completion", "chosen", "rejected")


@dataclass(frozen=True)
class Facts:
    """An example as filters see it.

    Attributes:
      row: as found, under our column names.
      example: normalised, see `formats.normalise`.
      arrays: its tokens, see `chat.encode`.
      place: its file and line.
    """

    row: Mapping[str, Any]
    example: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    place: tuple[str, int]


@dataclass(frozen=True)
class Removed:
    """A row that is left out.

    Attributes:
      file: where it stands.
      line: likewise.
      filter: that removed it; `problem` for a row that could not be trained on.
      reason: why.
      row: as found, under our column names; empty where it cannot be read.
    """

    file: str
    line: int
    filter: str
    reason: str
    row: Mapping[str, Any]

    @classmethod
    def of_problem(cls, examples: Examples, i: int) -> Removed:
        """A bad one among encoded examples."""
        try:
            row = examples.row(i)
        except Bad:
            row = {}
        return cls(*examples.where(i), "problem", ": ".join(examples.reason(i)), row)


@dataclass(frozen=True)
class Sifted:
    """What filters left.

    Attributes:
      examples: those that stay, bad ones among them.
      removed: the others, in order.
      counts: rows that each filter in use removed.
    """

    examples: Examples
    removed: tuple[Removed, ...]
    counts: dict[str, int]


Judge = Callable[[Facts], str | None]


def sift(train: Examples, evaluation: Examples | None, config: Filters | None, kind: str) -> Sifted:
    """Takes out of the good training examples what the filters object to.

    Args:
      train: encoded, with their rows.
      evaluation: the good evaluation examples, with their rows.
      config: which filters; None for none.
      kind: of example.

    Raises:
      ValueError: a filter does not go with this kind, or a pair lacks its margin; it names file and line.
    """
    if config is None:
        return Sifted(train, (), {})
    judges = make_judges(config, kind, facts_of(evaluation, kind) if evaluation is not None else ())
    counts, removed = dict.fromkeys(judges, 0), []
    keep = np.ones(len(train), bool)
    good = np.flatnonzero(~train.bad)
    for i, facts in zip(good.tolist(), facts_of(train.select(good), kind), strict=True):
        verdict = judge(judges, facts)
        if verdict is not None:
            keep[i] = False
            counts[verdict.filter] += 1
            removed.append(verdict)
    return Sifted(train.select(np.flatnonzero(keep)), tuple(removed), counts)


def facts_of(examples: Examples, kind: str) -> Iterator[Facts]:
    """Good examples as filters see them, one by one."""
    for i in range(len(examples)):
        row = examples.row(i)
        yield Facts(row, normalise(row, kind), examples[i], examples.where(i))


def make_judges(config: Filters, kind: str, evaluation: Iterator[Facts] | Sequence[Facts]) -> dict[str, Judge]:
    """The filters that the configuration asks for, in order.

    Args:
      config: which filters.
      kind: of example.
      evaluation: the evaluation examples, for `decontaminate`.
    """
    for name in ("drop_ties", "min_margin", "max_length_ratio"):
        if getattr(config, name) not in (None, False) and kind not in PAIRED:
            raise ValueError(f"filters.{name} is for pairs; these are examples of the kind {kind}")
    held_out = list(evaluation) if config.decontaminate else []
    made = {name: make(config, held_out) for name, make in FILTERS.items()}
    return {name: each for name, each in made.items() if each is not None}


def judge(judges: Mapping[str, Judge], facts: Facts) -> Removed | None:
    """The first filter's objection, if any has one."""
    for name, each in judges.items():
        reason = each(facts)
        if reason is not None:
            return Removed(*facts.place, name, reason, facts.row)
    return None


def _length(config: Filters, held_out: Sequence[Facts]) -> Judge | None:
    del held_out
    least, most, ratio = config.min_completion_tokens, config.max_completion_tokens, config.max_length_ratio
    if (least, most, ratio) == (None, None, None):
        return None

    def check(facts: Facts) -> str | None:
        sizes = _completion_sizes(facts.arrays)
        if least is not None and min(sizes) < least:
            return f"a completion of {min(sizes)} tokens; at least {least} wanted"
        if most is not None and max(sizes) > most:
            return f"a completion of {max(sizes)} tokens; at most {most} wanted"
        if ratio is not None and len(sizes) == 2 and max(sizes) > ratio * min(sizes):
            return f"completions of {max(sizes)} and {min(sizes)} tokens; a ratio of at most {ratio} wanted"
        return None

    return check


def _ties(config: Filters, held_out: Sequence[Facts]) -> Judge | None:
    del held_out
    if not config.drop_ties:
        return None

    def check(facts: Facts) -> str | None:
        if "chosen" not in facts.example:
            return None
        if _margin(facts) == 0:
            return "the margin is 0"
        chosen, rejected = (_plain(facts.example[name]) for name in ("chosen", "rejected"))
        return "chosen and rejected are equal after normalising" if chosen == rejected else None

    return check


def _small_margin(config: Filters, held_out: Sequence[Facts]) -> Judge | None:
    del held_out
    least = config.min_margin
    if least is None:
        return None

    def check(facts: Facts) -> str | None:
        margin = _margin(facts)
        if margin is None:
            raise ValueError(
                "{}:{}: filters.min_margin needs `margin`, or `chosen_score` and `rejected_score`, in every row; "
                "data.columns renames, for example {{margin: score_diff}}".format(*facts.place)
            )
        return f"a margin of {abs(margin):g}; at least {least:g} wanted" if abs(margin) < least else None

    return check


def _duplicates(config: Filters, held_out: Sequence[Facts]) -> Judge | None:
    del held_out
    if config.deduplicate is None:
        return None
    first: dict[str, tuple[str, int]] = {}
    names = ("prompt",) if config.deduplicate == "prompt" else ()

    def check(facts: Facts) -> str | None:
        key = json.dumps(_key(facts.example, names), sort_keys=True, default=str)
        if key not in first:
            first[key] = facts.place
            return None
        return "the {} of {}:{} again".format("prompt" if names else "example", *first[key])

    return check


def _contamination(config: Filters, held_out: Sequence[Facts]) -> Judge | None:
    if config.decontaminate is None:
        return None
    prompts = {json.dumps(_key(each.example, ("prompt",))): each.place for each in held_out}
    grams: dict[str, tuple[str, int]] = {}
    if config.decontaminate == "ngram":
        grams = {gram: each.place for each in held_out for gram in _grams(each.example, config.ngram)}

    def check(facts: Facts) -> str | None:
        place = prompts.get(json.dumps(_key(facts.example, ("prompt",))))
        if place is not None:
            return "the prompt of the evaluation example {}:{}".format(*place)
        for gram in _grams(facts.example, config.ngram) if grams else ():
            if gram in grams:
                return "{} words of the evaluation example {}:{}: {!r}".format(config.ngram, *grams[gram], gram)
        return None

    return check


FILTERS: dict[str, Callable[[Filters, Sequence[Facts]], Judge | None]] = {
    "length": _length,
    "ties": _ties,
    "margin": _small_margin,
    "duplicates": _duplicates,
    "contamination": _contamination,
}


def normalise_text(text: str) -> str:
    """NFKC, without case, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _margin(facts: Facts) -> float | None:
    try:
        return margin_of(facts.row)
    except Bad as bad:
        raise ValueError("{}:{}: {}".format(*facts.place, bad)) from bad


def _completion_sizes(arrays: Mapping[str, np.ndarray]) -> list[int]:
    if "loss_mask" in arrays:
        return [int(arrays["loss_mask"].sum())]
    if "chosen_ids" in arrays:
        return list(pair_tokens(arrays))
    if "sizes" in arrays:
        return arrays["sizes"].tolist()
    return [len(values) for name, values in arrays.items() if name.endswith("_ids") and name != "prompt_ids"] or [
        len(arrays["prompt_ids"])
    ]


def _plain(content: Any) -> Any:
    """A text, or the roles, texts and calls of messages, normalised."""
    if isinstance(content, str):
        return normalise_text(content)
    return [[message["role"], normalise_text(_said(message)), message.get("tool_calls")] for message in content]


def _said(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def _key(example: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What of an example must be equal: some columns, or all with its tools."""
    if names and "messages" in example:
        roles = [message["role"] for message in example["messages"]]
        return _plain(example["messages"][: roles.index("assistant") if "assistant" in roles else None])
    if names and "text" in example:
        return _plain(example["text"])
    whole = {
        name: [_plain(each) for each in value] if name == "completions" else _plain(value)
        for name, value in example.items()
        if name in ("text", "messages", "prompt", "completions", *COMPLETIONS)
    }
    return whole["prompt"] if names else {**whole, "tools": example["tools"], "label": example.get("label")}


def _grams(example: Mapping[str, Any], n: int) -> Iterator[str]:
    """Every n words in a row of a text or message, but of system messages, which examples share."""
    for name in ("text", "messages", "prompt", "completions", *COMPLETIONS):
        listed = example.get(name, ())
        for content in listed if name == "completions" else [listed]:
            texts = [content] if isinstance(content, str) else [_said(m) for m in content if m["role"] != "system"]
            for text in texts:
                words = re.findall(r"\w+", normalise_text(text))
                yield from (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
