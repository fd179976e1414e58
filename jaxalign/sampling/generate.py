"""The compiled sampler: prompts are read at once, then one loop draws a token for every slot until all are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models import Cache, Model, ModelConfig, init_cache
from jaxalign.sampling.logits import perturb, scale, truncate
from jaxalign.types import Array, Samples, TokenRows, Variables

LENGTH, EOS, STOP = 0, 1, 2

Generate = Callable[..., Samples]


@dataclass(frozen=True)
class Config:
    """How completions are drawn.

    Attributes:
      temperature: divides the logits; 0 = the most probable token.
      top_k: how many of the most probable tokens may be drawn; 0 = all.
      top_p: share of the probability that the most probable tokens must reach; 1 = all.
      min_p: least probability of a token, as a share of the most probable one's; 0 = all.
      max_new_tokens: longest completion in tokens, EOS included.
      eos_ids: tokens that end a completion.
      stop_sequences: token ids that end a completion; only completion tokens count.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    eos_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        """Raises ValueError on a value out of range; the field is named."""
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 = off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 = off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "stop_sequences": (all(self.stop_sequences), "without an empty sequence"),
        }
        for name, (fits, rule) in ranges.items():
            if not fits:
                raise ValueError(f"sampling {name}={getattr(self, name)!r} must be {rule}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the loop carries. A slot is one row of every field and has its own position and step.

    Attributes:
      cache: keys and values of what each slot has read: its prompt and completion up to, without, `last_token`.
      keys: `[slots]` random keys, the completion's: token t is drawn with `fold_in(keys, t)`.
      last_token: int32 `[slots]`, read next.
      position: int32 `[slots]`, of `last_token` in its document; so many tokens are cached.
      step: int32 `[slots]`, tokens drawn.
      done: bool `[slots]`; a slot that is done reads and writes nothing.
      finish: int32 `[slots]`, why it is done, as in `Samples`.
      tokens: int32 `[slots, max_new_tokens]`, drawn so far; 0 from `step` on.
      sampler_logps: float32 `[slots, max_new_tokens]`, their log-probs, as in `Samples`.
      log_mass: float32 `[slots, max_new_tokens]`, what truncation kept, as in `Samples`.
    """

    cache: Cache
    keys: jax.Array
    last_token: jax.Array
    position: jax.Array
    step: jax.Array
    done: jax.Array
    finish: jax.Array
    tokens: jax.Array
    sampler_logps: jax.Array
    log_mass: jax.Array


def make_generate(model: Model, config: Config) -> Generate:
    """Builds the sampler.

    Returns:
      `generate(variables, prompts, lengths, key, completions=None) -> Samples`, pure; the caller jits it.

      prompts: int32 `[n, width]`, right-padded. Every width and every n compiles anew: see `bucket_width`.
      lengths: int32 `[n]`, tokens of each prompt. 0 = no prompt in this row: nothing is drawn. A prompt that leaves no
        room in a table of learned positions draws nothing either, and a completion ends (length) where the table does.
      key: a threefry key. Token t of completion c is drawn with `fold_in(fold_in(key, c), t)`, so its noise does not
        depend on what shares its batch; a key of another kind raises ValueError, as its bits would under `vmap`.
      completions: int32 `[n]`, number of each row's completion among all that use this key; None = 0, 1, ...

      With temperature 0, `sampler_logps` are those at temperature 1 and `log_mass` equals them: one token is kept, so
      it is drawn with log-prob 0.
    """

    def generate(
        variables: Variables, prompts: Array, lengths: Array, key: Array, completions: Array | None = None
    ) -> Samples:
        if (kind := str(jax.random.key_impl(key))) != "threefry2x32":
            raise ValueError(f"the key is of kind {kind}: pass jax.random.key(seed, impl='threefry2x32')")
        numbers = jnp.arange(len(prompts)) if completions is None else jnp.asarray(completions)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        state = read_prompts(model, config, variables, prompts, lengths, keys)
        state = jax.lax.while_loop(
            lambda state: ~state.done.all(), lambda state: draw_tokens(model, config, variables, state), state
        )
        return Samples(state.tokens, state.step, state.finish, state.sampler_logps, state.log_mass)

    return generate


def read_prompts(
    model: Model, config: Config, variables: Variables, prompts: Array, lengths: Array, keys: jax.Array
) -> State:
    """The state before the first draw: every prompt but for its last token is in the cache.

    The loop reads the last token, so no hidden state of the prompts is needed and the head runs in one place only.
    """
    prompts, lengths = jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32)
    slots, width = prompts.shape
    cached = (jnp.arange(width)[None] < lengths[:, None] - 1).astype(jnp.int32)
    rows = TokenRows.from_padded(prompts, cached)
    dtype = jax.eval_shape(model.apply, variables, rows)[0].dtype
    empty = init_cache(model.config, slots, width + config.max_new_tokens, dtype.name)
    # Without the barrier XLA evaluates the attention to an empty cache while it compiles, which takes minutes.
    _, cache, _ = model.apply(variables, rows, jax.lax.optimization_barrier(empty))
    assert cache is not None
    position = jnp.maximum(lengths - 1, 0)
    zeros = jnp.zeros(slots, jnp.int32)
    return State(
        cache=cache,
        keys=keys,
        last_token=jnp.take_along_axis(prompts, position[:, None], axis=1)[:, 0],
        position=position,
        step=zeros,
        done=(lengths == 0) | (position >= _context(model.config)),
        finish=jnp.full(slots, LENGTH, jnp.int32),
        tokens=jnp.zeros((slots, config.max_new_tokens), jnp.int32),
        sampler_logps=jnp.zeros((slots, config.max_new_tokens), jnp.float32),
        log_mass=jnp.zeros((slots, config.max_new_tokens), jnp.float32),
    )


def draw_tokens(model: Model, config: Config, variables: Variables, state: State) -> State:
    """One step of the loop: every slot that is not done reads its last token and draws the next."""
    active = ~state.done
    column = active.astype(jnp.int32)[:, None]
    rows = TokenRows(
        state.last_token[:, None] * column, state.position[:, None] * column, column, jnp.zeros_like(column)
    )
    hidden, cache, _ = model.apply(variables, rows, state.cache)
    assert cache is not None
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.step)
    token, logps, log_mass = choose(config, model.logits(variables, hidden[:, 0]), keys)
    place = (jnp.arange(len(token)), jnp.where(active, state.step, config.max_new_tokens))
    tokens = state.tokens.at[place].set(token, mode="drop")
    step, position = state.step + active, state.position + active
    ended = (token[:, None] == jnp.asarray(config.eos_ids, jnp.int32)[None]).any(-1)
    stopped = _stopped(tokens, step, config.stop_sequences)
    full = (step >= config.max_new_tokens) | (position >= _context(model.config))
    return replace(
        state,
        cache=cache,
        last_token=token,
        position=position,
        step=step,
        done=state.done | ended | stopped | full,
        finish=jnp.where(active, jnp.where(ended, EOS, jnp.where(stopped, STOP, LENGTH)), state.finish),
        tokens=tokens,
        sampler_logps=state.sampler_logps.at[place].set(logps, mode="drop"),
        log_mass=state.log_mass.at[place].set(log_mass, mode="drop"),
    )


def choose(config: Config, logits: Array, keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token per row: logits `[n, vocab]`, keys `[n]` -> (tokens, sampler_logps, log_mass), `[n]` each."""
    log_probs = scale(logits, config.temperature)
    if config.temperature == 0:
        token = log_probs.argmax(-1).astype(jnp.int32)
    else:
        kept, log_mass = truncate(log_probs, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
        token = perturb(log_probs, kept, keys).argmax(-1).astype(jnp.int32)
    logps = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
    return token, logps, logps if config.temperature == 0 else log_mass


def _stopped(tokens: jax.Array, count: jax.Array, stops: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Whether the first `count` tokens of each row end with one of the stops."""
    found = jnp.zeros(count.shape, bool)
    for stop in stops:
        index = jnp.maximum(count[:, None] - len(stop) + jnp.arange(len(stop))[None], 0)
        last = jnp.take_along_axis(tokens, index, axis=1, mode="clip")
        found |= (count >= len(stop)) & (last == jnp.asarray(stop, jnp.int32)[None]).all(-1)
    return found


def _context(config: ModelConfig) -> int:
    """Positions that the model can read; rotary models have no end."""
    return config.max_position if config.learned_positions else np.iinfo(np.int32).max


def bucket_width(n: int, smallest: int = 16) -> int:
    """The next power of two, at least `smallest`: prompts padded to it compile in few shapes."""
    return max(smallest, 1 << max(n - 1, 0).bit_length())


def sample_prompts(
    generate: Generate, variables: Variables, prompts: Sequence[Sequence[int]], key: Array, *, batch_size: int
) -> Samples:
    """Draws one completion for each of many prompts, batch by batch, longest prompts first.

    Args:
      generate: from `make_generate`, jitted; use the same one again, as its compiled shapes live in it.
      variables: the model's.
      prompts: token ids; completion number i belongs to prompt i, so the result does not depend on `batch_size`.
      key: a threefry key.
      batch_size: most prompts at once.

    Returns:
      numpy arrays, in the prompts' order.

    Raises:
      ValueError: no prompts, or an empty one.
    """
    if not prompts:
        raise ValueError("there are no prompts to sample from")
    sizes = np.array([len(prompt) for prompt in prompts])
    if not sizes.all():
        raise ValueError(f"prompt {int(sizes.argmin())} is empty: it needs at least one token, for example BOS")
    order = np.argsort(-sizes, kind="stable")
    parts = []
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        rows = min(batch_size, bucket_width(len(members), 1))
        padded = np.zeros((rows, bucket_width(int(sizes[members].max()))), np.int32)
        lengths, completions = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        lengths[: len(members)], completions[: len(members)] = sizes[members], members
        for row, member in enumerate(members):
            padded[row, : sizes[member]] = prompts[member]
        drawn = jax.device_get(generate(variables, padded, lengths, key, completions))
        parts.append((members, drawn))
    return _in_order(parts)


def _in_order(parts: list[tuple[np.ndarray, Samples]]) -> Samples:
    """Joins batches, each with the prompts in its first rows, in the prompts' order."""
    back = np.argsort(np.concatenate([members for members, _ in parts]))
    drawn = [jax.tree.map(lambda x, count=count: x[:count], part) for count, part in ((len(m), p) for m, p in parts)]
    return jax.tree.map(lambda *x: np.concatenate(x)[back], *drawn)
