"""The stages of a run for a plan: a later one takes what an earlier one will export, which is not there yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxalign import data, models
from jaxalign.config import OUTPUTS, RunConfig
from jaxalign.methods.common import trains_scores
from jaxalign.models.families import to_hf
from jaxalign.models.heads import score_config
from jaxalign.models.identity import with_padding
from jaxalign.planning.assumed import has_data
from jaxalign.planning.plan import prepare_plan
from jaxalign.run import pick_stage, resolve_inputs
from jaxalign.run.critic import FOLDER as CRITIC
from jaxalign.run.prepare import Prepared
from jaxalign.sections import Stage

Upcoming = tuple[Stage, Prepared, tuple[str, ...]]


def planned_stages(
    config: RunConfig, devices: Sequence[Any] | None, folder: Path, only: str | None = None
) -> Iterator[Upcoming]:
    """Each stage with its inputs resolved, prepared, and what was assumed (see `prepare_plan`).

    Args:
      config: the run.
      devices: what is planned for; None for this machine's.
      folder: takes a folder for each export that a later stage names: config and tokenizer, no weights. It has to stay
        while the stages are planned.
      only: the name of the one stage to give; those before it that it does not build on are left out.

    Raises:
      ValueError: there is no such stage; else as `prepare_plan`.
    """
    if only is not None:
        pick_stage(config, only)
    stages = list(config.stages)
    if only is not None:
        stages = stages[: 1 + next(i for i, each in enumerate(stages) if each.name == only)]
    wanted = _named_by(stages[-1:] if only is not None else stages)
    for stage in reversed(stages[:-1]):
        wanted |= _named_by([stage]) if stage.name in wanted else set()
    exports: dict[str, str] = {}
    for number, each in enumerate(stages):
        taken = only in (None, each.name)
        if not taken and each.name not in wanted:
            continue
        stage = resolve_inputs(each, exports)
        ready, notes = prepare_plan(stage, devices)
        if each.name in wanted:
            tokenizer = _tokenizer(stage, ready, stages[number + 1 :])
            exports[each.name] = str(_write_export(folder / each.name, ready, tokenizer))
        if taken:
            yield stage, ready, notes


def _named_by(stages: Sequence[Stage]) -> set[str]:
    """The stages whose outputs these take."""
    found = set()
    for stage in stages:
        inputs = [stage.model.path, stage.model.reference, stage.model.critic]
        for value in [*inputs, *(each.model for each in stage.rollout.rewards)]:
            name, _, role = (value or "").rpartition(".")
            found |= {name} if role in OUTPUTS else set()
    return found


def _tokenizer(stage: Stage, ready: Prepared, later: Sequence[Stage]) -> Any:
    """The tokenizer that the stage exports; None where nobody needs it, as there are no data to encode."""
    if ready.data.tokenizer is not None or not any(has_data(each) for each in later):
        return ready.data.tokenizer
    settings = {"chat_template_path": stage.data.chat_template_path, "eos_token": stage.data.eos_token}
    return data.prepare(models.load_tokenizer(stage.model.path), **settings)


def _write_export(folder: Path, ready: Prepared, tokenizer: Any) -> Path:
    """Writes the configs of what a stage exports, as `run_stage` and `export_critic` do."""
    config = ready.model.config
    ends = models.end_ids(config, tokenizer)
    # A padding token that ends completions would hide a score, see `run.scores` and `run.critic`.
    apart = None if config.pad_id in ends else config.pad_id
    scores = trains_scores(ready.method)
    _write(folder / "export", replace(config, eos_ids=ends, pad_id=apart if scores else config.pad_id), tokenizer)
    if ready.stage.export.critic:
        critic = ready.stage.model.critic
        value = config if critic is None else models.load_config(critic)
        value = value if value.score_head and not value.lm_head else score_config(replace(value, score_head=False))
        _write(folder / CRITIC, replace(value, eos_ids=ends, pad_id=apart), tokenizer)
    return folder / "export"


def _write(folder: Path, config: models.ModelConfig, tokenizer: Any) -> None:
    if config.score_head:
        config, tokenizer = with_padding(config, tokenizer)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config)) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
