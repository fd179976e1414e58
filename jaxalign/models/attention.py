"""The one entrance to attention, and the masks of the trunk-and-branches layout."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxalign.models import cudnn, splash
from jaxalign.models.blockwise import attend_blocks
from jaxalign.models.config import ModelConfig
from jaxalign.types import Array, TokenRows

Attention = Literal["xla", "splash", "cudnn"]

MASKED = -1e30
# Rows of so many tokens attend block by block: from there on whole score arrays, [heads, length, length] per row, are
# what fills the memory.
BLOCKWISE_FROM = 2048
BLOCK = 512


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """`rows_mask` of long rows, never computed whole; see `blockwise.BlockMask`.

    Attributes:
      rows: int32 `[rows, blocks, size]` each, padded with document 0.
      needed: bool `[query blocks, key blocks]`, False where no query of the one sees a key of the other.
      window: as in `rows_mask`.
    """

    rows: TokenRows
    needed: Array
    window: int | None = field(metadata={"static": True})

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.rows.tokens.shape[2]

    def block(self, query: Array, key: Array) -> Array:
        """`rows_mask` of these blocks, bool `[rows, size, size]`."""
        queries, keys = jax.tree.map(lambda x: x[:, query], self.rows), jax.tree.map(lambda x: x[:, key], self.rows)
        return visible(queries, keys, self.window)


Mask = Array | Blocks | splash.Segments | cudnn.Visible


class Keys(NamedTuple):
    """Keys that a query may look at.

    Attributes:
      key: `[rows, kv_heads, keys, head_dim]`: by head, as products want them, so that a cache is never transposed.
      value: the same shape.
      mask: bool `[rows, queries, keys]`, or what `MASKS` makes of rows that attend to themselves alone.
    """

    key: Array
    value: Array
    mask: Mask


def rows_mask(rows: TokenRows, window: int | None) -> Array:
    """Which token of a row sees which: bool `[rows, length, length]`, queries before keys.

    True where both share a non-zero document, the key is in the trunk or the query's own branch, the key's position is
    not later than the query's and, with a window, `query position - key position < window`.
    """
    return visible(rows, rows, window)


def self_mask(rows: TokenRows, window: int | None) -> Array | Blocks:
    """`rows_mask`, of rows of `BLOCKWISE_FROM` tokens and more in blocks."""
    return rows_mask(rows, window) if rows.tokens.shape[1] < BLOCKWISE_FROM else make_blocks(rows, window, BLOCK)


# How each implementation is told what the tokens of rows see that attend to themselves alone, and which models it does
# not serve. Splash takes only rows in which no two branches share a trunk.
MASKS: dict[str, Callable[[TokenRows, int | None, Mesh | None], Mask]] = {
    "xla": lambda rows, window, mesh: self_mask(rows, window),
    "splash": splash.segments,
    "cudnn": lambda rows, window, mesh: cudnn.Visible(rows_mask(rows, window)),
}
MISFITS: dict[str, Callable[[ModelConfig, str], str | None]] = {
    "xla": lambda config, dtype: None,
    "splash": splash.misfit,
    "cudnn": cudnn.misfit,
}
KERNELS: dict[type, Callable[..., jax.Array]] = {
    splash.Segments: splash.attend_splash,
    cudnn.Visible: cudnn.attend_cudnn,
}


def make_blocks(rows: TokenRows, window: int | None, size: int) -> Blocks:
    """`rows_mask` in blocks of `size` tokens.

    Which blocks are needed is told from the smallest and largest document and position of each, so that a few that are
    not may count as needed.
    """
    length = rows.tokens.shape[1]
    count = -(-length // size)
    pad = [(0, 0), (0, count * size - length)]
    split = jax.tree.map(lambda x: jnp.pad(x, pad).reshape(x.shape[0], count, size), rows)
    real, most = split.documents > 0, jnp.iinfo(jnp.int32).max // 2
    low, high = (
        {name: reduce(jnp.where(real, getattr(split, name), other)) for name in ("documents", "positions")}
        for reduce, other in ((lambda x: x.min(2), most), (lambda x: x.max(2), -most))
    )
    needed = low["documents"][:, :, None] <= high["documents"][:, None, :]
    needed &= low["documents"][:, None, :] <= high["documents"][:, :, None]
    needed &= low["positions"][:, None, :] <= high["positions"][:, :, None]
    if window is not None:
        needed &= low["positions"][:, :, None] - high["positions"][:, None, :] < window
    return Blocks(split, needed.any(0), window)


def visible(queries: TokenRows, keys: TokenRows, window: int | None) -> Array:
    """`rows_mask` of some tokens of rows and others: bool `[..., queries, keys]`."""
    query = jax.tree.map(lambda x: x[..., :, None], queries)
    key = jax.tree.map(lambda x: x[..., None, :], keys)
    mask = (query.documents == key.documents) & (key.documents > 0)
    mask &= (key.branches == 0) | (key.branches == query.branches)
    return mask & _in_window(query.positions, key.positions, window)


def cache_mask(rows: TokenRows, cache_positions: Array, window: int | None) -> Array:
    """Which cached token a new token sees: bool `[slots, length, capacity]`; cached position -1 = empty."""
    query, key = rows.positions[:, :, None], cache_positions[:, None, :]
    return (rows.documents[:, :, None] > 0) & (key >= 0) & _in_window(query, key, window)


def _in_window(query: Array, key: Array, window: int | None) -> Array:
    mask = key <= query
    return mask if window is None else mask & (query - key < window)


def attend(
    query: Array,
    keys: tuple[Keys, ...],
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention over one or several sets of keys at once.

    Args:
      query: `[rows, queries, heads, head_dim]`; `heads` is a multiple of the keys' `kv_heads`.
      keys: sets that are attended to together, for example a cache and the new tokens.
      scale: multiplies the scores.
      softcap: scores s become `softcap * tanh(s / softcap)`. Source: Gemma 2, arXiv 2408.00118, section 2.
      dropout: rate on the probabilities.
      dropout_key: needed when `dropout` is not 0.

    Returns:
      `[rows, queries, heads, head_dim]` in the query's dtype; scores and softmax are float32 or wider. A query that
      sees nothing gets a finite value that nobody reads.

    Raises:
      ValueError: dropout, several sets of keys, or a soft-cap, where the kernel that the mask is made for has none.
    """
    first = keys[0]
    if kernel := KERNELS.get(type(first.mask)):
        if dropout or len(keys) > 1:
            raise ValueError("model.attention: this kernel has no dropout, and takes one set of keys; use xla")
        return kernel(query, first.key, first.value, first.mask, scale=scale, softcap=softcap)
    rows, queries, heads, head_dim = query.shape
    kv_heads = first.key.shape[1]
    # Heads of one group lie beside each other as further queries: every product is then a plain batched one.
    grouped = (query * scale).reshape(rows, queries, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, head_dim)
    if isinstance(first.mask, Blocks):
        mixed = attend_blocks(
            grouped, first.key, first.value, first.mask, softcap=softcap, dropout=dropout, dropout_key=dropout_key
        )
    elif len(keys) == 1 and not dropout:
        mixed = _attend_once(grouped, *keys[0], softcap)
    else:
        mixed = _attend_many(grouped, keys, softcap, dropout, dropout_key)
    mixed = mixed.reshape(rows, kv_heads, heads // kv_heads, queries, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def cap(values: jax.Array, softcap: float | None) -> jax.Array:
    """`softcap * tanh(values / softcap)`, or the values themselves where there is none."""
    return values if softcap is None else softcap * jnp.tanh(values / softcap)


def _scores(query: Array, key: Array, mask: Array, softcap: float | None) -> jax.Array:
    """Masked `query @ key^T`, `[rows, kv_heads, groups * queries, keys]`; query and key end with their head_dim."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = cap(jnp.einsum("rhqd,rhkd->rhqk", query, key, preferred_element_type=wide), softcap)
    shape = (*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], scores.reshape(shape), MASKED).reshape(scores.shape)


def _attend_many(
    query: Array, keys: tuple[Keys, ...], softcap: float | None, dropout: float, dropout_key: jax.Array | None
) -> jax.Array:
    scores = jnp.concatenate([_scores(query, each.key, cast(Array, each.mask), softcap) for each in keys], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1)
    if dropout and dropout_key is not None:
        probs = probs * jax.random.bernoulli(dropout_key, 1 - dropout, probs.shape) / (1 - dropout)
    ends = list(itertools.accumulate(each.key.shape[2] for each in keys))
    parts = jnp.split(probs.astype(query.dtype), ends[:-1], axis=-1)
    mixed = [jnp.einsum("rhqk,rhkd->rhqd", part, each.value) for part, each in zip(parts, keys, strict=True)]
    return functools.reduce(jnp.add, mixed)


def _attend_forward(query: Array, key: Array, value: Array, mask: Array, softcap: float | None):
    scores = _scores(query, key, mask, softcap)
    most = scores.max(-1, keepdims=True)
    exps = jnp.exp(scores - most)
    total = exps.sum(-1, keepdims=True)
    mixed = jnp.einsum("rhqk,rhkd->rhqd", exps.astype(query.dtype), value, preferred_element_type=scores.dtype)
    mixed = checkpoint_name((mixed / total).astype(query.dtype), splash.OUTPUT_NAME)
    log_total = checkpoint_name((most + jnp.log(total))[..., 0], splash.OUTPUT_NAME)
    return mixed, (query, key, value, mask, mixed, log_total)


def _attend_backward(softcap, saved, grad):
    # Everything is computed keys before queries, so that no product needs a transposed copy of a [queries, keys] array.
    query, key, value, mask, mixed, log_total = saved
    scores = cap(_scores_by_key(query, key), softcap)
    probs = jnp.exp(_mask_by_key(scores, mask) - log_total[:, :, None])
    inner = jnp.einsum("rhqd,rhqd->rhq", grad, mixed, preferred_element_type=scores.dtype)
    grad_probs = jnp.einsum("rhkd,rhqd->rhkq", value, grad, preferred_element_type=scores.dtype)
    grad_scores = probs * (grad_probs - inner[:, :, None])
    if softcap is not None:
        grad_scores *= 1 - jnp.square(scores / softcap)
    grad_scores = grad_scores.astype(query.dtype)
    grad_value = jnp.einsum("rhkq,rhqd->rhkd", probs.astype(query.dtype), grad)
    grad_key = jnp.einsum("rhkq,rhqd->rhkd", grad_scores, query)
    grad_query = jnp.einsum("rhkd,rhkq->rhdq", key, grad_scores).swapaxes(2, 3)
    return grad_query, grad_key, grad_value, None


def _scores_by_key(query: Array, key: Array) -> jax.Array:
    """The transposed `_scores`, `[rows, kv_heads, keys, groups * queries]`, without mask and cap."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    return jnp.einsum("rhkd,rhqd->rhkq", key, query, preferred_element_type=wide)


def _mask_by_key(scores: Array, mask: Array) -> jax.Array:
    shape = (*scores.shape[:3], -1, mask.shape[1])
    return jnp.where(mask.swapaxes(1, 2)[:, None, :, None], scores.reshape(shape), MASKED).reshape(scores.shape)


def _attend_to_one(query: Array, key: Array, value: Array, mask: Array, softcap: float | None) -> jax.Array:
    """Attention to one set of keys; the backward pass computes the probabilities again instead of keeping them."""
    return _attend_forward(query, key, value, mask, softcap)[0]


_attend_once = jax.custom_vjp(_attend_to_one, nondiff_argnums=(4,))
_attend_once.defvjp(_attend_forward, _attend_backward)
