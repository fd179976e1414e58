"""How one token is chosen from logits, and when a completion ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxalign.sampling.logits import largest, perturb, scale, truncate
from jaxalign.types import Array


@dataclass(frozen=True)
class Config:
    """How completions are drawn.

    Attributes:
      temperature: divides the logits; 0 = the most probable token.
      top_k: how many of the most probable tokens may be drawn; 0 = all.
      top_p: share of the probability that the most probable tokens must reach; 1 = all.
      min_p: least probability of a token, as a share of the most probable one's; 0 = all.
      repetition_penalty: divides the positive and multiplies the negative logits of tokens that the prompt or the
        completion has (Keskar et al., arXiv 1909.05858); 1 = off.
      min_new_tokens: tokens drawn before a completion may end by EOS or a stop sequence.
      max_new_tokens: longest completion in tokens, EOS included.
      eos_ids: tokens that end a completion.
      stop_sequences: token ids that end a completion; only completion tokens count.
      num_generations: completions per prompt; the prompt is read once for all of them.
      slots: completions drawn at the same time, over all devices; None = all.
      refill: how many slots must be free before they take new completions, per data shard; None = a quarter of them.
      cache_dtype: of cached keys and values; None = that of the activations.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    max_new_tokens: int = 256
    eos_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    num_generations: int = 1
    slots: int | None = None
    refill: int | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self):
        """Raises ValueError on a value out of range; the field is named."""
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 = off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 = off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 = off)"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "stop_sequences": (all(self.stop_sequences), "without an empty sequence"),
            "num_generations": (self.num_generations >= 1, "at least 1"),
            "slots": (self.slots is None or self.slots >= 1, "at least 1"),
            "refill": (self.refill is None or self.refill >= 1, "at least 1"),
        }
        for name, (fits, rule) in ranges.items():
            if not fits:
                raise ValueError(f"sampling {name}={getattr(self, name)!r} must be {rule}")


def choose(
    config: Config, logits: Array, keys: jax.Array, step: Array, seen: Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
      config: how.
      logits: float32 `[n, vocab]`.
      keys: `[n]`.
      step: int32 `[n]`, tokens drawn before.
      seen: bool `[n, vocab]`, tokens that the repetition penalty is for; not read without one.

    Returns:
      `(tokens, sampler_logps, log_mass)`, `[n]` each, as in `Samples`: penalties and forbidden ends are part of
      `log_mass`, as truncation is.
    """
    log_probs = scale(logits, config.temperature)
    allowed = log_probs
    if config.repetition_penalty != 1:
        penalised = jnp.where(logits < 0, logits * config.repetition_penalty, logits / config.repetition_penalty)
        allowed = scale(jnp.where(seen, penalised, logits), config.temperature)
    if config.min_new_tokens and config.eos_ids:
        early = (step < config.min_new_tokens)[:, None]
        ends = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(config.eos_ids)].set(True)
        allowed = jnp.where(early & ends[None], -jnp.inf, allowed)
        allowed = allowed - jax.nn.logsumexp(allowed, axis=-1, keepdims=True)
    if config.temperature == 0:
        token = largest(allowed)
    else:
        kept, log_mass = truncate(allowed, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
        token = largest(perturb(allowed, kept, keys))
    logps = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
    if config.temperature == 0:
        return token, logps, logps
    if allowed is not log_probs:
        # Drawn with log-prob allowed - log_mass: what is stored must give that from `logps`.
        log_mass = log_mass + logps - jnp.take_along_axis(allowed, token[:, None], axis=-1)[:, 0]
    return token, logps, log_mass


def stopped(tokens: jax.Array, count: jax.Array, stops: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Whether the first `count` tokens of each row end with one of the stops."""
    found = jnp.zeros(count.shape, bool)
    for stop in stops:
        index = jnp.maximum(count[:, None] - len(stop) + jnp.arange(len(stop))[None], 0)
        last = jnp.take_along_axis(tokens, index, axis=1, mode="clip")
        found |= (count >= len(stop)) & (last == jnp.asarray(stop, jnp.int32)[None]).all(-1)
    return found
