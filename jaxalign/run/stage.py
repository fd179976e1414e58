"""One training stage: from its config to an exported Hugging Face folder."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxalign import evaluation, models, sampling
from jaxalign.config import Stage
from jaxalign.methods.common import join_variables
from jaxalign.methods.offline import OfflineSource, make_source
from jaxalign.models.config import forward_flops
from jaxalign.run.evaluate import make_evaluate
from jaxalign.run.hardware import peak_flops
from jaxalign.run.inputs import Examples, Say, attach_reference, load_policy
from jaxalign.run.prepare import Prepared, resolve_dtype
from jaxalign.sharding import param_shardings
from jaxalign.training import loop
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.metrics import Interval, JsonLines, open_writers
from jaxalign.training.optimizer import make_optimizer
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
      export: the Hugging Face folder, or None if the stage was stopped before its end.
      reason: `completed`, `early_stopped`, `terminated`, or `done before`.
      metrics: the latest value of every metric.
    """

    name: str
    folder: Path
    export: Path | None
    reason: str
    metrics: dict[str, float]


def run_stage(ready: Prepared, folder: Path, *, say: Say, make_progress: MakeProgress | None = None) -> StageResult:
    """Trains a stage, or continues it, and exports its policy.

    Args:
      ready: the stage, its inputs resolved to paths.
      folder: where the stage's files go.
      say: takes lines for the user.
      make_progress: makes the progress bar.
    """
    stage, export = ready.stage, folder / "export"
    title = stage.name or stage.method_name
    for line in ready.data.report.lines():
        say(f"{title}: {line}")
    shape = f"{ready.num_steps} steps of {stage.train.batch_size} examples in rows of {ready.layout.length} tokens"
    say(f"{title}: {shape}, computed in {resolve_dtype(stage.model.compute_dtype)}")
    with Checkpoints(folder / "checkpoints", save_total_limit=stage.train.save_total_limit) as checkpoints:
        result = _train(ready, folder, checkpoints, say, make_progress)
    if result.reason == "terminated":
        say(f"{title}: stopped at step {result.step}, all is saved; the same command continues")
        return StageResult(stage.name, folder, None, result.reason, last_metrics(folder))
    say(f"{title}: {result.reason.replace('_', ' ')} after {result.step} steps, writing {export}")
    ends = models.end_ids(ready.model.config, ready.data.tokenizer)
    models.save(
        export,
        replace(ready.model, config=replace(ready.model.config, eos_ids=ends)),
        result.state.params,
        ready.data.tokenizer,
        dtype=stage.export.dtype or stage.model.param_dtype,
        base_model=stage.model.path,
        method=stage.method_name,
    )
    return StageResult(stage.name, folder, export, result.reason, last_metrics(folder))


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
    ready: Prepared, folder: Path, checkpoints: Checkpoints, say: Say, make_progress: MakeProgress | None
) -> loop.FitResult:
    stage = ready.stage
    optimizer, schedule = make_optimizer(stage.optimizer, ready.num_steps)
    load = functools.cache(functools.partial(load_policy, ready))
    examples = attach_reference(ready, folder, load, say)
    key = jax.random.key(stage.train.seed)
    init = functools.partial(ready.method.init, stage.method, ready.model, optimizer=optimizer, key=key)
    shapes = jax.eval_shape(lambda: init(ready.model.init(key)))
    shardings = param_shardings(ready.mesh, shapes)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes[0], shardings[0])
    restored = checkpoints.restore(like)
    if restored is None:
        # A live reference may be these very variables; else they become the state without a second copy.
        shared = examples.fill is not None and stage.model.reference in (None, stage.model.path)
        born = jax.jit(init, out_shardings=shardings, donate_argnums=() if shared else (0,))
        state, frozen = born(load(stage.model.path))
    else:
        say(f"continuing after step {restored.step}")
        state, frozen = restored.state, {}
    load.cache_clear()
    make_step = ready.method.make_step(stage.method, ready.model, optimizer, schedule)
    step = jax.jit(make_step, donate_argnums=0, out_shardings=(shardings[0], None))
    resume_step = restored.step if restored else None
    with ExitStack() as stack:
        title = stage.name or stage.method_name
        writers = open_writers(folder, stage.log.report_to, resume_step=resume_step, name=title, config=asdict(stage))
        samples = JsonLines(folder / "samples.jsonl", resume_step) if stage.log.sample_steps else None
        source = _make_source(ready, examples)
        for opened in (source, *writers, *([samples] if samples else [])):
            stack.callback(opened.close)
        evaluate = _make_evaluate(ready, examples, frozen)
        if evaluate and stage.train.eval_on_start and restored is None:
            found = Interval().add(evaluate(state)).values()
            for writer in writers:
                writer.write(0, {f"eval_{name}": value for name, value in found.items()})
        progress = make_progress(ready.num_steps, resume_step or 0, title) if make_progress else nullcontext()
        return loop.fit(
            state,
            frozen,
            step,
            source,
            _loop_config(ready),
            checkpoints=checkpoints,
            restored=restored,
            writers=writers,
            evaluate=evaluate,
            on_sample=_make_on_sample(ready, frozen) if samples else None,
            samples=samples,
            progress=stack.enter_context(progress),
        )


def _make_evaluate(ready: Prepared, examples: Examples, frozen: Variables) -> loop.Evaluate | None:
    if examples.eval is None or ready.data.eval is None:
        return None
    evaluate = make_evaluate(ready, examples.eval, ready.data.eval, examples.fill)
    return lambda state: evaluate(state.params, frozen)


def _make_source(ready: Prepared, examples: Examples) -> OfflineSource:
    data, train = ready.stage.data, ready.stage.train
    return make_source(
        ready.method,
        ready.stage.method,
        ready.data.train,
        ready.layout,
        ready.mesh,
        lookup=examples.train,
        fill=examples.fill,
        seed=data.seed,
        epochs=None,
        shuffle=data.shuffle,
        prefetch=train.prefetch,
    )


def _loop_config(ready: Prepared) -> loop.Config:
    train, log, examples = ready.stage.train, ready.stage.log, ready.data.train
    per_epoch = math.ceil(len(examples) / train.batch_size)
    mean = {name: float(lengths.mean()) for name, lengths in examples.lengths.items()}
    tokens, targets = (train.batch_size * n for n in (mean["total"], mean["total"] - mean["prompt"]))
    pass_flops = forward_flops(ready.model.config, int(tokens), int(tokens * mean["total"] / 2), int(targets))
    watched = ready.data.eval is not None
    return loop.Config(
        num_steps=ready.num_steps,
        logging_steps=log.logging_steps,
        save_steps=train.save_steps,
        eval_steps=(train.eval_steps or per_epoch) if watched else None,
        sample_steps=log.sample_steps,
        metric_for_best_model=train.metric_for_best_model if watched else None,
        greater_is_better=train.greater_is_better,
        load_best_model_at_end=train.load_best_model_at_end,
        early_stopping_patience=train.early_stopping_patience,
        early_stopping_threshold=train.early_stopping_threshold,
        samples_per_step=train.batch_size,
        flops_per_step=3.0 * pass_flops,
        peak_flops=peak_flops(ready.mesh, resolve_dtype(ready.stage.model.compute_dtype)),
    )


def _make_on_sample(ready: Prepared, frozen: Variables) -> loop.OnSample:
    """Greedy answers to the first prompts of the evaluation data (else of the training data)."""
    examples, log, tokenizer = ready.data.eval or ready.data.train, ready.stage.log, ready.data.tokenizer
    prompts = [_prompt(examples[i]) for i in range(min(log.sample_prompts, len(examples)))]
    ends = models.end_ids(ready.model.config, tokenizer)
    config = sampling.Config(temperature=0, max_new_tokens=log.sample_max_new_tokens, eos_ids=ends)
    answer = evaluation.make_answer(ready.model, tokenizer, config, batch_size=len(prompts))

    def sample(number: int, state: Any) -> Iterable[dict[str, Any]]:
        del number
        texts = answer(join_variables(state.params, frozen), prompts)
        return [{"prompt": tokenizer.decode(p), "completion": text} for p, text in zip(prompts, texts, strict=True)]

    return sample


def _prompt(example: Mapping[str, Any]) -> list[int]:
    """The tokens before the first target."""
    if "prompt_ids" in example:
        return example["prompt_ids"].tolist()
    return example["input_ids"][: max(int(example["loss_mask"].argmax()), 1)].tolist()
