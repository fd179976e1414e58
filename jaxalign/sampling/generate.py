"""The compiled sampler: one loop draws a token for every slot, and a slot that is done takes the next completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxalign.models import Cache, Model, ModelConfig, init_cache
from jaxalign.models.config import DType
from jaxalign.sampling.choose import Config, choose, stopped
from jaxalign.sharding import DECODE_AXES, decode_shards, expert_specs
from jaxalign.types import Array, Samples, TokenRows, Variables

LENGTH, EOS, STOP = 0, 1, 2

Generate = Callable[..., Samples]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Queue:
    """What is to be drawn, the same all through the loop. Completion c belongs to prompt `c // num_generations`.

    Attributes:
      prompts: int32 `[prompts, width]`, right-padded.
      lengths: int32 `[prompts]`.
      keys: `[n]` random keys of the completions: token t is drawn with `fold_in(keys, t)`.
    """

    prompts: jax.Array
    lengths: jax.Array
    keys: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the loop carries. A slot has its own place in every field that says `[slots]`.

    Attributes:
      cache: keys and values of what each slot has read: its prompt and completion up to, without, `last_token`.
      pool: those of the prompts read last, without their last tokens, until all their completions have a slot.
      pool_start: int32, number of the pool's first prompt.
      prompts_read: int32, prompts that went into the pool so far.
      admitted: int32, completions that got a slot so far; they are admitted in order.
      completion: int32 `[slots]`, the completion drawn there; n = none yet.
      last_token: int32 `[slots]`, read next.
      position: int32 `[slots]`, of `last_token` in its document; so many tokens are cached.
      step: int32 `[slots]`, tokens drawn.
      done: bool `[slots]`; a slot that is done reads and writes nothing.
      seen: bool `[slots, vocab]`, tokens of prompt and completion; `[slots, 0]` without repetition penalty.
      tokens: int32 `[n, max_new_tokens]`, drawn so far; this and the next four as in `Samples`.
      lengths: int32 `[n]`.
      finish: int32 `[n]`.
      sampler_logps: float32 `[n, max_new_tokens]`.
      log_mass: float32 `[n, max_new_tokens]`.
      counters: int32 scalars, those of this shard.
    """

    cache: Cache
    pool: Cache
    pool_start: jax.Array
    prompts_read: jax.Array
    admitted: jax.Array
    completion: jax.Array
    last_token: jax.Array
    position: jax.Array
    step: jax.Array
    done: jax.Array
    seen: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    finish: jax.Array
    sampler_logps: jax.Array
    log_mass: jax.Array
    counters: dict[str, jax.Array]


def make_generate(model: Model, config: Config, mesh: Mesh | None = None) -> Generate:
    """Builds the sampler.

    Args:
      model: the model.
      config: how completions are drawn, and in how many slots.
      mesh: splits prompts, completions and slots over its `DECODE_AXES`, all but `tensor`; a slot takes completions of
        its own shard only.

    Returns:
      `generate(variables, prompts, lengths, key, completions=None) -> Samples`, pure; the caller jits it.

      variables: as `make_decoding` gives them.
      prompts: int32 `[prompts, width]`, right-padded. Every shape compiles anew: see `bucket_width`. On a mesh the
        number of prompts is a multiple of its data shards.
      lengths: int32 `[prompts]`, tokens of each prompt. 0 = no prompt in this row: nothing is drawn. A prompt that
        leaves no room in a table of learned positions draws nothing either, and a completion ends (length) where the
        table does.
      key: a threefry key. Token t of completion c is drawn with `fold_in(fold_in(key, c), t)`, so its noise does not
        depend on what shares its batch; a key of another kind raises ValueError, as its bits would under `vmap`.
      completions: int32 `[prompts * num_generations]`, number of each completion among all that use this key; None =
        0, 1, ...

      With temperature 0, `sampler_logps` are those at temperature 1 and `log_mass` equals them: one token is kept, so
      it is drawn with log-prob 0.
    """
    model, _ = model.unrolled()
    axes: tuple[str, ...] = () if mesh is None else DECODE_AXES
    shards = 1 if mesh is None else decode_shards(mesh)

    def draw(variables: Variables, prompts: jax.Array, lengths: jax.Array, keys: jax.Array) -> Samples:
        queue = Queue(prompts, lengths, keys)
        slots = min(max(1, -(-(config.slots or len(keys) * shards) // shards)), len(keys))
        state = start(model, config, variables, queue, slots)
        body = partial(advance, model, config, variables, queue, axes)
        end = jax.lax.while_loop(partial(unfinished, queue, axes), body, state)
        counters = {name: jax.lax.psum(count, axes) if axes else count for name, count in end.counters.items()}
        counters["decode_steps"] = end.counters["decode_steps"]  # shards take their turns together
        return Samples(end.tokens, end.lengths, end.finish, end.sampler_logps, end.log_mass, counters)

    def draw_all(variables: Variables, *rest: jax.Array) -> Samples:
        if mesh is None:
            return draw(variables, *rest)
        rows = PartitionSpec(DECODE_AXES)
        counted = dict.fromkeys(COUNTERS, PartitionSpec())
        return jax.shard_map(
            draw,
            mesh=mesh,
            in_specs=(expert_specs(mesh, variables), rows, rows, rows),
            out_specs=cast("Any", Samples)(rows, rows, rows, rows, rows, counted),
            axis_names=frozenset(DECODE_AXES),
            check_vma=False,
        )(variables, *rest)

    def generate(
        variables: Variables, prompts: Array, lengths: Array, key: Array, completions: Array | None = None
    ) -> Samples:
        if (kind := str(jax.random.key_impl(key))) != "threefry2x32":
            raise ValueError(f"the key is of kind {kind}: pass jax.random.key(seed, impl='threefry2x32')")
        prompts, lengths = jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32)
        if len(prompts) % shards:
            raise ValueError(f"{len(prompts)} prompts cannot be split over {shards} shards: pad them with length 0")
        count = len(prompts) * config.num_generations
        numbers = jnp.arange(count) if completions is None else jnp.asarray(completions)
        return draw_all(variables, prompts, lengths, jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))

    return generate


COUNTERS = ("prompts_read", "refills", "decode_steps", "drawn")


def start(model: Model, config: Config, variables: Variables, queue: Queue, slots: int) -> State:
    """The state before anything is read: empty slots, an empty pool."""
    (prompts, width), n = queue.prompts.shape, len(queue.keys)
    rows = TokenRows.from_padded(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    dtype = cast("DType", config.cache_dtype or jax.eval_shape(model.apply, variables, rows)[0].dtype.name)
    # Where every completion has a slot from the start, all prompts are read at once.
    pool = prompts if slots >= n else min(prompts, -(-_refill(config, slots) // config.num_generations))
    zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros(slots, jnp.int32)
    table = (n, config.max_new_tokens)
    return State(
        cache=init_cache(model.config, slots, width + config.max_new_tokens, dtype),
        pool=init_cache(model.config, pool, width, dtype),
        pool_start=zero,
        prompts_read=zero,
        admitted=zero,
        completion=jnp.full(slots, n, jnp.int32),
        last_token=zeros,
        position=zeros,
        step=zeros,
        done=jnp.ones(slots, bool),
        seen=jnp.zeros((slots, model.config.vocab_size if config.repetition_penalty != 1 else 0), bool),
        tokens=jnp.zeros(table, jnp.int32),
        lengths=jnp.zeros(n, jnp.int32),
        finish=jnp.full(n, LENGTH, jnp.int32),
        sampler_logps=jnp.zeros(table, jnp.float32),
        log_mass=jnp.zeros(table, jnp.float32),
        counters=dict.fromkeys(COUNTERS, zero),
    )


def unfinished(queue: Queue, axes: tuple[str, ...], state: State) -> jax.Array:
    """Whether any shard still draws or has completions to draw: shards stay in step, so that they may talk."""
    return _anywhere(~state.done.all() | (state.admitted < len(queue.keys)), axes)


def advance(
    model: Model, config: Config, variables: Variables, queue: Queue, axes: tuple[str, ...], state: State
) -> State:
    """Fills free slots, then draws until that is due again."""
    filled = admit(config, queue, read_prompts(model, config, variables, queue, axes, state))
    return jax.lax.while_loop(
        lambda state: _anywhere(~state.done.all(), axes) & ~_anywhere(_wants(config, queue, state), axes),
        partial(draw_tokens, model, config, variables, queue),
        filled,
    )


def read_prompts(
    model: Model, config: Config, variables: Variables, queue: Queue, axes: tuple[str, ...], state: State
) -> State:
    """Reads the next prompts, all but their last tokens, into the pool, once the pool has served its completions.

    The loop reads a prompt's last token, so no hidden state is needed here and the head runs in one place only.
    """
    used_up = state.admitted >= state.prompts_read * config.num_generations
    size = state.pool.positions.shape[0]
    numbers = state.prompts_read + jnp.arange(size)
    prompts, lengths = (jnp.take(x, numbers, axis=0, mode="clip") for x in (queue.prompts, queue.lengths))
    real = (numbers < len(queue.prompts)) & (lengths > 0) & used_up

    def read(pool: Cache) -> Cache:
        count = jnp.where(real, lengths - 1, 0)  # their last tokens are left out
        rows = TokenRows.from_padded(prompts, (jnp.arange(prompts.shape[1])[None] < count[:, None]).astype(jnp.int32))
        nothing = init_cache(model.config, size, 0, cast("DType", pool.k[0].dtype.name))
        _, new, _ = model.apply(variables, rows, nothing)
        assert new is not None
        return jax.tree.map(lambda new, old: jnp.where(used_up, new, old), new, pool)

    # Only the pool goes through the branches: XLA would copy whatever else did.
    pool = jax.lax.cond(_anywhere(used_up, axes), read, lambda pool: pool, state.pool)
    more = jnp.where(used_up, jnp.minimum(size, len(queue.prompts) - state.prompts_read), 0)
    return replace(
        state,
        pool=pool,
        pool_start=jnp.where(used_up, state.prompts_read, state.pool_start),
        prompts_read=state.prompts_read + more,
        counters=_count(state, prompts_read=real.sum(dtype=jnp.int32)),
    )


def admit(config: Config, queue: Queue, state: State) -> State:
    """Gives free slots the next completions whose prompts are in the pool."""
    n = len(queue.keys)
    # On a mesh another shard's want may have brought us here: a full pool of ours is then served as far as it goes.
    completion = state.admitted + jnp.cumsum(state.done) - 1
    take = state.done & (completion < jnp.minimum(state.prompts_read * config.num_generations, n))
    prompt = jnp.where(take, completion, 0) // config.num_generations
    row = jnp.clip(prompt - state.pool_start, 0, state.pool.positions.shape[0] - 1)
    tokens, length = queue.prompts[prompt], queue.lengths[prompt]
    position = jnp.maximum(length - 1, 0)
    last = jnp.take_along_axis(tokens, position[:, None], axis=1)[:, 0]
    refilled = take & (state.completion < n) & (length > 0)
    seen = state.seen
    if seen.shape[1]:
        real = jnp.arange(tokens.shape[1])[None] < length[:, None]
        own = jnp.zeros_like(seen).at[jnp.arange(len(seen))[:, None], tokens].max(real)
        seen = jnp.where(take[:, None], own, seen)
    return replace(
        state,
        cache=_copy(state.cache, state.pool, row, take),
        admitted=state.admitted + take.sum(dtype=jnp.int32),
        completion=jnp.where(take, completion, state.completion),
        last_token=jnp.where(take, last, state.last_token),
        position=jnp.where(take, position, state.position),
        step=jnp.where(take, 0, state.step),
        # Without a prompt, or without room after it, nothing is drawn.
        done=jnp.where(take, length == 0, state.done),
        seen=seen,
        counters=_count(state, refills=refilled.sum(dtype=jnp.int32)),
    )


def draw_tokens(model: Model, config: Config, variables: Variables, queue: Queue, state: State) -> State:
    """Every slot that is not done reads its last token and draws the next."""
    context, n = _context(model.config), len(queue.keys)
    # A prompt may be longer than a table of positions.
    active = ~state.done & (state.position < context)
    column = active.astype(jnp.int32)[:, None]
    rows = TokenRows(
        state.last_token[:, None] * column, state.position[:, None] * column, column, jnp.zeros_like(column)
    )
    hidden, cache, _ = model.apply(variables, rows, state.cache)
    assert cache is not None
    keys = jax.vmap(jax.random.fold_in)(jnp.take(queue.keys, state.completion, mode="clip"), state.step)
    token, logps, log_mass = choose(config, model.logits(variables, hidden[:, 0]), keys, state.step, state.seen)
    place = (jnp.where(active, state.completion, n), state.step)
    tokens = state.tokens.at[place].set(token, mode="drop")
    step, position = state.step + active, state.position + active
    ended = (token[:, None] == jnp.asarray(config.eos_ids, jnp.int32)[None]).any(-1) & active
    own = jnp.take(tokens, state.completion, axis=0, mode="clip")
    stop = stopped(own, step, config.stop_sequences) & active & (step >= config.min_new_tokens)
    finish = jnp.where(ended, EOS, jnp.where(stop, STOP, LENGTH))
    seen = state.seen
    if seen.shape[1]:
        seen = seen.at[jnp.arange(len(seen)), token].max(active)
    return replace(
        state,
        cache=cache,
        last_token=token,
        position=position,
        step=step,
        done=state.done | ended | stop | (step >= config.max_new_tokens) | (position >= context),
        seen=seen,
        tokens=tokens,
        lengths=state.lengths.at[place[0]].set(step, mode="drop"),
        finish=state.finish.at[place[0]].set(finish, mode="drop"),
        sampler_logps=state.sampler_logps.at[place].set(logps, mode="drop"),
        log_mass=state.log_mass.at[place].set(log_mass, mode="drop"),
        counters=_count(state, decode_steps=jnp.ones((), jnp.int32), drawn=active.sum(dtype=jnp.int32)),
    )


def _refill(config: Config, slots: int) -> int:
    """How many slots must be free before they are filled."""
    return min(slots, config.refill or max(1, slots // 4))


def _wants(config: Config, queue: Queue, state: State) -> jax.Array:
    """Whether it is time to fill free slots: enough of them are free, some were never used, or nothing is drawn."""
    free, slots = state.done.sum(), len(state.done)
    due = (free >= _refill(config, slots)) | (state.admitted < slots) | (free == slots)
    return (state.admitted < len(queue.keys)) & (free > 0) & due


def _copy(cache: Cache, pool: Cache, row: jax.Array, take: jax.Array) -> Cache:
    """Puts prompts from the pool into the slots that take them."""
    width = pool.positions.shape[1]

    def copy(old: jax.Array, new: jax.Array) -> jax.Array:
        moved = jnp.where(take[:, None, None, None], jnp.take(new, row, axis=0), old[:, :, :width])
        return jax.lax.dynamic_update_slice(old, moved, (0, 0, 0, 0))

    rest = cache.positions.shape[1] - width
    positions = jnp.pad(jnp.take(pool.positions, row, axis=0), ((0, 0), (0, rest)), constant_values=-1)
    positions = jnp.where(take[:, None], positions, cache.positions)
    k, v = (tuple(map(copy, *both)) for both in ((cache.k, pool.k), (cache.v, pool.v)))
    return Cache(k, v, positions)


def _count(state: State, **more: jax.Array) -> dict[str, jax.Array]:
    """The counters with something added."""
    return {name: count + more.get(name, 0) for name, count in state.counters.items()}


def _anywhere(condition: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Whether the condition holds on any shard."""
    return jax.lax.pmax(condition.astype(jnp.int32), axes) > 0 if axes else condition


def _context(config: ModelConfig) -> int:
    """Positions that the model can read; rotary models have no end."""
    return config.max_position if config.learned_positions else np.iinfo(np.int32).max
