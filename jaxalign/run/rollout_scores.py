"""Scores of a rollout: by functions, each process for prompts of its own, and by reward models on all devices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxalign import data, models, rewards
from jaxalign.exchange import from_all
from jaxalign.methods.online import Pending
from jaxalign.methods.rollout import select
from jaxalign.rewards.model import make_scorer
from jaxalign.run.prepare import Prepared
from jaxalign.run.scoring import load_functions, reward_names
from jaxalign.types import Experience

# Names under which reward functions are given what was drawn, and columns that it takes the place of.
DRAWN = ("prompt", "prompts", "completion", "completions", "completion_ids")


@dataclass(frozen=True)
class Scoring:
    """The rewards of a stage, loaded.

    Attributes:
      names: of the rewards, in order.
      weights: of them.
      start: begins to score a rollout of examples, see `methods.online.Score`. Where a function fails on one process,
        collecting the scores raises on all of them.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    start: Callable[[data.Examples, Experience], Pending]


def load_scoring(ready: Prepared) -> Scoring:
    """Loads reward functions and reward models."""
    section = ready.stage.rollout
    functions, scorers, order = [], [], []
    for each, function in zip(section.rewards, load_functions(section), strict=True):
        if function is None:
            order.append((len(scorers), True))
            scorers.append(_load_scorer(ready, each.model or ""))
        else:
            order.append((len(functions), False))
            functions.append(function)

    def start(examples: data.Examples, experience: Experience) -> Pending:
        # Each process calls the functions for prompts of its own; reward models run on all devices together.
        own = select(experience, np.arange(jax.process_index(), len(experience.prompts), jax.process_count()))
        pending = None
        if functions and len(own.prompts):
            given = _given(ready, examples, own)
            pending = rewards.start_rewards(
                functions, **given, timeout=section.reward_timeout, on_error=section.on_reward_error
            )
        by_model = [score(_sequences(experience)) for score in scorers]

        def collect() -> np.ndarray:
            by_function = _from_owners(experience, _all_or_none(pending, len(own.tokens)), len(functions))
            columns = [by_model[i] if is_model else by_function[:, i] for i, is_model in order]
            return np.stack(columns, axis=1).astype(np.float64)

        def slow(seconds: float) -> bool:
            if pending is not None:
                wait([pending], seconds)
            return bool(from_all(np.array([pending is not None and not pending.done()])).any())

        return Pending(collect, slow)

    return Scoring(reward_names(section), tuple(each.weight for each in section.rewards), start)


def _all_or_none(pending: Future[np.ndarray] | None, completions: int) -> np.ndarray:
    """The scores of this process's own completions; if a function fails on any process, all raise `RewardError`."""
    scores, failure = np.zeros((completions, 0)), None
    try:
        scores = scores if pending is None else pending.result()
    except rewards.RewardError as error:
        failure = error
    failed = np.flatnonzero(from_all(np.array([failure is not None])))
    if failure is not None:
        raise failure
    if len(failed):
        raise rewards.RewardError(f"a reward function failed on process {failed[0]}, which says how")
    return scores


def _from_owners(experience: Experience, mine: np.ndarray, columns: int) -> np.ndarray:
    """float64 `[completions, columns]` on every process, from what each has of its own prompts' completions."""
    owner = (np.arange(len(experience.tokens)) // experience.num_generations) % jax.process_count()
    table = np.full((len(owner), columns), np.nan)
    if columns:
        table[owner == jax.process_index()] = mine
    return from_all(table)[owner, np.arange(len(owner))]


def weights_of(ready: Prepared, scoring: Scoring) -> tuple[float, ...]:
    """The method's weights of the rewards, else those that the rewards came with."""
    return ready.stage.method.reward_weights or scoring.weights


def scorer_model(ready: Prepared, path: str) -> models.Model:
    """The functions of a reward model, as `_load_scorer` has them."""
    return models.build(
        models.load_config(path),
        param_dtype=ready.stage.model.param_dtype,
        compute_dtype=ready.compute_dtype,
        mesh=ready.mesh,
    )


def _load_scorer(ready: Prepared, path: str) -> Callable[[list[np.ndarray]], np.ndarray]:
    model, variables = models.load(
        path,
        mesh=ready.mesh,
        param_dtype=ready.stage.model.param_dtype,
        compute_dtype=ready.compute_dtype,
    )
    return make_scorer(model, variables, mesh=ready.mesh if ready.mesh.size > 1 else None)


def _sequences(experience: Experience) -> list[np.ndarray]:
    """Prompt and completion together, one per completion."""
    size = experience.num_generations
    return [
        np.concatenate(
            [
                experience.prompts[c // size, : experience.prompt_lengths[c // size]],
                experience.tokens[c, : experience.lengths[c]],
            ]
        )
        for c in range(len(experience.tokens))
    ]


def _given(ready: Prepared, examples: data.Examples, experience: Experience) -> dict[str, Any]:
    """What reward functions are given: texts, or messages where the data has messages, and the data's columns."""
    tokenizer, size = ready.data.tokenizer, experience.num_generations
    ids = [row[:n].tolist() for row, n in zip(experience.tokens, experience.lengths, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    found = [examples.row(int(i)) for i in experience.examples]
    rows = [row for row in found for _ in range(size)]
    prompts = [row["prompt"] for row in rows]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    # JSON rows may have different columns, and a column of the data is not what was drawn here.
    names = dict.fromkeys(name for row in (examples.row(0), *found) for name in row if name not in DRAWN)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return {"prompts": prompts, "completions": completions, "columns": {**columns, "completion_ids": ids}}
