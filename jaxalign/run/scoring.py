"""The rewards that an online stage names: loaded, told apart, and checked before anything runs."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from jaxalign import models, rewards
from jaxalign.rewards.model import check_same_tokenizer
from jaxalign.sections import RolloutSection

if TYPE_CHECKING:
    from jaxalign.run.prepare import Prepared


def load_functions(section: RolloutSection) -> list[rewards.Reward | None]:
    """The section's reward functions, None in the place of a reward model.

    Raises:
      ValueError: one that is unknown, or cannot be had with these options; names the key.
    """
    functions: list[rewards.Reward | None] = []
    for number, each in enumerate(section.rewards):
        try:
            functions.append(None if each.name is None else rewards.load_reward(each.name, each.options))
        except ValueError as error:
            raise ValueError(f"rollout.rewards[{number}]: {error}") from error
    return functions


def reward_names(section: RolloutSection) -> tuple[str, ...]:
    """What the metrics call the rewards: the function's name or `model`, with a number where that was there before."""
    names = ["model" if each is None else each.name for each in load_functions(section)]
    return tuple(name if names.index(name) == i else f"{name}_{i}" for i, name in enumerate(names))


def reward_hashes(section: RolloutSection) -> dict[str, str]:
    """SHA-256 of each Python file that a reward is named by, by the path in the config."""
    files = [None if each.name is None else rewards.reward_file(each.name) for each in section.rewards]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file is not None}


def check_rewards(ready: Prepared) -> None:
    """Checks that there are rewards and that they can read the stage's data and completions.

    Raises:
      ValueError: no reward, an unknown one, a missing column, a reward model with another tokenizer or too short a
        context, or weights that are not one for each; names the key.
    """
    section, weights = ready.stage.rollout, ready.stage.method.reward_weights
    if not section.rewards:
        raise ValueError(
            f"rollout.rewards: {ready.stage.method_name} needs at least one reward, for example [{{name: gsm8k}}]"
        )
    if weights is not None and (len(weights) != len(section.rewards) or any(r.weight != 1 for r in section.rewards)):
        raise ValueError(
            f"method.reward_weights has {len(weights)} numbers for {len(section.rewards)} rewards; give one for each "
            "here, or none here and `weight` beside each reward"
        )
    planned = ready.data.tokenizer is None  # without data there are no columns and no tokenizer to look at
    sets = [each for each in (ready.data.train, ready.data.eval) if each is not None]
    longest = max(int(each.lengths["prompt"].max()) for each in sets)
    for number, function in enumerate(load_functions(section)):
        try:
            if function is None:
                _check_model(ready, section.rewards[number].model or "", longest)
                continue
            for each in [] if planned else sets:
                columns = each.row(0) if each.rows is not None else {}
                function.check_columns([*columns, "completion_ids"])
        except ValueError as error:
            raise ValueError(f"rollout.rewards[{number}]: {error}") from error


def _check_model(ready: Prepared, path: str, longest: int) -> None:
    if ready.data.tokenizer is not None:
        check_same_tokenizer(ready.data.tokenizer, models.load_tokenizer(path))
    config = models.load_config(path)
    if config.score_labels != 1:
        raise ValueError(
            f"{path} is a process reward model, which judges steps; a reward is one score per completion: give a model "
            "of method reward, or a function that calls methods.process_reward.score_steps"
        )
    context, steps = config.max_position, ready.stage.method.max_completion_length
    if longest + steps > context:
        raise ValueError(
            f"a prompt of {longest} tokens and method.max_completion_length={steps} exceed the context of {path}, "
            f"{context}: lower it, or set data.max_prompt_length"
        )
