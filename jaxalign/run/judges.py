"""Rewards by hand: what `jaxalign sample --score` names, and what it makes of drawn completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxalign import models, rewards
from jaxalign.rewards.model import check_same_tokenizer, make_scorer
from jaxalign.run import exported
from jaxalign.run.prepare import resolve_dtype
from jaxalign.run.prompts import Prompts, Row

SYNTAX = """for example 'regex:{"pattern": "yes"}'"""


@dataclass(frozen=True)
class Judge:
    """One source of scores: a reward function or a reward model.

    Attributes:
      name: in the rows; no two are equal.
      weight: in the sum.
      reward: the function, or None.
      model: the reward model's folder, GGUF file or Hub name, or None.
    """

    name: str
    weight: float
    reward: rewards.Reward | None = None
    model: str | None = None


def parse_score(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME` or `NAME:{options as JSON}` as name and options; raises ValueError where the options are no JSON."""
    name, brace, rest = text.partition(":{")
    if not brace:
        return text, {}
    try:
        return name, json.loads("{" + rest)
    except json.JSONDecodeError as error:
        raise ValueError(f"--score {text}: the options of {name} are no JSON: {error.msg}; {SYNTAX}") from error


def load_judges(
    scores: Sequence[str], weights: Sequence[float], prompts: Prompts, tokenizer: Any, max_new_tokens: int
) -> tuple[Judge, ...]:
    """What was asked for, checked as far as that goes before anything is drawn; no parameter is read.

    Args:
      scores: as `--score` has them: a reward function's name or import path, perhaps with options, or a reward model.
      weights: one for each, or none at all: then each has weight 1.
      prompts: what is completed.
      tokenizer: the policy's.
      max_new_tokens: tokens of the longest completion.

    Raises:
      FileNotFoundError: no such reward model.
      ValueError: an unknown function, option or column; a model without a score head, with another tokenizer or too
        short a context; another number of weights.
    """
    if weights and len(weights) != len(scores):
        raise ValueError(f"--score-weight: {len(weights)} given for {len(scores)} --score; give one for each, or none")
    judges: list[Judge] = []
    for text, weight in zip(scores, weights or [1.0] * len(scores), strict=True):
        name, options = parse_score(text)
        short = name.rstrip("/").rpartition(":")[2].rpartition("/")[2]
        shown = f"{short}_{len(judges)}" if short in {each.name for each in judges} else short
        if _is_model(name):
            path = exported(name)
            _check_model(text, path, options, tokenizer, prompts.longest + max_new_tokens)
            judges.append(Judge(shown, weight, model=path))
        else:
            reward = rewards.load_reward(name, options)
            reward.check_columns([*prompts.columns, "prompts", "completions", "completion_ids"])
            judges.append(Judge(shown, weight, reward=reward))
    return tuple(judges)


def judge(
    judges: Sequence[Judge],
    rows: Sequence[Row],
    prompts: Prompts,
    *,
    mesh: Mesh | None = None,
    timeout: float = 600.0,
    on_error: str = "raise",
) -> list[Row]:
    """Rows with `scores` (by judge, None where there is none) and `score`, the weighted sum of those that there are.

    Functions and models work at the same time.

    Args:
      judges: from `load_judges`.
      rows: one per completion, those of a prompt together: `prompt`, `completion` and `completion_ids`.
      prompts: what was completed; functions are given the columns that stand there.
      mesh: where reward models run.
      timeout: seconds that the functions may take for all rows.
      on_error: as `rewards.call_rewards`.

    Raises:
      RewardError: a function failed; it and the completion are named.
    """
    table = np.full((len(rows), len(judges)), np.nan)
    functions = {i: each.reward for i, each in enumerate(judges) if each.reward is not None}
    given = _given(rows, prompts)
    pending = rewards.start_rewards(list(functions.values()), **given, timeout=timeout, on_error=on_error)
    size = len(rows) // len(prompts.ids)
    texts = [np.asarray([*prompts.ids[i // size], *row["completion_ids"]], np.int32) for i, row in enumerate(rows)]
    for i, each in enumerate(judges):
        if each.model is not None:
            model, variables = models.load(each.model, mesh=mesh, compute_dtype=resolve_dtype("auto"))
            table[:, i] = make_scorer(model, variables, mesh=mesh)(texts)
    table[:, list(functions)] = pending.result()
    missing = np.isnan(table)
    # As losses.sum_scores, without rounding to float32.
    total = np.where(missing, 0.0, table) @ np.array([each.weight for each in judges])
    total[missing.all(1)] = np.nan
    return [
        {
            **row,
            "score": _number(total[i]),
            "scores": {each.name: _number(table[i, k]) for k, each in enumerate(judges)},
        }
        for i, row in enumerate(rows)
    ]


def describe_scores(judges: Sequence[Judge], rows: Sequence[Row], size: int) -> list[str]:
    """A line per judge: the mean over all completions, and over each prompt's best of `size`."""
    lines = []
    for each in judges:
        values = np.array([row["scores"][each.name] for row in rows], np.float64).reshape(-1, size)
        known = values[~np.isnan(values)]
        if not len(known):
            lines.append(f"{each.name}: no scores")
            continue
        scored = values[~np.isnan(values).all(1)]
        best = f", mean of the best of {size} {np.nanmax(scored, axis=1).mean():.4g}" if size > 1 else ""
        none = f", {values.size - len(known)} without" if len(known) < values.size else ""
        lines.append(f"{each.name}: mean {known.mean():.4g}{best}, {len(known)} completions{none}")
    return lines


def _is_model(name: str) -> bool:
    """A folder, a file or a Hub name, and no function: those have no slash without a colon."""
    return name not in rewards.REWARD_FUNCTIONS and (Path(name).exists() or ("/" in name and ":" not in name))


def _check_model(text: str, path: str, options: Mapping[str, Any], tokenizer: Any, longest: int) -> None:
    if options:
        raise ValueError(f"--score {text}: a reward model takes no options")
    config = models.load_config(path)
    if not config.score_head:
        raise ValueError(f"--score {path}: a language model; a reward model has a score head instead of an LM head")
    if config.score_labels != 1:
        raise ValueError(
            f"--score {path}: a process reward model judges the steps of a completion, and only stepwise data say what "
            "a step is: score them in Python with methods.process_reward.score_steps, or give a model of method reward"
        )
    check_same_tokenizer(tokenizer, models.load_tokenizer(path))
    if longest > config.max_position:
        raise ValueError(
            f"--score {path}: a prompt and its completion may have {longest} tokens, more than this model's context of "
            f"{config.max_position}; lower --max-new-tokens"
        )


def _given(rows: Sequence[Row], prompts: Prompts) -> dict[str, Any]:
    """What reward functions are given: prompts, completions, and the columns of the prompts."""
    size = len(rows) // len(prompts.rows)
    asked = [prompts.rows[i // size] for i in range(len(rows))]
    columns = {name: [row.get(name) for row in asked] for name in prompts.columns if name != "completion"}
    return {
        "prompts": [row["prompt"] for row in rows],
        "completions": [row["completion"] for row in rows],
        "columns": {**columns, "completion_ids": [row["completion_ids"] for row in rows]},
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
