"""From logits to a token: temperature, top-k, top-p, min-p, Gumbel-max.

Order and meaning of the truncations are transformers': temperature first, then top-k, then top-p on what top-k left
(renormalised), then min-p. All is float32 and works along the last axis. Of tokens that tie at the boundary of top-k
or top-p, those with the lower ids stay.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import Array


def scale(logits: Array, temperature: float) -> jax.Array:
    """Log-probs at a temperature, float32 `[..., vocab]`; temperature 0 (greedy) gives those at 1."""
    return jax.nn.log_softmax(jnp.asarray(logits).astype(jnp.float32) / (temperature or 1.0), axis=-1)


def truncate(
    log_probs: Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """What truncation keeps of a distribution.

    Args:
      log_probs: `[..., vocab]`, normalised, temperature applied.
      top_k: how many of the most probable tokens stay; 0 = all.
      top_p: the smallest set of most probable tokens whose mass reaches it stays, at least one token; 1 = all.
      min_p: tokens at least this share as probable as the most probable one stay; 0 = all.

    Returns:
      `(kept, log_mass)`: bool `[..., vocab]` and float32 `[...]`, the log of the probability kept. An option that is
      off costs nothing; nothing sorts the vocabulary.
    """
    log_probs = jnp.asarray(log_probs).astype(jnp.float32)
    kept = jnp.ones(log_probs.shape, bool)
    if not top_k and top_p >= 1 and min_p <= 0:
        return kept, jnp.zeros(log_probs.shape[:-1], jnp.float32)
    if top_k:
        kept &= top_k_mask(log_probs, top_k)
    if top_p < 1:
        kept &= top_p_mask(jnp.where(kept, jnp.exp(log_probs), 0.0), top_p)
    if min_p > 0:
        kept &= min_p_mask(log_probs, min_p)
    return kept, jax.nn.logsumexp(log_probs, axis=-1, where=kept)


def top_k_mask(log_probs: jax.Array, k: int) -> jax.Array:
    """True for exactly the k most probable tokens (all, where the vocabulary is smaller): bool `[..., vocab]`."""
    # XLA on CPU only sees a top-k, and not a sort, where all k values are used.
    values, ids = jax.lax.optimization_barrier(jax.lax.top_k(log_probs, min(k, log_probs.shape[-1])))
    # top_k puts the lower id first among equals, so the last one kept marks the boundary.
    least, last = values[..., -1:], ids[..., -1:]
    place = jax.lax.broadcasted_iota(ids.dtype, log_probs.shape, log_probs.ndim - 1)
    return (log_probs > least) | ((log_probs == least) & (place <= last))


def top_p_mask(probs: jax.Array, p: float) -> jax.Array:
    """True for the smallest set of most probable tokens that holds a share p of the mass.

    The boundary is found by bisection on the bits of a float32, which order as the numbers do: 31 sums over the
    vocabulary instead of a sort.

    Args:
      probs: float32 `[..., vocab]`, not negative; need not add up to 1.
      p: share in (0, 1).

    Returns:
      bool `[..., vocab]`, at least one True.
    """
    target = p * probs.sum(-1, keepdims=True)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def narrow(i, least):
        raised = least | (1 << (30 - i))
        mass = jnp.where(bits >= raised, probs, 0.0).sum(-1, keepdims=True)
        return jnp.where(mass >= target, raised, least)

    # The largest bound above or at which lies at least the target.
    least = jax.lax.fori_loop(0, 31, narrow, jnp.zeros(target.shape, jnp.int32))
    mass = jnp.where(bits > least, probs, 0.0).sum(-1, keepdims=True)
    tied = bits == least
    before = jnp.cumsum(tied, axis=-1, dtype=jnp.int32) - tied
    return (bits > least) | (tied & (mass + before * jax.lax.bitcast_convert_type(least, jnp.float32) < target))


def min_p_mask(log_probs: jax.Array, p: float) -> jax.Array:
    """True where `prob >= p * largest prob`: bool `[..., vocab]`."""
    return log_probs >= log_probs.max(-1, keepdims=True) + jnp.log(jnp.float32(p))


def perturb(log_probs: jax.Array, kept: jax.Array, keys: jax.Array) -> jax.Array:
    """Adds Gumbel noise: the arg-max is a draw from the kept tokens, renormalised.

    Args:
      log_probs: `[n, vocab]`.
      kept: bool `[n, vocab]`.
      keys: `[n]`, one key per row, so that a row's noise does not depend on the others.

    Returns:
      float32 `[n, vocab]`, minus infinity where not kept. Source: Maddison et al., arXiv 1411.0030.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[-1:], jnp.float32))(keys)
    return jnp.where(kept, log_probs + noise, -jnp.inf)


def largest(x: jax.Array) -> jax.Array:
    """Index of the largest entry along the last axis, the first of equals: int32 `[...]`.

    As a maximum and a minimum, which XLA's CPU backend vectorises; its arg-max it does not.
    """
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(x == x.max(-1, keepdims=True), place, x.shape[-1] - 1).min(-1)
