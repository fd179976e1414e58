"""What an online stage draws with, scores with, and is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxalign import data, losses, models, sampling
from jaxalign.methods.common import has_critic
from jaxalign.methods.online import OnlineSource, Parts
from jaxalign.methods.rollout import (
    Draw,
    Pass,
    make_draw,
    padded_width,
    reward_metrics,
    rollout_metrics,
    select,
    to_experience,
)
from jaxalign.run.adapting import adapt, extended_config, longer_context
from jaxalign.run.drawing import sampling_config
from jaxalign.run.inputs import ADAPTER, HEAD, load_start
from jaxalign.run.prepare import Prepared
from jaxalign.run.programs import base_shapes, make_field_passes
from jaxalign.run.rollout_scores import Scoring, weights_of
from jaxalign.run.supervised import make_supervised
from jaxalign.sharding import Mesh, remesh
from jaxalign.training.loop import Evaluate, OnSample
from jaxalign.types import Experience, Mean, Metrics, PyTree, Variables

# No step has this number: the noise of evaluations is none of theirs.
EVALUATION = np.iinfo(np.int32).max - 2


def prompt_width(ready: Prepared) -> int:
    """Tokens of the longest prompt of the stage, rounded up."""
    sets = [each for each in (ready.data.train, ready.data.eval) if each is not None]
    return padded_width(max(int(each.lengths["prompt"].max()) for each in sets))


def draw_mesh(ready: Prepared) -> Mesh:
    """The devices with the axes' sizes that drawing has."""
    return remesh(ready.mesh, ready.stage.rollout.mesh, "rollout.mesh")


def draw_with(ready: Prepared, config: sampling.Config, width: int) -> Draw:
    """The stage's sampler."""

    def decode(ids: Sequence[int]) -> str:
        return str(ready.data.tokenizer.decode(ids))  # a stop string may be a special token

    stops = ready.stage.rollout.stop
    return make_draw(ready.model, config, draw_mesh(ready), width=width, stops=stops, decode=decode)


@dataclass(frozen=True)
class Trained:
    """What an online stage trains.

    Attributes:
      model: what the method's `init` and `make_step` take.
      shapes: the variables that `init` takes, as shapes.
      load: loads them.
      passes: per model, what says something of packed tokens, see `make_passes`.
    """

    model: Any
    shapes: Any
    load: Callable[[], Any]
    passes: dict[str, Callable[..., Any]]


def online_models(ready: Prepared, key: jax.Array, load: Callable[[str], Variables]) -> Trained:
    """The policy, and the critic where the method has one.

    Args:
      ready: the stage.
      key: the run's; a new value head is drawn with one of its own.
      load: path -> variables of the policy's model.
    """
    stage, method = ready.stage, ready.method
    logps = method.make_logps(stage.method, ready.model)
    shapes = base_shapes(ready.model, stage.model.quantization)
    passes = {
        "reference": logps,
        "policy": lambda params, frozen, batch: logps(language_model(ready, method.policy_of(params, frozen)), batch),
    }
    if not has_critic(method):
        start = jax.eval_shape(lambda variables: adapt(stage, ready.model.config, variables, key), shapes)
        return Trained(ready.model, start, lambda: load_start(ready, load), passes)
    other, head, path = None, jax.random.fold_in(key, HEAD), stage.model.critic
    if path is not None:
        config = models.load_config(path)
        config = extended_config(stage, config) if longer_context(config) else config
        other = ready.model.rebuild(replace(config, lora=ready.model.config.lora))
    made = []

    def begin(variables: Variables, critic: Variables | None) -> dict[str, Variables]:
        both, by_role = method.add_critic(
            stage.method, ready.model, variables, head, None if other is None else (other, critic)
        )
        made.append(both)
        # The critic has an adapter of its own.
        keys = {role: jax.random.fold_in(key, ADAPTER - i) for i, role in enumerate(("policy", "value"))}
        configs = {"policy": both.policy.config, "value": both.value.config}
        return {
            role: adapt(stage, configs[role], each, keys[role], continued=role == "policy" or other is None)
            for role, each in by_role.items()
        }

    by_role = jax.eval_shape(begin, shapes, None if other is None else base_shapes(other, stage.model.quantization))

    def load_both() -> dict[str, Variables]:
        critic = None
        if path is not None:
            critic = models.load(
                path, mesh=ready.mesh, param_dtype=stage.model.param_dtype, quantization=stage.model.quantization
            )[1]
        return begin(load(stage.model.path), critic)

    values = method.make_values(stage.method, made[0].value)
    passes["value"] = lambda params, frozen, batch: values(method.value_of(params, frozen), batch)
    return Trained(made[0], by_role, load_both, passes)


def make_passes(
    ready: Prepared, reference: Callable[[], Variables], functions: Mapping[str, Callable[..., Any]], frozen: PyTree
) -> dict[str, Pass]:
    """The passes that fill the method's fields.

    Args:
      ready: the stage.
      reference: loads the reference's variables; called only if the method wants them.
      functions: per model (`policy`, `value`), `(params, frozen, batch) -> [micro, rows, predictions]`; of `reference`
        `(variables, batch)`.
      frozen: the frozen variables.
    """
    found: dict[str, Pass] = {}
    for name, (role, run) in make_field_passes(ready, functions).items():
        if role == "reference":
            variables = reference()
            found[name] = lambda params, batch, run=run, variables=variables: run(variables, batch)
        else:
            found[name] = lambda params, batch, run=run: run(params, frozen, batch)
    return found


def make_online_source(
    ready: Prepared, scoring: Scoring, passes: Mapping[str, Pass], frozen: PyTree, key: jax.Array
) -> OnlineSource:
    """The source of the stage's batches."""
    stage, width = ready.stage, prompt_width(ready)
    parts = Parts(
        prompts=ready.data.train,
        draw=draw_with(ready, sampling_config(ready), width),
        policy=lambda params: language_model(ready, ready.method.policy_of(params, frozen)),
        score=partial(scoring.start, ready.data.train),
        rewards=scoring.names,
        passes=passes,
        width=width,
        supervised=make_supervised(stage, ready.supervised),
    )
    config = replace(stage.method, reward_weights=weights_of(ready, scoring))
    return OnlineSource(
        ready.method,
        config,
        parts,
        ready.layout,
        ready.mesh,
        key=key,
        seed=stage.data.seed,
        shuffle=stage.data.shuffle,
        order=ready.data.order,
    )


def make_online_evaluate(ready: Prepared, scoring: Scoring, frozen: PyTree) -> Evaluate | None:
    """The evaluation data's prompts as `make_judge` has them, None without such data."""
    if ready.data.eval is None:
        return None
    judge = make_judge(ready, scoring, ready.data.eval)
    return lambda state: judge(language_model(ready, ready.method.policy_of(state.params, frozen)))


def make_judge(ready: Prepared, scoring: Scoring, examples: data.Examples) -> Callable[[Variables], Metrics]:
    """Greedy answers to the prompts, scored: `reward`, `rewards/<name>/mean`, `completions/*`."""
    most, method = ready.stage.rollout.eval_prompts, ready.stage.method
    judged = examples if most is None else examples.select(np.arange(min(most, len(examples))))
    width = prompt_width(ready)
    # As many at once as in a rollout, so that evaluation needs no more memory.
    at_once = ready.method.rollout_prompts(method, ready.layout.batch_size) * method.num_generations
    slots = ready.stage.rollout.slots or at_once
    draw = draw_with(ready, sampling_config(ready, temperature=0.0, num_generations=1, slots=slots), width)
    prompts = [np.asarray(judged[i]["prompt_ids"]) for i in range(len(judged))]

    def parts(experience: Experience) -> Iterator[Experience]:
        # As many at once as in a rollout: the time limit is for that many.
        for first in range(0, len(prompts), at_once):
            yield select(experience, np.arange(first, min(first + at_once, len(prompts))))

    def scored(part: Experience) -> np.ndarray:
        return scoring.start(judged, part)()

    def evaluate(variables: Variables) -> Metrics:
        samples = draw(variables, prompts, jax.random.key(EVALUATION))
        experience = to_experience(prompts, np.arange(len(prompts)), samples, width, len(scoring.names))
        experience = replace(experience, scores=np.concatenate([scored(part) for part in parts(experience)]))
        total = np.asarray(losses.sum_scores(experience.scores, np.asarray(weights_of(ready, scoring))))
        known = total[~np.isnan(total)]
        per_reward = {n: m for n, m in reward_metrics(scoring.names, experience).items() if n.endswith("mean")}
        return {
            "reward": Mean(float(known.sum()), float(len(known))),
            **per_reward,
            **rollout_metrics(experience),
        }

    return evaluate


def make_online_samples(ready: Prepared, scoring: Scoring, source: OnlineSource) -> OnSample:
    """Records of the current rollout as it was drawn: the first prompts with their first completions and scores."""
    decode = ready.data.tokenizer.decode

    def sample(number: int, state: Any) -> Iterable[dict[str, Any]]:
        del number, state
        experience = source.drawn
        if experience is None:
            return []
        records = []
        for prompt in range(min(ready.stage.log.sample_prompts, len(experience.prompts))):
            c = prompt * experience.num_generations
            scores = {
                name: None if np.isnan(score) else float(score)
                for name, score in zip(scoring.names, experience.scores[c], strict=True)
            }
            records.append(
                {
                    "prompt": decode(experience.prompts[prompt, : experience.prompt_lengths[prompt]].tolist()),
                    "completion": decode(experience.tokens[c, : experience.lengths[c]].tolist()),
                    "rewards": scores,
                    "tokens": int(experience.lengths[c]),
                    "ended": bool(experience.finish[c] > 0),
                }
            )
        return records

    return sample


def language_model(ready: Prepared, variables: Variables) -> Variables:
    """The policy's variables without the head of a critic that shares its blocks."""

    def keep(tree: Any) -> Any:
        return {name: part for name, part in tree.items() if name != "score"}

    return {kind: keep(tree) if kind in ("params", "frozen") else tree for kind, tree in variables.items()}
