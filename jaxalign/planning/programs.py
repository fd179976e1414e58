"""The programs of a stage with what they take, as shapes: the functions are those that `jaxalign run` calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.methods import rollout
from jaxalign.methods.common import has_critic, is_online, needs_reference
from jaxalign.methods.offline import make_batches
from jaxalign.methods.online import pack_update
from jaxalign.methods.running import carries, make_carry_program
from jaxalign.planning.program import (
    COPY,
    DRAWING,
    OPTIMIZER,
    PARAMETERS,
    REFERENCE,
    Program,
    Programs,
    on_mesh,
    shape_of,
    width_of,
    with_sharding,
)
from jaxalign.planning.work import Work, forward_of_batch, generation_of, prefill_of, training_of
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
from jaxalign.sampling.generate import Queue, start
from jaxalign.sharding import Mesh, batch_shardings, data_shards, decode_shards, path_name, rows_sharding
from jaxalign.types import Batch, Experience, Predictions, PyTree, Samples

LOOKED_AT = 64  # batches of real data, of which the largest is planned with


def stage_programs(ready: Prepared) -> Programs:
    """The programs of a stage, uncompiled."""
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
    first, forward = on_mesh(ready, host), forward_of_batch(config, host)
    batch = _constant(first)  # what the next program takes
    held, programs = _trained(training), []
    beside: tuple[str, ...] = (PARAMETERS, OPTIMIZER)
    if needs_reference(ready.method, stage.method):
        reference, once = placed_reference(ready), _once(ready)
        held[REFERENCE] = reference if once else _apart(ready, training, reference)
        beside = beside if once else (*beside, REFERENCE)
        run = make_reference_pass(ready)
        there = (REFERENCE,) if once else beside
        given = _given(reference, first)
        passed = Program("reference pass", run, given, (REFERENCE,), there, forward, 0.0 if once else 1.0)
        programs.append(passed)
        if once:
            shape, place = first.predictions.sources.shape, rows_sharding(ready.mesh)
            extra = jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
            filled = replace(first, fields={**first.fields, "ref_logps": extra})
            batch = _constant(filled)
        else:
            batch = passed.result
    if carries(ready.method, stage.method):
        run = make_carry_program(ready.method, stage.method, ready.model)
        carry = jax.eval_shape(lambda: ready.method.start_carry(stage.method))
        given = partial(_with_batch, (training.state.params, training.frozen), batch, carry)
        means = Program("running means", run, given, (PARAMETERS,), beside, Work(0.0, 0.0, 0))
        programs.append(means)
        batch = partial(_first_result, means)
    work = training_of(forward, frozen=stage.lora is not None, remat=stage.model.remat)
    given = partial(_with_batch, (training.state, training.frozen), batch)
    programs.append(Program("train step", training.step, given, (PARAMETERS, OPTIMIZER), beside, work))
    taken = {
        **_trained(training),
        **({REFERENCE: placed_reference(ready)} if programs[:-1] else {}),
    }
    return Programs(held, taken, programs, forward.tokens, training)


def _given(*arguments: Any) -> Callable[[], tuple[Any, ...]]:
    return lambda: arguments


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _first_result(program: Program) -> Any:
    return program.result()[0]


def _with_batch(before: tuple[Any, ...], batch: Callable[[], Any], *after: Any) -> tuple[Any, ...]:
    return (*before, batch(), *after)


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
    held[COPY] = taken[COPY] = programs[0].result
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
        given = _given(*variables, batch)
        programs.append(Program(f"{name} pass", run, given, takes, beside, work, drawn * parts))
        experience = replace(experience, fields={**experience.fields, name: np.zeros(experience.tokens.shape, "f")})
    update = _update(ready, experience)
    forwards = {role: forward_of_batch(model.config, update) for role, model in models.items()}
    forward = sum(forwards.values(), start=Work(0.0, 0.0, 0))
    work = training_of(forward, frozen=stage.lora is not None, remat=stage.model.remat)
    given = _given(state, frozen, on_mesh(ready, update))
    programs.append(Program("train step", training.step, given, (PARAMETERS, OPTIMIZER), beside, work))
    return Programs(held, taken, programs, forwards["policy"].tokens, training)


def _trained(training: Training) -> dict[str, Any]:
    state = training.state
    return {PARAMETERS: (state.params, training.frozen), OPTIMIZER: (state.opt_state, state.step, state.key)}


def _each_once(ready: Prepared, frozen: PyTree) -> PyTree:
    """The frozen variables without what a critic that begins as the policy shares with it."""
    if not has_critic(ready.method) or ready.stage.model.critic is not None or "value" not in frozen:
        return frozen
    shared = {(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(frozen["policy"])}
    leaves = jax.tree_util.tree_leaves_with_path(frozen["value"])
    own = {path_name(path): x for path, x in leaves if (path, x.shape) not in shared}
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
    return {path_name(path): leaf for path, leaf in leaves if (path[1:], leaf.shape) not in shared}


def _rollout(ready: Prepared, policy: PyTree, beside: tuple[str, ...], runs: float) -> list[Program]:
    """Copying the parameters for decoding, and drawing."""
    method, mesh = ready.stage.method, draw_mesh(ready)
    shards = decode_shards(mesh)
    config, width = sampling_config(ready), prompt_width(ready)
    decoding, generate = rollout.draw_programs(ready.model, config, mesh)
    copying = Program(COPY, decoding, _given(policy), (PARAMETERS,), beside, Work(0.0, 0.0, 0), runs)
    count = ready.method.rollout_prompts(method, ready.layout.batch_size)
    longest = _longest_prompts(ready, count)
    padded, lengths = rollout.pad_prompts([np.zeros(n, np.int32) for n in longest], width, shards)
    key = jax.eval_shape(lambda: jax.random.key(0))
    steps, own = config.max_new_tokens, len(padded) // shards * config.num_generations
    slots = min(max(1, -(-(config.slots or own * shards) // shards)), own)
    work = generation_of(ready.model.config, longest, config.num_generations, steps)
    reading = prefill_of(ready.model.config, longest)
    drawing = Work(work.flops - reading.flops, work.computed - reading.computed, work.tokens)

    def given() -> tuple[Any, ...]:
        return copying.result(), shape_of(padded), shape_of(lengths), key

    # Slots are refilled as often as their share of the completions asks for; each time until the last is done.
    rounds = -(-own // slots)
    return [
        copying,
        Program(
            DRAWING, generate, given, (COPY,), (*beside, COPY), work, runs, (rounds, steps),
            cache=_cache_bytes(ready, config, len(padded) // shards, width, slots, mesh),
            parts={"prefill": reading, "decode": drawing},
        ),
    ]  # fmt: skip


def _cache_bytes(ready: Prepared, config: Any, prompts: int, width: int, slots: int, mesh: Mesh) -> int:
    """Bytes of the slots' cache and the pool on a device, from the sampler's own state; heads split over `tensor`."""
    model, _ = ready.model.unrolled()
    config = replace(config, cache_dtype=config.cache_dtype or ready.compute_dtype)
    count = prompts * config.num_generations
    queue = jax.eval_shape(
        lambda: Queue(jnp.zeros((prompts, width), jnp.int32), jnp.zeros(prompts, jnp.int32), jnp.zeros(count))
    )
    state = jax.eval_shape(lambda queue: start(model, config, {}, queue, slots), queue)
    tensor, heads = mesh.shape["tensor"], model.config.num_kv_heads
    parts = tensor if heads % tensor == 0 else 1
    return sum(x.size * width_of(x.dtype) for x in jax.tree.leaves((state.cache, state.pool))) // parts


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
    shapes = jax.tree.map(shape_of, (calls[0].rows, calls[0].sources))
    if ready.mesh.size > 1:
        shapes = jax.tree.map(with_sharding, shapes, batch_shardings(ready.mesh, shapes))
    rows = calls[0].rows
    read = Batch(rows, _no_predictions(rows), np.zeros((1, 1)))
    work = forward_of_batch(model.config, read)
    return Program(f"{name} pass", run, _given(variables, *shapes), (name,), beside, work, runs * len(calls))


def _no_predictions(rows: Any) -> Any:
    none = np.full((1, rows.tokens.shape[1], 1), -1, np.int32)
    return Predictions(none, none, none, none)
