"""The one entrance to attention, and the masks of the trunk-and-branches layout."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Array, TokenRows

MASKED = -1e30


class Keys(NamedTuple):
    """Keys that a query may look at: `key` and `value` `[rows, keys, kv_heads, head_dim]`, `mask` `[rows, queries, keys]`."""

    key: Array
    value: Array
    mask: Array


def rows_mask(rows: TokenRows, window: int | None) -> jax.Array:
    """Which token of a row sees which: bool `[rows, length, length]`, queries before keys.

    True where both share a non-zero document, the key is in the trunk or the query's own branch, the key's position is
    not later than the query's and, with a window, `query position - key position < window`.
    """
    query = jax.tree.map(lambda x: x[..., :, None], rows)
    key = jax.tree.map(lambda x: x[..., None, :], rows)
    mask = (query.documents == key.documents) & (key.documents > 0)
    mask &= (key.branches == 0) | (key.branches == query.branches)
    return mask & _in_window(query.positions, key.positions, window)


def cache_mask(rows: TokenRows, cache_positions: Array, window: int | None) -> jax.Array:
    """Which cached token a new token sees: bool `[slots, length, capacity]`; cached position -1 = empty."""
    query, key = rows.positions[:, :, None], cache_positions[:, None, :]
    return (rows.documents[:, :, None] > 0) & (key >= 0) & _in_window(query, key, window)


def _in_window(query: Array, key: Array, window: int | None) -> jax.Array:
    mask = key <= query
    return mask if window is None else mask & (query - key < window)


def attend(
    query: Array, keys: tuple[Keys, ...], *, scale: float, dropout: float = 0.0, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Softmax attention over one or several sets of keys at once.

    Args:
      query: `[rows, queries, heads, head_dim]`; `heads` is a multiple of the keys' `kv_heads`.
      keys: sets that are attended to together, for example a cache and the new tokens.
      scale: multiplies the scores.
      dropout: rate on the probabilities.
      dropout_key: needed when `dropout` is not 0.

    Returns:
      `[rows, queries, heads, head_dim]` in the query's dtype; scores and softmax are float32 or wider. A query that sees
      nothing gets a finite value that nobody reads.
    """
    rows, queries, heads, head_dim = query.shape
    kv_heads = keys[0].key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = (query * scale).reshape(rows, queries, kv_heads, heads // kv_heads, head_dim)
    scores = [
        jnp.where(
            each.mask[:, None, None],
            jnp.einsum("rqhgd,rkhd->rhgqk", grouped, each.key, preferred_element_type=wide),
            MASKED,
        )
        for each in keys
    ]
    probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1) if len(scores) > 1 else scores[0], axis=-1)
    if dropout and dropout_key is not None:
        probs = probs * jax.random.bernoulli(dropout_key, 1 - dropout, probs.shape) / (1 - dropout)
    probs = probs.astype(query.dtype)
    mixed, start = None, 0
    for each in keys:
        part = probs[..., start : start + each.key.shape[1]]
        one = jnp.einsum("rhgqk,rkhd->rqhgd", part, each.value)
        mixed, start = one if mixed is None else mixed + one, start + each.key.shape[1]
    return mixed.reshape(query.shape)
