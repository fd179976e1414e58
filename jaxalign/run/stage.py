"""One training stage: from its config to an exported Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxalign import models
from jaxalign.config import Stage
from jaxalign.exchange import from_first, is_first
from jaxalign.files import writing
from jaxalign.methods.common import is_online, join_variables, split_start
from jaxalign.methods.online import NoSignalError
from jaxalign.models.config import forward_flops, mean_attended
from jaxalign.rewards import RewardError
from jaxalign.run.adapting import describe_training
from jaxalign.run.bucket import Mirror
from jaxalign.run.critic import export_critic
from jaxalign.run.folder import run_folder
from jaxalign.run.hardware import peak_flops
from jaxalign.run.inputs import Say
from jaxalign.run.online import language_model
from jaxalign.run.prepare import Prepared, best_metric, steps_per_epoch
from jaxalign.run.programs import make_training
from jaxalign.run.scores import finish_scores
from jaxalign.run.start import offline_start, online_start
from jaxalign.run.stream import REMOVED, write_removed
from jaxalign.training import loop
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.metrics import Interval, JsonLines, Writer, open_writers
from jaxalign.types import Variables

Progress = Callable[[int, Mapping[str, float]], None]
# (number of steps, steps done before, the stage's title) -> what `fit` calls after every step.
MakeProgress = Callable[[int, int, str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind.

    Attributes:
      name: the stage's.
      folder: its folder.
      export: the Hugging Face folder, or its URL in a bucket; None if the stage was stopped before its end.
      reason: `completed`, `early_stopped`, `terminated`, or `done before`.
      metrics: the latest value of every metric.
    """

    name: str
    folder: Path
    export: Path | str | None
    reason: str
    metrics: dict[str, float]


def run_stage(
    ready: Prepared,
    folder: Path,
    *,
    mirror: Mirror | None = None,
    say: Say,
    make_progress: MakeProgress | None = None,
    show: loop.Show | None = None,
) -> StageResult:
    """Trains a stage, or continues it, and exports its policy.

    Args:
      ready: the stage, its inputs resolved to paths.
      folder: where the stage's files go.
      mirror: the run's folder in a bucket, if it has one there.
      say: takes lines for the user.
      make_progress: makes the progress bar.
      show: takes what is written to samples.jsonl.
    """
    stage, export = ready.stage, folder / "export"
    title = stage.name or stage.method_name
    for line in ready.data.report.lines():
        say(f"{title}: {line}")
    for line in ready.supervised.report.lines() if ready.supervised else ():
        say(f"{title}: ptx_data: {line}")
    if ready.data.removed and ready.data.stream is None:
        write_removed(folder / REMOVED, ready.data.removed)
        say(f"{title}: {len(ready.data.removed)} rows left out are in {folder / REMOVED}")
    shape = f"{ready.num_steps} steps of {stage.train.batch_size} examples in rows of {ready.layout.length} tokens"
    say(f"{title}: {shape}, computed in {ready.compute_dtype}")
    say(f"{title}: attention by {ready.attention}")
    shapes = jax.eval_shape(ready.model.init, jax.random.key(0))
    if line := describe_training(stage, ready.model.config, shapes):
        say(f"{title}: {line}")
    limit = stage.train.save_total_limit
    place = folder / "checkpoints"
    saves = Checkpoints(place, save_total_limit=limit) if mirror is None else mirror.checkpoints(stage.name, limit)
    with saves as checkpoints:
        result, frozen, trained = _train(ready, folder, checkpoints, say, make_progress, show)
    if result.reason == "terminated":
        say(f"{title}: stopped at step {result.step}, all is saved; the same command continues")
        return StageResult(stage.name, folder, None, result.reason, last_metrics(folder))
    say(f"{title}: {result.reason.replace('_', ' ')} after {result.step} steps, writing {export}")
    ends = models.end_ids(ready.model.config, ready.data.tokenizer)
    model, variables = finish_scores(ready, _exported(ready, result.state.params, frozen), say)
    if stage.lora is not None:
        adapter = folder / "adapter"
        with writing(adapter):
            models.save_adapter(adapter, model.config, variables, base_model=stage.model.path)
            if is_first():
                ready.data.tokenizer.save_pretrained(adapter)
        say(f"{title}: the adapter alone is in {adapter}")
    if stage.export.critic:
        say(f"{title}: the critic is in {export_critic(ready, folder, trained, result.state.params, frozen)}")
    origin = models.origin_of(stage.model.path)
    models.save(
        export,
        replace(model, config=replace(model.config, eos_ids=ends)),
        variables,
        ready.data.tokenizer,
        dtype=stage.export.dtype or stage.model.param_dtype,
        name=run_folder(stage, folder).name,
        base_model=origin.base_model,
        method=stage.method_name,
        licence=origin.licence,
    )
    if stage.export.critic and mirror is not None:
        mirror.push()
    given = export if mirror is None else from_first(lambda: mirror.push_export(stage.name))
    return StageResult(stage.name, folder, given, result.reason, last_metrics(folder))


def _exported(ready: Prepared, params: Any, frozen: Any) -> Variables:
    """What becomes of a stage's parameters in its export: the policy, without a critic."""
    if not is_online(ready.method):
        return join_variables(params, frozen)
    return language_model(ready, ready.method.policy_of(params, frozen))


def finished(stage: Stage, folder: Path) -> StageResult | None:
    """The result of a stage that came to its end before, or None."""
    export = folder / "export"
    if not (export / "config.json").is_file():
        return None
    return StageResult(stage.name, folder, export, "done before", last_metrics(folder))


def last_metrics(folder: Path) -> dict[str, float]:
    """The latest value of every metric in a stage's metrics.jsonl."""
    path, latest = folder / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        latest.update(json.loads(line))
    return latest


def _train(
    ready: Prepared,
    folder: Path,
    checkpoints: Checkpoints,
    say: Say,
    make_progress: MakeProgress | None,
    show: loop.Show | None,
) -> tuple[loop.FitResult, Any, Any]:
    """The result of training, what was frozen in it, and the model or models."""
    stage = ready.stage
    key = jax.random.key(stage.train.seed)
    begin = online_start(ready, key, say) if is_online(ready.method) else offline_start(ready, folder, key, say)
    training = make_training(ready, begin.model, begin.shapes, key)
    restored = checkpoints.restore(training.state)
    if restored is None:
        params, frozen = split_start(ready.method, begin.load())
        # A critic that begins as the policy is the same arrays, and none may be given away twice.
        leaves = [id(leaf) for leaf in jax.tree.leaves(params)]
        shared = begin.shared or len(set(leaves)) < len(leaves)
        # What nobody else uses becomes the state without a second copy, and what is frozen stays where it is.
        born = jax.jit(
            lambda params, frozen: training.init(join_variables(params, frozen))[0],
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, training.state),
            donate_argnums=() if shared else (0,),
        )
        state = born(params, frozen)
        del params
    else:
        say(f"continuing after step {restored.step}")
        state, frozen = restored.state, training.frozen
        if jax.tree.leaves(frozen):
            _, frozen = split_start(ready.method, begin.load())
    pieces = begin.pieces(frozen)
    resume_step = loop.written_until(restored)
    with ExitStack() as stack:
        title = stage.name or stage.method_name
        name = f"{run_folder(stage, folder).name}/{title}"
        writers = open_writers(folder, stage.log.report_to, resume_step=resume_step, name=name, config=asdict(stage))
        wanted = stage.log.sample_steps is not None
        samples = JsonLines(folder / "samples.jsonl", resume_step) if wanted and is_first() else None
        for opened in (pieces.source, *([samples] if samples else [])):
            stack.callback(opened.close)
        for writer in writers:
            stack.push(partial(_close, writer))
        if pieces.evaluate and stage.train.eval_on_start and restored is None:
            found = Interval().add(pieces.evaluate(state)).values()
            for writer in writers:
                writer.write(0, {f"eval_{name}": value for name, value in found.items()})
        progress = (
            make_progress(ready.num_steps, restored.step if restored else 0, title) if make_progress else nullcontext()
        )
        result = loop.fit(
            state,
            frozen,
            training.step,
            pieces.source,
            _loop_config(ready),
            checkpoints=checkpoints,
            restored=restored,
            writers=writers,
            evaluate=pieces.evaluate,
            on_sample=pieces.on_sample() if wanted else None,
            samples=samples,
            show=show,
            progress=stack.enter_context(progress),
            recoverable=_recoverable(ready),
        )
        return result, frozen, begin.model


def _recoverable(ready: Prepared) -> tuple[type[Exception], ...]:
    """Errors after which a stage's last step can be saved, see `loop.fit`."""
    if not is_online(ready.method):
        return ()
    # The source undoes what it began whatever went wrong, but only these are raised on every process.
    return (Exception,) if jax.process_count() == 1 else (RewardError, NoSignalError)


def _close(writer: Writer, kind: type[BaseException] | None, *_: object) -> None:
    writer.close(failed=kind is not None)


def _loop_config(ready: Prepared) -> loop.Config:
    train, log = ready.stage.train, ready.stage.log
    watched = ready.data.eval is not None
    return loop.Config(
        num_steps=ready.num_steps,
        logging_steps=log.logging_steps,
        save_steps=train.save_steps,
        eval_steps=(train.eval_steps or steps_per_epoch(ready.stage, ready.data.epoch_size)) if watched else None,
        sample_steps=log.sample_steps,
        metric_for_best_model=best_metric(ready.stage) if watched else None,
        greater_is_better=train.greater_is_better,
        load_best_model_at_end=train.load_best_model_at_end,
        early_stopping_patience=train.early_stopping_patience,
        early_stopping_threshold=train.early_stopping_threshold,
        samples_per_step=train.batch_size,
        flops_per_step=_flops_per_step(ready),
        peak_flops=peak_flops(ready.mesh, ready.compute_dtype),
    )


def _flops_per_step(ready: Prepared) -> float | None:
    """Operations of an average step; unknown where completions are yet to be drawn."""
    if is_online(ready.method):
        return None
    lengths = ready.data.train.lengths
    mean = {name: float(each.mean()) for name, each in lengths.items()}
    tokens, targets = (ready.stage.train.batch_size * n for n in (mean["total"], mean["total"] - mean["prompt"]))
    config = ready.model.config
    attended = tokens * mean_attended(config, mean["total"])
    # A frozen weight needs no gradient: the backward pass is then as dear as the forward pass, not twice as dear.
    passes = 3.0 if ready.stage.lora is None else 2.0
    return passes * forward_flops(config, int(tokens), int(attended), int(targets))
