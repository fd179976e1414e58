"""What a stage trains and on what: its models, source, evaluation and samples, offline or online."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxalign import evaluation, models, sampling
from jaxalign.methods.common import join_variables, needs_reference
from jaxalign.methods.moving_reference import FollowingSource
from jaxalign.methods.offline import OfflineSource, make_source
from jaxalign.methods.online import OnlineSource
from jaxalign.methods.running import CarryingSource, carry_along
from jaxalign.run.evaluate import make_evaluate
from jaxalign.run.inputs import Examples, Say, attach_reference, load_policy, load_reference, load_start
from jaxalign.run.online import (
    make_online_evaluate,
    make_online_samples,
    make_online_source,
    make_passes,
    online_models,
)
from jaxalign.run.prepare import Prepared
from jaxalign.run.programs import start_shapes
from jaxalign.run.rollout_scores import load_scoring
from jaxalign.run.stream import make_stream_source
from jaxalign.training import loop
from jaxalign.types import Variables

Source = OfflineSource | CarryingSource | FollowingSource


@dataclass(frozen=True)
class Pieces:
    """What the loop works with, made once the state is there."""

    source: Source | OnlineSource
    evaluate: loop.Evaluate | None
    on_sample: Callable[[], loop.OnSample]


@dataclass(frozen=True)
class Start:
    """What a stage trains, before any parameter is loaded.

    Attributes:
      model: what `init` and `make_step` take.
      shapes: the variables that `init` takes, as shapes.
      load: loads them.
      shared: somebody else goes on using what `load` gives.
      pieces: frozen variables -> the loop's pieces.
    """

    model: Any
    shapes: Any
    load: Callable[[], Any]
    shared: bool
    pieces: Callable[[Any], Pieces]


def offline_start(ready: Prepared, folder: Path, key: jax.Array, say: Say) -> Start:
    """A stage that learns from a data set."""
    stage = ready.stage
    load = functools.cache(functools.partial(load_policy, ready))
    examples = attach_reference(ready, load, say)

    def pieces(frozen: Variables) -> Pieces:
        load.cache_clear()
        source = _make_source(ready, examples, frozen, folder)
        return Pieces(source, _make_evaluate(ready, examples, frozen, source), lambda: _make_on_sample(ready, frozen))

    # A live reference may be these very variables; one that moves has a copy.
    live = examples.fill is not None and examples.moving is None
    shared = live and stage.model.reference in (None, stage.model.path)
    return Start(ready.model, start_shapes(ready, key), lambda: load_start(ready, load), shared, pieces)


def online_start(ready: Prepared, key: jax.Array, say: Say) -> Start:
    """A stage that learns from its own completions."""
    stage, method = ready.stage, ready.method
    load = functools.cache(functools.partial(load_policy, ready))
    scoring = load_scoring(ready)
    trained = online_models(ready, key, load)

    def pieces(frozen: Any) -> Pieces:
        passes = make_passes(ready, lambda: load_reference(ready, load), trained.passes, frozen)
        load.cache_clear()
        source = make_online_source(ready, scoring, passes, frozen, key)
        evaluate = make_online_evaluate(ready, scoring, frozen)
        return Pieces(source, evaluate, lambda: make_online_samples(ready, scoring, source))

    if needs_reference(method, stage.method):
        say(f"{stage.name or stage.method_name}: reference from {stage.model.reference or stage.model.path}")
    shared = needs_reference(method, stage.method)
    return Start(trained.model, trained.shapes, trained.load, shared, pieces)


def _make_evaluate(ready: Prepared, examples: Examples, frozen: Variables, source: Source) -> loop.Evaluate | None:
    if examples.eval is None or ready.data.eval is None:
        return None
    carry = (lambda: source.carry) if isinstance(source, CarryingSource) else None
    judge = make_evaluate(ready, examples.eval, ready.data.eval, examples.fill, carry)

    def evaluate(state: Any) -> Mapping[str, Any]:
        if examples.moving is not None:
            examples.moving.follow(int(state.step), state.params)
        return judge(state.params, frozen)

    return evaluate


def _make_source(ready: Prepared, examples: Examples, frozen: Variables, folder: Path) -> Source:
    data, train = ready.stage.data, ready.stage.train
    if ready.data.stream is not None:
        return _accompany(ready, examples, frozen, make_stream_source(ready, ready.data.stream, examples, folder))
    source = make_source(
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
        order=ready.data.order,
    )
    return _accompany(ready, examples, frozen, source)


def _accompany(ready: Prepared, examples: Examples, frozen: Variables, source: OfflineSource) -> Source:
    """The source, with what moves along from batch to batch."""
    if examples.moving is not None:
        return FollowingSource(source, examples.moving)
    return carry_along(ready.method, ready.stage.method, ready.model, frozen, source)


def _make_on_sample(ready: Prepared, frozen: Variables) -> loop.OnSample:
    """Greedy answers to the first prompts of the evaluation data (else of the training data)."""
    examples, log, tokenizer = ready.data.eval or ready.data.train, ready.stage.log, ready.data.tokenizer
    prompts = [_prompt(examples[i]) for i in range(min(log.sample_prompts, len(examples)))]
    ends = models.end_ids(ready.model.config, tokenizer)
    config = sampling.Config(temperature=0, max_new_tokens=log.sample_max_new_tokens, eos_ids=ends)
    answer = evaluation.make_answer(ready.model, tokenizer, config)

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
