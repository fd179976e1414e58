"""A data set from scored completions: the best of each prompt, or the best against the worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxalign import data
from jaxalign.evaluation import readable
from jaxalign.run.prompts import UNLIMITED, Row

# What `complete` and `judge` add to a prompt's row.
OF_COMPLETIONS = ("completion", "completion_ids", "logps", "log_mass", "cumulative_logp", "finish", "score", "scores")
# What our reader of data sets is to make of the rows; of `all`, nothing.
KINDS = {"all": None, "best": "sft", "pairs": "preference"}
# Reasons of this reader that a setting removes: such rows are kept.
MENDABLE = ("lost EOS",)


@dataclass(frozen=True)
class Rules:
    """Which completions may be chosen.

    Attributes:
      min_score: least score of a chosen completion; None = any.
      ended: only completions that came to their end, by EOS or a stop string.
    """

    min_score: float | None = None
    ended: bool = False


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
      rows: of the data set.
      dropped: prompts (with `all`: completions) that gave no row, by reason.
    """

    rows: tuple[Row, ...]
    dropped: Counter[str]


def select(rows: Sequence[Row], size: int, how: str, rules: Rules, tokenizer: Any) -> Selection:
    """Chooses among the completions of each prompt; of equals the first counts.

    Args:
      rows: one per completion, those of a prompt together, with `score` where there were judges.
      size: completions per prompt.
      how: a key of `SELECTIONS`. `all` keeps every completion that the rules allow. `best` gives rows for supervised
        fine-tuning: `prompt`, `completion`, `score`, `scores`, `finish`. `pairs` gives preferences, the best against
        the worst: `prompt`, `chosen`, `rejected`, `margin` (the difference of their scores), `score_chosen`,
        `score_rejected`. Both keep the prompt's other columns.
      rules: a prompt without a completion that they allow is dropped; a rejected one needs no least score.
      tokenizer: the policy's: rows that `data.encode` would refuse are dropped too, for example where the text of
        prompt and completion has other tokens than were read and drawn.
    """
    kept, dropped = [], Counter()
    members = 1 if how == "all" else size
    for start in range(0, len(rows), members):
        found = SELECTIONS[how](rows[start : start + members], rules)
        reason = found if isinstance(found, str) else _unreadable(found, KINDS[how], tokenizer)
        if reason is None:
            kept.append(found)
        else:
            dropped[reason] += 1
    return Selection(tuple(kept), dropped)


def take_all(group: Sequence[Row], rules: Rules) -> Row | str:
    """A group of one completion as it is, or why it is left out."""
    (row,) = group
    if rules.ended and row["finish"] == "length":
        return "not ended"
    if rules.min_score is not None:
        if row["score"] is None:
            return "no score"
        if row["score"] < rules.min_score:
            return _below(rules)
    return row


def take_best(group: Sequence[Row], rules: Rules) -> Row | str:
    """The completion with the highest score as a row for supervised fine-tuning, or why there is none."""
    candidates = _candidates(group, rules)
    if isinstance(candidates, str):
        return candidates
    best = max(candidates, key=_score)
    columns = {name: best[name] for name in ("prompt", "completion", "score", "scores", "finish")}
    return {**columns, **_others(best, columns)}


def take_pair(group: Sequence[Row], rules: Rules) -> Row | str:
    """The completions with the highest and the lowest score as a preference, or why there is none."""
    candidates = _candidates(group, rules)
    if isinstance(candidates, str):
        return candidates
    best, worst = max(candidates, key=_score), min(candidates, key=_score)
    if best["score"] == worst["score"]:
        return "tie"
    columns = {
        "prompt": best["prompt"],
        "chosen": best["completion"],
        "rejected": worst["completion"],
        "margin": best["score"] - worst["score"],
        "score_chosen": best["score"],
        "score_rejected": worst["score"],
    }
    return {**columns, **_others(best, columns)}


SELECTIONS: dict[str, Callable[[Sequence[Row], Rules], Row | str]] = {
    "all": take_all,
    "best": take_best,
    "pairs": take_pair,
}


def _candidates(group: Sequence[Row], rules: Rules) -> list[Row] | str:
    """The completions that may be chosen or rejected, or why there is none (to choose)."""
    left = [row for row in group if row["score"] is not None]
    if not left:
        return "no score"
    left = [row for row in left if readable(row["completion"]).strip()]
    if not left:
        return "no text"
    left = [row for row in left if not rules.ended or row["finish"] != "length"]
    if not left:
        return "not ended"
    if rules.min_score is not None and max(map(_score, left)) < rules.min_score:
        return _below(rules)
    return left


def _score(row: Row) -> float:
    return row["score"]


def _below(rules: Rules) -> str:
    return f"score below {rules.min_score:g}"


def _others(row: Row, columns: Row) -> Row:
    """The columns that came with the prompt."""
    return {name: value for name, value in row.items() if name not in columns and name not in OF_COMPLETIONS}


def _unreadable(row: Row, kind: str | None, tokenizer: Any) -> str | None:
    if kind is None:
        return None
    try:
        data.encode(tokenizer, row, kind, data.DataConfig(path="", max_length=UNLIMITED))
    except data.Bad as bad:
        return None if bad.kind in MENDABLE else bad.kind
    return None
