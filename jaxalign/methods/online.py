"""The source of every method that learns from its own completions: it draws, scores, estimates, and gives batches.

A rollout is kept whole, per completion, and every batch is packed from it. All that a resumed run needs is in
`state()`: the rollout with what is known of each token, how many of its updates are done, and counters. Random numbers
come from the run's key and these counters alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
# Scores that come within so many seconds are waited for, before another rollout is drawn that they may make needless.
SOON = 1.0


@dataclass(frozen=True)
class Pending:
    """Scores that come while other things are done; calling it waits for them.

    Attributes:
      collect: waits for the scores: float64 `[n, rewards]`, NaN = none.
      slow: whether they are still not there after so many seconds; says the same on all processes.
    """

    collect: Callable[[], np.ndarray]
    slow: Callable[[float], bool]

    def __call__(self) -> np.ndarray:
        """The scores."""
        return self.collect()


# Begins to score a rollout, and gives back what waits for the scores.
Score = Callable[[Experience], Callable[[], np.ndarray] | Pending]


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
        self._drawn: Experience | None = None
        self._carry: dict[str, float] = method.start_carry(config)

    def next(self, state: Any) -> tuple[Batch, dict[str, Metric | float | int]]:
        """The next batch on the mesh; draws a new rollout with the current policy when the last one is used up.

        Where it raises, the source is as it was before: what was drawn is drawn again.

        Raises:
          NoSignalError: under dynamic sampling, too few groups have different scores.
        """
        before = replace(self._progress), self._experience, self._drawn, self._carry
        try:
            return self._next(state)
        except BaseException:
            self._progress, self._experience, self._drawn, self._carry = before
            raise

    def _next(self, state: Any) -> tuple[Batch, dict[str, Metric | float | int]]:
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
        kept, drawn = ((None if each is None or used_up else asdict(each)) for each in (self._experience, self._drawn))
        return {"progress": asdict(self._progress), "carry": dict(self._carry), "experience": kept, "drawn": drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self._progress = _Progress(**{name: int(value) for name, value in state["progress"].items()})
        self._carry = {name: float(value) for name, value in state["carry"].items()}
        kept = (state["experience"], state.get("drawn"))
        self._experience, self._drawn = (None if each is None else Experience(**each) for each in kept)

    def close(self) -> None:
        """Nothing runs in the background between two calls."""

    @property
    def experience(self) -> Experience | None:
        """What the current updates learn from, None before the first rollout."""
        return self._experience

    @property
    def drawn(self) -> Experience | None:
        """What the policy drew for it, before anything was chosen: all completions of the first prompts drawn."""
        return self._experience if self._drawn is None else self._drawn

    def _members(self, update: int) -> np.ndarray:
        """Prompts of the current rollout that this update learns from."""
        assert self._experience is not None
        rng = np.random.default_rng([self._seed, self._progress.rollouts])
        return self._method.schedule(self._config, len(self._experience.prompts), self._layout.batch_size, rng)[update]

    def _take_supervised(self) -> list[Mapping[str, Any]]:
        """The next supervised examples, as many for every batch."""
        if self._parts.supervised is None:
            return []
        found = self._parts.supervised.take(self._progress.supervised, self._layout.batch_size)
        self._progress.supervised += len(found)
        return found

    def _refill(self, params: PyTree) -> dict[str, Metric | float | int]:
        jax.block_until_ready(params)  # the updates before are none of what is measured here
        times: dict[str, float] = dict.fromkeys(TIMES, 0.0)
        kept, drawn, found = self._collect(params, times)
        experience, metrics, self._carry = self._method.estimate(self._config, kept, self._carry)
        self._experience, self._progress.update = experience, 0
        # Of what the updates' completions were chosen from, the first prompts are kept, to be looked at.
        chosen = len(experience.tokens) < len(drawn.tokens)
        self._drawn = replace(select(drawn, np.arange(len(kept.prompts))), fields={}) if chosen else None
        metrics = {
            **metrics,
            **self._method.drawn_metrics(self._config, drawn),
            **reward_metrics(self._parts.rewards, drawn),
            **rollout_metrics(drawn),
        }
        return {**metrics, **found, **{name: Mean(seconds, 1.0) for name, seconds in times.items()}}

    def _collect(self, params: PyTree, times: dict[str, float]) -> tuple[Experience, Experience, dict[str, Metric]]:
        """Draws and scores until there are enough prompts that the method keeps.

        While the scores of a draw are slow to come, the next one is drawn, lest they leave too few prompts. If they
        leave enough, it is forgotten: what is learnt from is the same whether there was time for it or not.

        Returns:
          The prompts kept, with what the passes say of them; all that was drawn for them; how many were kept.
        """
        wanted = self._method.rollout_prompts(self._config, self._layout.batch_size)
        most, drawn, parts, found, useful = self._method.max_rollouts(self._config), [], [], 0, 0
        variables, ahead = self._parts.policy(params), None
        for number in range(1, most + 1):
            experience = self._draw(variables, wanted, times) if ahead is None else ahead
            ahead = None
            self._progress.position += wanted
            self._progress.rollouts += 1
            with _timed(times, "timing_s/scoring"):
                scores = self._parts.score(experience)
            if most == 1:  # scoring overlaps with the passes: nothing will be thrown away
                experience = self._run_passes(experience, params, times)
            elif number < most:
                with _timed(times, "timing_s/scoring"):
                    slow = isinstance(scores, Pending) and scores.slow(SOON)
                ahead = self._draw(variables, wanted, times) if slow else None
            with _timed(times, "timing_s/scoring"):
                experience = replace(experience, scores=scores())
            drawn.append(experience)
            kept = np.flatnonzero(self._method.keep(self._config, experience))
            useful += len(kept)
            parts.append(select(experience, kept[: wanted - found]))
            found += len(parts[-1].prompts)
            if found == wanted:
                if most == 1:
                    return join(parts), join(drawn), {}
                counts: dict[str, Metric] = {
                    "dynamic_sampling/rollouts": Mean(float(number), 1.0),
                    "dynamic_sampling/kept": Mean(float(useful), float(number * wanted)),
                }
                return self._run_passes(join(parts), params, times), join(drawn), counts
        raise NoSignalError(
            f"dynamic sampling: after {most} rollouts only {found} of {wanted} prompts have completions with different "
            f"scores. Take easier or harder prompts, or raise method.num_generations or method.max_rollouts ({most})"
        )

    def _draw(self, variables: Variables, count: int, times: dict[str, float]) -> Experience:
        """Completions of the next prompts. That they are taken is not noted here."""
        with _timed(times, "timing_s/sampling"):
            numbers = self._order.take(self._progress.position, count)
            prompts = [np.asarray(self._parts.prompts[int(i)]["prompt_ids"]) for i in numbers]
            samples = self._parts.draw(variables, prompts, jax.random.fold_in(self._key, self._progress.rollouts))
        return to_experience(prompts, numbers, samples, self._parts.width, len(self._parts.rewards))

    def _run_passes(self, experience: Experience, params: PyTree, times: dict[str, float]) -> Experience:
        share = self._config.share_prompt
        with _timed(times, "timing_s/passes"):
            return run_passes(experience, self._parts.passes, params, self._layout, self._mesh, share_prompt=share)


@contextlib.contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds spent within to `times[name]`."""
    start = time.perf_counter()
    yield
    times[name] += time.perf_counter() - start
