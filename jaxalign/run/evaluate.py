"""A method's loss and metrics on a data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax

from jaxalign import data, models
from jaxalign.config import Stage
from jaxalign.methods import METHODS
from jaxalign.methods.common import for_evaluation, is_online, make_eval_step, needs_reference, split_variables
from jaxalign.methods.offline import ExampleList, OfflineSource, make_batches
from jaxalign.methods.running import carries, with_carry
from jaxalign.run.inputs import Say, attach_reference, load_policy, load_start
from jaxalign.run.online import make_judge
from jaxalign.run.prepare import Prepared, prepare
from jaxalign.run.rollout_scores import load_scoring
from jaxalign.training.metrics import Interval
from jaxalign.types import Batch, Variables


def evaluate_stage(stage: Stage, path: str | None, *, say: Say) -> dict[str, float]:
    """Loss and metrics of a stage's method on its evaluation data (else its training data), before any training.

    Of an online method: greedy answers to the prompts, scored by its rewards. What training carries along from batch to
    batch (BCO's mean reward) is here that of the policy over the data that are judged.

    Args:
      stage: the config, its inputs resolved to paths.
      path: the policy to judge; the stage's own start by default. The reference stays the stage's.
      say: takes lines for the user.
    """
    if is_online(METHODS[stage.method_name]):
        ready = prepare(stage)
        judge = make_judge(ready, load_scoring(ready), ready.data.eval or ready.data.train)
        return Interval().add(judge(_judged(ready, path, functools.partial(load_policy, ready)))).values()
    if needs_reference(METHODS[stage.method_name], stage.method):
        method = replace(stage.method, precompute_ref_log_probs=False)
        stage = replace(stage, method=method, model=replace(stage.model, reference_cache=None))
    ready = prepare(stage)
    load = functools.cache(functools.partial(load_policy, ready))
    examples = attach_reference(ready, load, say)
    policy = _judged(ready, path, load)
    judged, lookup = ready.data.train, examples.train
    if ready.data.eval is not None and examples.eval is not None:
        judged, lookup = ready.data.eval, examples.eval
    params, frozen = split_variables(policy)
    # A reward model that was normalised after training has a bias that its start has not.
    bias = models.load_config(path or stage.model.path).score_bias
    ready = replace(ready, model=ready.model.rebuild(replace(ready.model.config, score_bias=bias)))
    carry = _carry_over(ready, lookup, judged, examples.fill, policy)
    evaluate = make_evaluate(ready, lookup, judged, examples.fill, None if carry is None else lambda: carry)
    return Interval().add(evaluate(params, frozen)).values()


def _judged(ready: Prepared, path: str | None, load: Callable[[str], Variables]) -> Variables:
    """The stage's start, or another policy as it is: an export is in full, whatever its training was."""
    if path is None:
        return load_start(ready, load)
    full = replace(ready.stage, model=replace(ready.stage.model, quantization=None))
    return load_policy(replace(ready, stage=full), path)


def make_evaluate(
    ready: Prepared,
    lookup: ExampleList,
    examples: data.Examples,
    fill: Callable[[Batch], Batch] | None,
    carry: Callable[[], Any] | None = None,
) -> Callable[..., dict[str, Any]]:
    """`(params, frozen) -> metrics` over a data set: means over all its examples, not over batches.

    Args:
      ready: the stage.
      lookup: the examples as the loss wants them.
      examples: the same, as counted and measured.
      fill: see `Examples`.
      carry: gives what training carries along at that time; None = what it begins with.
    """
    config = for_evaluation(ready.method, ready.stage.method)
    step = jax.jit(make_eval_step(ready.method, config, ready.model))

    def evaluate(params: Variables, frozen: Variables) -> dict[str, Any]:
        merged = Interval()
        for plain in _batches(ready, config, lookup, examples, fill):
            now = None if carry is None else carry()
            batch = with_carry(ready.method, ready.stage.method, plain, now)
            merged = merged.add(step(params, frozen, batch))
        return dict(merged.parts)

    return evaluate


def _batches(
    ready: Prepared,
    config: Any,
    lookup: ExampleList,
    examples: data.Examples,
    fill: Callable[[Batch], Batch] | None,
) -> Iterator[Batch]:
    batches = make_batches(ready.method, config, examples, ready.layout, lookup=lookup, shuffle=False)
    source = OfflineSource(batches, ready.mesh, fill)
    try:
        for _ in range(len(batches)):
            yield source.next(None)[0]
    finally:
        source.close()


def _carry_over(
    ready: Prepared,
    lookup: ExampleList,
    examples: data.Examples,
    fill: Callable[[Batch], Batch] | None,
    policy: Variables,
) -> Any:
    """What a pass over the examples leaves behind, of a policy that stands still; None where nothing is carried."""
    config = ready.stage.method
    if not carries(ready.method, config):
        return None
    update, carry = jax.jit(ready.method.make_carry(config, ready.model)), ready.method.start_carry(config)
    for batch in _batches(ready, config, lookup, examples, fill):
        carry = update(policy, batch, carry)[1]
    return carry
