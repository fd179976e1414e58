"""RunConfig -> objects -> fit(): the one place that knows everything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxalign import models
from jaxalign.buckets import is_url
from jaxalign.config import OUTPUTS, RunConfig, Stage, read_config_text
from jaxalign.evaluation import Comparison, Side
from jaxalign.exchange import from_first, is_first
from jaxalign.files import write_text
from jaxalign.methods import METHODS
from jaxalign.methods.common import trains_scores
from jaxalign.models.identity import adapter_fingerprint
from jaxalign.run.backend import describe_backend
from jaxalign.run.bucket import Mirror, checkpoints_place, export_url, working
from jaxalign.run.compare import check_prompts, compare
from jaxalign.run.critic import FOLDER as CRITIC
from jaxalign.run.evaluate import evaluate_stage
from jaxalign.run.folder import (
    check_shared,
    correct_folder,
    find_folder,
    has_saved,
    input_changes,
    locked,
    other_inputs,
    record_stage,
    write_config,
)
from jaxalign.run.inputs import Say
from jaxalign.run.prepare import Prepared, check_data, prepare, resolve_dtype
from jaxalign.run.scoring import reward_hashes
from jaxalign.run.stage import MakeProgress, StageResult, finished, run_stage
from jaxalign.run.stream import write_removed
from jaxalign.training.loop import Show
from jaxalign.training.metrics import check_login

__all__ = [
    "Prepared",
    "RunResult",
    "check_data",
    "compare",
    "evaluate_stage",
    "exported",
    "pick_stage",
    "prepare",
    "resolve_dtype",
    "run",
    "write_removed",
]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
      folder: the run's, on this machine.
      stages: in order; fewer than configured if the run was stopped.
      comparison: before and after, if the config asks for it and the run came to its end.
    """

    folder: Path
    stages: tuple[StageResult, ...]
    comparison: Comparison | None


def run(
    config: RunConfig,
    *,
    fresh: bool = False,
    say: Say = lambda line: None,
    make_progress: MakeProgress | None = None,
    show: Show | None = None,
) -> RunResult:
    """Trains every stage, or continues where the run stopped.

    Of several processes (see `jaxalign.run.processes`) all call this; the first writes what is written once.

    Args:
      config: the run.
      fresh: start anew beside an existing folder of that name.
      say: takes lines for the user.
      make_progress: makes a progress bar for a stage.
      show: takes a step's number and what is written to samples.jsonl after it.

    Raises:
      FileNotFoundError, ValueError: bad input, named by file, line or key. What was saved stays.
      OSError: the folder cannot be written.
    """
    with working(config, fresh) if is_url(config.runs_dir) else nullcontext(config) as here:
        url = f"{config.runs_dir.rstrip('/')}/"
        at = partial(checkpoints_place, f"{url}{config.name}", Path(here.runs_dir) / config.name)
        place, resumed, changes = from_first(lambda: _place(*find_folder(here, at, fresh=fresh)))
        folder = Path(place)
        mirror = Mirror(f"{url}{folder.name}", folder) if here is not config else None
        if not resumed or changes:
            check_stages(config)
        if changes:
            _check_finished(config, folder, mirror)
        if not resumed:
            from_first(lambda: write_config(here, folder))
        if mirror is None:
            check_shared(folder)
        # Before anything is loaded; the first process alone writes to trackers.
        from_first(lambda: check_login({name for stage in config.stages for name in stage.log.report_to}))
        with locked(folder) if is_first() else nullcontext():
            if resumed and not changes:
                from_first(lambda: write_config(here, folder))
            say(f"run: {mirror.url if mirror else folder} ({'continued' if resumed else 'new'})")
            say(f"backend: {describe_backend()}")
            for line in from_first(partial(correct_folder, here, folder, at)) if changes else ():
                say(line)
            return _run_stages(config, folder, mirror, say, make_progress, show)


def _run_stages(
    config: RunConfig,
    folder: Path,
    mirror: Mirror | None,
    say: Say,
    make_progress: MakeProgress | None,
    show: Show | None,
) -> RunResult:
    done: dict[str, StageResult] = {}
    with ExitStack() as stack:
        if mirror is not None:
            stack.callback(mirror.push)
        for stage in config.stages:
            where = folder / stage.name if stage.name else folder
            if from_first(lambda stage=stage, where=where: finished(stage, where) is not None):
                result = finished(stage, where) or StageResult(stage.name, where, where / "export", "done before", {})
                if mirror is not None:
                    result = replace(result, export=mirror.export_url(stage.name))
                say(f"{stage.name or stage.method_name}: done before, its policy is in {result.export}")
            else:
                ready = prepare(resolve_inputs(stage, {name: str(each.export) for name, each in done.items()}))
                for line in _record(config, folder, mirror, stage, ready):
                    say(line)
                result = run_stage(ready, where, mirror=mirror, say=say, make_progress=make_progress, show=show)
            done[stage.name] = result
            if result.export is None:
                return RunResult(folder, tuple(done.values()), None)
        return RunResult(folder, tuple(done.values()), _compare(config, folder, done, say))


def _record(config: RunConfig, folder: Path, mirror: Mirror | None, stage: Stage, ready: Prepared) -> list[str]:
    """Keeps where a stage's inputs came from; lines for the user."""
    name, lineage = stage.name or config.name, from_first(partial(_lineage, ready))
    at = partial(checkpoints_place, mirror.url if mirror else "", folder)
    saved = from_first(partial(has_saved, folder, stage.name, at))
    if not saved and from_first(partial(input_changes, folder, name, lineage)):
        _check_finished(config, folder, mirror)
    lines = from_first(partial(record_stage, folder, config, name, lineage, saved=saved))
    if mirror is not None:
        mirror.push()
    return lines


def _check_finished(config: RunConfig, folder: Path, mirror: Mirror | None) -> None:
    """Raises ValueError if a finished stage's inputs have changed: a later one begins anew with what it gave."""
    exports: dict[str, str] = {}
    for stage in config.stages:
        where, name = folder / stage.name, stage.name or config.name
        if not from_first(lambda stage=stage, where=where: finished(stage, where) is not None):
            return
        lineage = from_first(partial(_lineage, prepare(resolve_inputs(stage, exports))))
        if changes := from_first(partial(input_changes, folder, name, lineage)):
            raise other_inputs(folder, name, changes)
        exports[stage.name] = mirror.export_url(stage.name) if mirror else str(where / "export")


def _place(folder: Path, resumed: bool, changes: list[str]) -> tuple[str, bool, list[str]]:
    return str(folder), resumed, changes


def check_stages(config: RunConfig) -> None:
    """Prepares every stage as far as that goes without training the ones before, so that bad input shows at once."""
    for stage in config.stages:
        prepare(pick_stage(config, stage.name))
    if config.compare is not None:
        if trains_scores(METHODS[config.stages[-1].method_name]):
            raise ValueError(
                "compare: the last stage trains a reward model, which gives no answers; leave compare away"
            )
        last = pick_stage(config, config.stages[-1].name)
        check_prompts(config.compare, last.model.path, last.data)


def resolve_inputs(stage: Stage, policies: Mapping[str, str]) -> Stage:
    """The stage with `<earlier>.policy` and `<earlier>.reward` replaced by that stage's export, and its critic's."""

    def resolve(value: str) -> str:
        source, _, role = value.rpartition(".")
        found = policies.get(source, value) if role in OUTPUTS else value
        beside = role == "critic" and found.endswith("/export")
        return found.removesuffix("export") + CRITIC if beside else found

    reference, critic = stage.model.reference, stage.model.critic
    model = replace(
        stage.model,
        path=resolve(stage.model.path),
        reference=reference and resolve(reference),
        critic=critic and resolve(critic),
    )
    rewards = tuple(replace(each, model=each.model and resolve(each.model)) for each in stage.rollout.rewards)
    return replace(stage, model=model, rollout=replace(stage.rollout, rewards=rewards))


def _lineage(ready: Prepared) -> dict[str, Any]:
    model, lora, report = ready.stage.model, ready.stage.lora, ready.data.report
    mixed = None if ready.supervised is None else ready.supervised.train
    hashes = reward_hashes(ready.stage.rollout)
    scorers = sorted({each.model for each in ready.stage.rollout.rewards if each.model})
    rows = [each.rows for each in (ready.data.train, ready.data.eval, mixed) if each is not None]
    lineage = {
        "policy": {"from": model.path, "sha256": models.fingerprint(model.path)},
        "reference": model.reference and {"from": model.reference, "sha256": models.fingerprint(model.reference)},
        "adapter": lora and lora.path and {"from": lora.path, "sha256": adapter_fingerprint(lora.path)},
        **({"critic": {"from": model.critic, "sha256": models.fingerprint(model.critic)}} if model.critic else {}),
        **({"reward_models": {path: models.fingerprint(path) for path in scorers}} if scorers else {}),
        "data": {path: digest for each in rows if each is not None for path, digest in each.hashes.items()},
        **({"rewards": hashes} if hashes else {}),
        **({"parts": {title: asdict(share) for title, share in report.parts.items()}} if report.parts else {}),
        **({"removed": report.filters} if report.filters else {}),
    }
    return json.loads(json.dumps(lineage, default=str))


def _compare(config: RunConfig, folder: Path, done: Mapping[str, StageResult], say: Say) -> Comparison | None:
    if config.compare is None:
        return None
    kept = folder / "compare.json"
    found = from_first(lambda: json.loads(kept.read_text()) if kept.is_file() else None)
    if found is not None:
        return Comparison(tuple(found["prompts"]), Side(**found["before"]), Side(**found["after"]))
    last = list(done.values())[-1]
    say(f"comparing answers to {config.compare.path} before and after")
    settings = pick_stage(config, config.stages[-1].name).data
    comparison = compare(config.compare, config.stages[0].model.path, str(last.export), settings)
    if is_first():
        write_text(kept, json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return comparison


def pick_stage(config: RunConfig, name: str | None, *, trained: bool = False) -> Stage:
    """A stage by name, the first without.

    Args:
      config: the run.
      name: the stage's.
      trained: inputs from earlier stages are these stages' exports; else the model that they began with stands in,
        with the chat template that they give it, which serves to look at data.

    Raises:
      ValueError: there is no such stage, or an earlier one has not been trained.
    """
    origins: dict[str, str] = {}
    template = None
    for stage in config.stages:
        template = stage.data.chat_template_path or template
        inputs = resolve_inputs(stage, origins)
        if name in (None, stage.name):
            return replace(inputs, data=replace(inputs.data, chat_template_path=template))
        origins[stage.name] = inputs.model.path
        if trained:
            export = export_url(config, stage.name)
            if name is not None and not is_url(export) and not Path(export).is_dir():
                raise ValueError(
                    f"{export} does not exist: `jaxalign run` this config first, or judge an earlier stage"
                )
            origins[stage.name] = str(export)
    raise ValueError(f"there is no stage {name!r}; there are: {', '.join(stage.name for stage in config.stages)}")


def exported(path: str) -> str:
    """The export of a run's folder (that of its last stage), or the path itself if it is no run's folder."""
    folder = Path(path)
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return path
    names = [
        stage.get("name", "") for stage in read_config_text((folder / "config.yaml").read_text()).get("stages", [])
    ]
    export = folder / (names[-1] if names else "") / "export"
    if not export.is_dir():
        raise FileNotFoundError(f"{export}: this run has not come to its end; run it again to continue it")
    return str(export)
