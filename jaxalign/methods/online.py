"""The source of every method that learns from its own completions: it draws, scores, estimates, and gives batches.

A rollout is kept whole, per completion, and every batch is packed from it. All that a resumed run needs is in
`state()`: the rollout with what is known of each token, how many of its updates are done, and counters. Random numbers
come from the run's key and these counters alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.data import MixtureOrder
from jaxalign.methods.mixing import ExampleList, Order, Supervised
from jaxalign.methods.offline import Layout
from jaxalign.methods.rollout import (
    Draw,
    Pass,
    join,
    pack_prompts,
    reward_metrics,
    rollout_metrics,
    run_passes,
    select,
    to_experience,
)
from jaxalign.sharding import place_batch
from jaxalign.types import Batch, Experience, Mean, Metric, PyTree, Variables

# No step has this number: keys of rollouts are none of the steps'.
ROLLOUTS = np.iinfo(np.int32).max - 1
TIMES = ("timing_s/sampling", "timing_s/scoring", "timing_s/passes")


# Begins to score a rollout, and gives back what waits for the scores: float64 [n, rewards], NaN = none.
Score = Callable[[Experience], Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Parts:
    """What an online source is made of.

    Attributes:
      prompts: the data; `prompt_ids` is an example's prompt.
      draw: draws completions with the policy's variables.
      policy: params of the train state -> variables of the policy.
      score: scores the completions of a rollout.
      rewards: names of the scores that a completion gets.
      passes: by the name of the field that they fill, for all fields that the method wants; those of a reference do not
        look at the params.
      width: tokens of the longest prompt.
      supervised: examples that are mixed into every batch, by the method's `to_supervised`; None = none are.
    """

    prompts: ExampleList
    draw: Draw
    policy: Callable[[PyTree], Variables]
    score: Score
    rewards: tuple[str, ...]
    passes: Mapping[str, Pass] = field(default_factory=dict)
    width: int = 0
    supervised: Supervised | None = None


def pack_update(
    method: ModuleType,
    config: Any,
    experience: Experience,
    members: np.ndarray,
    layout: Layout,
    supervised: Sequence[Mapping[str, Any]] = (),
    update: int = 0,
) -> Batch:
    """The host batch of a rollout's `update` (from 0), from some of its prompts and from supervised examples."""
    batch = pack_prompts(
        experience,
        members,
        layout,
        share_prompt=config.share_prompt,
        fields=method.fields(config),
        supervised=[method.to_supervised(each) for each in supervised],
    )
    numbers = method.batch_fields(config, experience, len(batch.present), update)
    return replace(batch, fields={**batch.fields, **numbers})


class NoSignalError(RuntimeError):
    """Dynamic sampling found too few groups whose scores differ."""


@dataclass
class _Progress:
    """Counters, all of which are saved."""

    position: int = 0  # prompts taken from the data so far
    rollouts: int = 0  # times completions were drawn so far
    update: int = 0  # updates made with the current rollout
    num_tokens: int = 0  # prompt and completion tokens trained on so far, and those of supervised examples
    supervised: int = 0  # supervised examples taken so far


class OnlineSource:
    """Batches from the policy's own completions.

    Args:
      method: a module of `METHODS` with `ONLINE`.
      config: its Config.
      parts: data, sampler, rewards.
      layout: of batches; an example is a prompt with all its completions.
      mesh: where batches go.
      key: the run's key.
      seed: of the order of prompts.
      shuffle: a new order each epoch; else the order of the data.
      order: of a mixture, which then has its own seed, shuffle and length of an epoch.
    """

    def __init__(
        self,
        method: ModuleType,
        config: Any,
        parts: Parts,
        layout: Layout,
        mesh: Mesh,
        *,
        key: jax.Array,
        seed: int = 0,
        shuffle: bool = True,
        order: MixtureOrder | None = None,
    ):
        self._order = Order(len(parts.prompts), seed, shuffle, order)
        self._method, self._config, self._parts, self._layout, self._mesh = method, config, parts, layout, mesh
        self._key, self._seed = jax.random.fold_in(key, ROLLOUTS), seed
        self._progress = _Progress()
        self._experience: Experience | None = None
        self._carry: dict[str, float] = method.start_carry(config)

    def next(self, state: Any) -> tuple[Batch, dict[str, Metric | float | int]]:
        """The next batch on the mesh; draws a new rollout with the current policy when the last one is used up.

        Raises:
          NoSignalError: under dynamic sampling, too few groups have different scores.
        """
        metrics: dict[str, Metric | float | int] = {}
        updates = self._method.num_updates(self._config)
        if self._experience is None or self._progress.update == updates:
            metrics |= self._refill(state.params)
        experience = self._experience
        assert experience is not None
        update = self._progress.update
        members, mixed = self._members(update), self._take_supervised()
        packed = pack_update(self._method, self._config, experience, members, self._layout, mixed, update)
        batch = place_batch(self._mesh, packed)
        self._progress.update += 1
        size = experience.num_generations
        own = (members[:, None] * size + np.arange(size)[None]).reshape(-1)
        tokens = size * int(experience.prompt_lengths[members].sum()) + int(experience.lengths[own].sum())
        self._progress.num_tokens += tokens + sum(len(each["input_ids"]) for each in mixed)
        metrics["num_tokens"] = self._progress.num_tokens
        metrics["episode"] = self._progress.position * self._config.num_generations
        metrics["epoch"] = self._progress.position / self._order.epoch_size
        return batch, metrics

    def state(self) -> dict[str, Any]:
        """Rollout (None where it is used up), counters and what the method carries from rollout to rollout."""
        used_up = self._progress.update == self._method.num_updates(self._config)
        kept = None if self._experience is None or used_up else asdict(self._experience)
        return {"progress": asdict(self._progress), "carry": dict(self._carry), "experience": kept}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self._progress = _Progress(**{name: int(value) for name, value in state["progress"].items()})
        self._carry = {name: float(value) for name, value in state["carry"].items()}
        kept = state["experience"]
        self._experience = None if kept is None else Experience(**kept)

    def close(self) -> None:
        """Nothing runs in the background between two calls."""

    @property
    def experience(self) -> Experience | None:
        """The current rollout, None before the first."""
        return self._experience

    def _members(self, update: int) -> np.ndarray:
        """Prompts of the current rollout that this update learns from."""
        assert self._experience is not None
        rng = np.random.default_rng([self._seed, self._progress.rollouts])
        return self._method.schedule(self._config, len(self._experience.prompts), self._layout.batch_size, rng)[update]

    def _take(self, count: int) -> np.ndarray:
        """Numbers of the next prompts."""
        self._progress.position += count
        return self._order.take(self._progress.position - count, count)

    def _take_supervised(self) -> list[Mapping[str, Any]]:
        """The next supervised examples, as many for every batch."""
        if self._parts.supervised is None:
            return []
        found = self._parts.supervised.take(self._progress.supervised, self._layout.batch_size)
        self._progress.supervised += len(found)
        return found

    def _refill(self, params: PyTree) -> dict[str, Metric | float | int]:
        times: dict[str, float] = dict.fromkeys(TIMES, 0.0)
        drawn, found = self._collect(params, times)
        experience, metrics, self._carry = self._method.estimate(self._config, drawn, self._carry)
        self._experience = experience
        self._progress.update = 0
        metrics = {**metrics, **reward_metrics(self._parts.rewards, experience), **rollout_metrics(experience)}
        return {**metrics, **found, **{name: Mean(seconds, 1.0) for name, seconds in times.items()}}

    def _collect(self, params: PyTree, times: dict[str, float]) -> tuple[Experience, dict[str, Metric]]:
        """Draws and scores until there are enough prompts that the method keeps; and how many of them that were."""
        wanted = self._method.rollout_prompts(self._config, self._layout.batch_size)
        most, parts, found, useful = self._method.max_rollouts(self._config), [], 0, 0
        variables = self._parts.policy(params)
        for drawn in range(1, most + 1):
            experience = self._draw(variables, wanted, times)
            start = time.perf_counter()
            scores = self._parts.score(experience)
            if most == 1:  # scoring overlaps with the passes: nothing will be thrown away
                experience = self._run_passes(experience, params, times)
                start = time.perf_counter()
            experience = replace(experience, scores=scores())
            times["timing_s/scoring"] += time.perf_counter() - start
            kept = np.flatnonzero(self._method.keep(self._config, experience))
            useful += len(kept)
            parts.append(select(experience, kept[: wanted - found]))
            found += len(parts[-1].prompts)
            if found == wanted:
                joined = join(parts)
                if most == 1:
                    return joined, {}
                counts: dict[str, Metric] = {
                    "dynamic_sampling/rollouts": Mean(float(drawn), 1.0),
                    "dynamic_sampling/kept": Mean(float(useful), float(drawn * wanted)),
                }
                return self._run_passes(joined, params, times), counts
        raise NoSignalError(
            f"dynamic sampling: after {most} rollouts only {found} of {wanted} prompts have completions with different "
            f"scores. Take easier or harder prompts, or raise method.num_generations or method.max_rollouts ({most})"
        )

    def _draw(self, variables: Variables, count: int, times: dict[str, float]) -> Experience:
        start = time.perf_counter()
        numbers = self._take(count)
        prompts = [np.asarray(self._parts.prompts[int(i)]["prompt_ids"]) for i in numbers]
        key = jax.random.fold_in(self._key, self._progress.rollouts)
        samples = self._parts.draw(variables, prompts, key)
        self._progress.rollouts += 1
        times["timing_s/sampling"] += time.perf_counter() - start
        return to_experience(prompts, numbers, samples, self._parts.width, len(self._parts.rewards))

    def _run_passes(self, experience: Experience, params: PyTree, times: dict[str, float]) -> Experience:
        start = time.perf_counter()
        share = self._config.share_prompt
        filled = run_passes(experience, self._parts.passes, params, self._layout, self._mesh, share_prompt=share)
        times["timing_s/passes"] += time.perf_counter() - start
        return filled
