"""The programs of a stage with what they take, as shapes: the functions are those that `jaxalign run` calls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.methods import rollout
from jaxalign.methods.common import has_critic, is_online, needs_reference
from jaxalign.methods.offline import make_batches
from jaxalign.methods.online import pack_update
from jaxalign.methods.running import carries, make_carry_program
from jaxalign.planning.work import Work, forward_of_batch, generation_of, training_of
from jaxalign.rewards.model import CALL_TOKENS, make_reader, pack_texts
from jaxalign.run.drawing import sampling_config
from jaxalign.run.online import draw_mesh, language_model, online_models, prompt_width
from jaxalign.run.prepare import Prepared
from jaxalign.run.programs import (
    Training,
    base_shapes,
    make_field_passes,
    make_reference_pass,
    make_training,
    placed,
    placed_reference,
    start_shapes,
)
from jaxalign.run.rollout_scores import scorer_model
from jaxalign.run.scoring import reward_names
from jaxalign.run.supervised import make_supervised
from jaxalign.sharding import batch_shardings, data_shards, decode_shards, rows_sharding
from jaxalign.training.offload import HOST
from jaxalign.types import Batch, Experience, Predictions, PyTree, Samples

LOOKED_AT = 64  # batches of real data, of which the largest is planned with
PARAMETERS, OPTIMIZER, REFERENCE = "parameters", "optimizer", "reference"
COPY, DRAWING = "decoding copy", "rollout"


@dataclass(frozen=True)
class Program:
    """A jitted function of the run, and what it is called with.

    Attributes:
      name: what it does.
      run: the jitted function.
      arguments: trees of `ShapeDtypeStruct`.
      takes: held groups (see `Programs`) that are among the arguments.
      beside: held groups that are there while it runs, those that it takes among them.
      runs: how often it runs per optimiser step.
      work: what it computes when it runs once.
      trips: how often its loops run whose end is computed, by depth.
    """

    name: str
    run: Any
    arguments: tuple[Any, ...]
    takes: tuple[str, ...]
    beside: tuple[str, ...]
    work: Work
    runs: float = 1.0
    trips: tuple[int, ...] = ()

    @cached_property
    def timed(self) -> tuple[Any, float]:
        """The compiled program, and how many seconds that took; a second look costs nothing."""
        start = time.perf_counter()
        compiled = self.run.lower(*self.arguments).compile()
        return compiled, time.perf_counter() - start

    @property
    def compiled(self) -> Any:
        """The compiled program."""
        return self.timed[0]

    def result(self) -> Any:
        """What it gives, as shapes with the shardings that the compiler chose; without them where it does not fit."""
        shapes = jax.eval_shape(self.run, *self.arguments)
        try:
            places = self.compiled.output_shardings
        except jax.errors.JaxRuntimeError:
            return shapes
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


@dataclass(frozen=True)
class Programs:
    """All programs of a stage.

    Attributes:
      held: what lies on the devices between programs: trees of `ShapeDtypeStruct` by name, each array once.
      taken: the same as programs take it, where an array may come twice.
      programs: in the order of a step.
      tokens: that a step learns from.
    """

    held: Mapping[str, Any]
    taken: Mapping[str, Any]
    programs: Sequence[Program]
    tokens: int
    training: Training = field(repr=False)


def stage_programs(ready: Prepared) -> Programs:
    """The programs of a stage, uncompiled save where one gives what another takes."""
    key = jax.random.key(ready.stage.train.seed)
    return (_online if is_online(ready.method) else _offline)(ready, key)


def largest_batch(ready: Prepared) -> Batch:
    """The host batch with most cells among the first ones of the run's order."""
    data = ready.stage.data
    batches = make_batches(
        ready.method, ready.stage.method, ready.data.train, ready.layout,
        seed=data.seed, epochs=1, shuffle=data.shuffle, prefetch=0, order=ready.data.order,
    )  # fmt: skip
    found = [each.data.batch for each, _ in zip(batches, range(LOOKED_AT), strict=False)]
    batches.close()
    return max(found, key=lambda batch: (batch.rows.tokens.size, batch.predictions.sources.size))


def _offline(ready: Prepared, key: jax.Array) -> Programs:
    stage, config = ready.stage, ready.model.config
    training = make_training(ready, ready.model, start_shapes(ready, key), key)
    host = largest_batch(ready)
    batch, forward = on_mesh(ready, host), forward_of_batch(config, host)
    held, programs = _trained(training), []
    beside: tuple[str, ...] = (PARAMETERS, OPTIMIZER)
    if needs_reference(ready.method, stage.method):
        reference, once = placed_reference(ready), _once(ready)
        held[REFERENCE] = reference if once else _apart(ready, training, reference)
        beside = beside if once else (*beside, REFERENCE)
        run = make_reference_pass(ready)
        there = (REFERENCE,) if once else beside
        passed = Program("reference pass", run, (reference, batch), (REFERENCE,), there, forward, 0.0 if once else 1.0)
        programs.append(passed)
        if once:
            extra = jax.ShapeDtypeStruct(
                batch.predictions.sources.shape, np.float32, sharding=rows_sharding(ready.mesh)
            )
            batch = replace(batch, fields={**batch.fields, "ref_logps": extra})
        else:
            batch = passed.result()
    if carries(ready.method, stage.method):
        run = make_carry_program(ready.method, stage.method, ready.model)
        carry = jax.eval_shape(lambda: ready.method.start_carry(stage.method))
        arguments = (training.state.params, training.frozen, batch, carry)
        programs.append(Program("running means", run, arguments, (PARAMETERS,), beside, Work(0.0, 0.0, 0)))
        batch = programs[-1].result()[0]
    work = training_of(forward, frozen=stage.lora is not None, remat=stage.model.remat)
    arguments = (training.state, training.frozen, batch)
    programs.append(Program("train step", training.step, arguments, (PARAMETERS, OPTIMIZER), beside, work))
    taken = {
        **_trained(training),
        **({REFERENCE: placed_reference(ready)} if programs[:-1] else {}),
    }
    return Programs(held, taken, programs, forward.tokens, training)


def _online(ready: Prepared, key: jax.Array) -> Programs:
    stage, method = ready.stage, ready.method
    trained = online_models(ready, key, lambda path: {})
    training = make_training(ready, trained.model, trained.shapes, key)
    state, frozen = training.state, training.frozen
    held, taken = _trained(training), _trained(training)
    held[PARAMETERS] = (state.params, _each_once(ready, frozen))
    beside: tuple[str, ...] = (PARAMETERS, OPTIMIZER)
    if needs_reference(method, stage.method):
        taken[REFERENCE] = placed_reference(ready)
        held[REFERENCE] = _apart(ready, training, taken[REFERENCE])
        beside = (*beside, REFERENCE)
    scorers = _scorers(ready)
    for name, (_, variables) in scorers.items():
        held[name] = taken[name] = variables
        beside = (*beside, name)
    drawn = 1 / method.num_updates(stage.method)
    programs = _rollout(ready, language_model(ready, method.policy_of(state.params, frozen)), beside, drawn)
    held[COPY] = taken[COPY] = programs[1].arguments[0]
    experience = _experience(ready)
    for name, (reader, variables) in scorers.items():
        programs.append(_scoring(ready, name, reader, variables, experience, beside, drawn))
    members = np.arange(min(ready.layout.batch_size, len(experience.prompts)))
    host = rollout.pack_prompts(experience, members, ready.layout, share_prompt=stage.method.share_prompt)
    batch, parts = on_mesh(ready, host), len(experience.prompts) / len(members)
    critic = trained.model.value if has_critic(method) and "value" in state.params else None
    models = {"policy": ready.model, **({} if critic is None else {"value": critic})}
    forwards = {role: forward_of_batch(model.config, host) for role, model in models.items()}
    for name, (role, run) in make_field_passes(ready, trained.passes).items():
        variables = (taken[REFERENCE],) if role == "reference" else (state.params, frozen)
        takes = (REFERENCE,) if role == "reference" else (PARAMETERS,)
        work = forwards.get(role, forwards["policy"])
        programs.append(Program(f"{name} pass", run, (*variables, batch), takes, beside, work, drawn * parts))
        experience = replace(experience, fields={**experience.fields, name: np.zeros(experience.tokens.shape, "f")})
    update = _update(ready, experience)
    forwards = {role: forward_of_batch(model.config, update) for role, model in models.items()}
    forward = sum(forwards.values(), start=Work(0.0, 0.0, 0))
    work = training_of(forward, frozen=stage.lora is not None, remat=stage.model.remat)
    arguments = (state, frozen, on_mesh(ready, update))
    programs.append(Program("train step", training.step, arguments, (PARAMETERS, OPTIMIZER), beside, work))
    return Programs(held, taken, programs, forwards["policy"].tokens, training)


def _trained(training: Training) -> dict[str, Any]:
    state = training.state
    return {PARAMETERS: (state.params, training.frozen), OPTIMIZER: (state.opt_state, state.step, state.key)}


def _each_once(ready: Prepared, frozen: PyTree) -> PyTree:
    """The frozen variables without what a critic that begins as the policy shares with it."""
    if not has_critic(ready.method) or ready.stage.model.critic is not None or "value" not in frozen:
        return frozen
    shared = {(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(frozen["policy"])}
    own = [x for path, x in jax.tree_util.tree_leaves_with_path(frozen["value"]) if (path, x.shape) not in shared]
    return frozen["policy"], own


def _once(ready: Prepared) -> bool:
    """Whether the reference runs over all data before training, and is gone then."""
    return bool(getattr(ready.stage.method, "precompute_ref_log_probs", False))


def _apart(ready: Prepared, training: Training, reference: PyTree) -> PyTree:
    """The reference's arrays that are not the policy's own frozen ones."""
    stage = ready.stage
    if stage.model.reference not in (None, stage.model.path) or getattr(stage.method, "sync_ref_model", False):
        return reference
    frozen = training.frozen.get("policy", training.frozen)
    shared = {(path[1:], leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)}
    leaves = jax.tree_util.tree_leaves_with_path(reference)
    return [leaf for path, leaf in leaves if (path[1:], leaf.shape) not in shared]


def _rollout(ready: Prepared, policy: PyTree, beside: tuple[str, ...], runs: float) -> list[Program]:
    """Copying the parameters for decoding, and drawing."""
    method, mesh = ready.stage.method, draw_mesh(ready)
    shards = decode_shards(mesh)
    config, width = sampling_config(ready), prompt_width(ready)
    decoding, generate = rollout.draw_programs(ready.model, config, mesh)
    copying = Program(COPY, decoding, (policy,), (PARAMETERS,), beside, Work(0.0, 0.0, 0), runs)
    count = ready.method.rollout_prompts(method, ready.layout.batch_size)
    longest = _longest_prompts(ready, count)
    padded, lengths = rollout.pad_prompts([np.zeros(n, np.int32) for n in longest], width, shards)
    key = jax.eval_shape(lambda: jax.random.key(0))
    steps, own = config.max_new_tokens, len(padded) // shards * config.num_generations
    slots = min(max(1, -(-(config.slots or own * shards) // shards)), own)
    work = generation_of(ready.model.config, longest, config.num_generations, steps)
    arguments = (copying.result(), _shape(padded), _shape(lengths), key)
    # Slots are refilled as often as their share of the completions asks for; each time until the last is done.
    rounds = -(-own // slots)
    drawing = Program(DRAWING, generate, arguments, (COPY,), (*beside, COPY), work, runs, (rounds, steps))
    return [copying, drawing]


def _longest_prompts(ready: Prepared, count: int) -> np.ndarray:
    """int `[count]`, the longest prompts of the data, repeated where there are fewer."""
    longest = np.sort(ready.data.train.lengths["prompt"])[::-1]
    return np.resize(longest, count)


def _experience(ready: Prepared) -> Experience:
    """A rollout of the longest prompts, every completion as long as it may be, with scores that differ."""
    method, config = ready.method, ready.stage.method
    prompts = _longest_prompts(ready, method.rollout_prompts(config, ready.layout.batch_size))
    n, steps = len(prompts) * config.num_generations, config.max_completion_length
    table = np.zeros((n, steps), np.float32)
    samples = Samples(
        np.ones((n, steps), np.int32), np.full(n, steps, np.int32), np.ones(n, np.int32), table, table.copy()
    )
    names = reward_names(ready.stage.rollout)
    ids = [np.ones(length, np.int32) for length in prompts]
    found = rollout.to_experience(ids, np.arange(len(ids)), samples, prompt_width(ready), len(names))
    return replace(found, scores=np.random.default_rng(0).random((n, len(names))))


def _update(ready: Prepared, experience: Experience) -> Batch:
    """The first batch that an update learns from, as the run's source makes it."""
    method, config = ready.method, ready.stage.method
    weights = config.reward_weights or tuple(each.weight for each in ready.stage.rollout.rewards)
    config = replace(config, reward_weights=weights)
    estimated, _, _ = method.estimate(config, experience, method.start_carry(config))
    rng = np.random.default_rng(0)
    members = method.schedule(config, len(estimated.prompts), ready.layout.batch_size, rng)[0]
    supervised = make_supervised(ready.stage, ready.supervised)
    mixed = () if supervised is None else supervised.take(0, ready.layout.batch_size)
    return pack_update(method, config, estimated, members, ready.layout, mixed)


def _scorers(ready: Prepared) -> dict[str, tuple[Any, PyTree]]:
    """By name, the reader of each reward model and its variables."""
    found, several = {}, ready.mesh if ready.mesh.size > 1 else None
    names = reward_names(ready.stage.rollout)
    for name, each in zip(names, ready.stage.rollout.rewards, strict=True):
        if each.model is not None:
            model = scorer_model(ready, each.model)
            found[f"reward {name}"] = (model, make_reader(model, several)), placed(ready.mesh, base_shapes(model, None))
    return found


def _scoring(
    ready: Prepared,
    name: str,
    reader: Any,
    variables: PyTree,
    experience: Experience,
    beside: tuple[str, ...],
    runs: float,
) -> Program:
    model, run = reader
    lengths = np.repeat(experience.prompt_lengths, experience.num_generations) + experience.lengths
    calls = pack_texts([np.ones(n, np.int32) for n in lengths], CALL_TOKENS, data_shards(ready.mesh))
    shapes = jax.tree.map(_shape, (calls[0].rows, calls[0].sources))
    if ready.mesh.size > 1:
        shapes = jax.tree.map(_with_sharding, shapes, batch_shardings(ready.mesh, shapes))
    rows = calls[0].rows
    read = Batch(rows, _no_predictions(rows), np.zeros((1, 1)))
    work = forward_of_batch(model.config, read)
    return Program(f"{name} pass", run, (variables, *shapes), (name,), beside, work, runs * len(calls))


def _no_predictions(rows: Any) -> Any:
    none = np.full((1, rows.tokens.shape[1], 1), -1, np.int32)
    return Predictions(none, none, none, none)


def on_mesh(ready: Prepared, batch: Batch) -> Batch:
    """A host batch as shapes with the shardings that `place_batch` gives it."""
    return jax.tree.map(lambda x, s: _with_sharding(_shape(x), s), batch, batch_shardings(ready.mesh, batch))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def _with_sharding(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def device_bytes(tree: PyTree) -> int:
    """Bytes in its own memory that one device holds of a tree of `ShapeDtypeStruct` with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding is not None and leaf.sharding.memory_kind == HOST:
            continue
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape, dtype=np.int64)) * _width(leaf.dtype)
    return total


def _width(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize
