"""Attention over long rows block by block: no array of queries by keys is larger than a block."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.models.splash import OUTPUT_NAME
from jaxalign.types import Array


class BlockMask(Protocol):
    """Which token of a row sees which, a block at a time.

    Attributes:
      size: tokens of a block.
      needed: bool `[query blocks, key blocks]`, False where no query of the one sees a key of the other.
    """

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def needed(self) -> Array: ...  # noqa: D102

    def block(self, query: Array, key: Array) -> Array:
        """bool `[rows, size, size]`, queries before keys, of these numbers of blocks."""
        ...


def attend_blocks(
    query: Array,
    key: Array,
    value: Array,
    mask: BlockMask,
    *,
    softcap: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with a running maximum and sum over the blocks of keys; blocks that nobody needs are skipped.

    The backward pass computes the probabilities again, a block at a time. Source: Rabe and Staats, arXiv 2112.05682;
    Dao et al., arXiv 2205.14135.

    Args:
      query: `[rows, kv_heads, groups * length, head_dim]`, scaled; the heads of one group end to end. It may be whole
        blocks of the length alone: as many as `mask.needed` has query blocks.
      key: `[rows, kv_heads, length, head_dim]`.
      value: the same shape.
      mask: of these rows.
      softcap: scores s become `softcap * tanh(s / softcap)`.
      dropout: rate on the probabilities.
      dropout_key: needed when `dropout` is not 0.

    Returns:
      The query's shape and dtype; scores and sums are float32 or wider. A query that sees nothing gets 0.
    """
    count, key_count = mask.needed.shape
    # Queries of a part of the rows come in whole blocks.
    length = key.shape[2] if count == key_count else count * mask.size
    padding = [(0, 0), (0, 0), (0, key_count * mask.size - key.shape[2]), (0, 0)]
    grouped = query.reshape(*query.shape[:2], -1, length, query.shape[3])
    groups = grouped.shape[2]
    query_padding = [*[(0, 0)] * 3, (0, count * mask.size - length), (0, 0)]
    queries = _split(jnp.pad(grouped, query_padding), count)
    queries = queries.reshape(*queries.shape[:3], -1, queries.shape[-1])
    keys, values = (_split(jnp.pad(x, padding), key_count) for x in (key, value))
    drop_key = dropout_key if dropout else None
    mixed = cast(jax.Array, _attend(queries, keys, values, mask, drop_key, softcap, dropout))
    mixed = mixed.reshape(*mixed.shape[:3], groups, mask.size, -1).transpose(1, 2, 3, 0, 4, 5)
    return mixed.reshape(*grouped.shape[:3], count * mask.size, -1)[..., :length, :].reshape(query.shape)


def _split(x: Array, count: int) -> jax.Array:
    """`[..., length, head_dim]` as `[count, ..., size, head_dim]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, -1, x.shape[-1]), -3, 0)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(queries, keys, values, mask, dropout_key, softcap, dropout):
    return _forward(queries, keys, values, mask, dropout_key, softcap, dropout)[0]


def _forward(queries, keys, values, mask, dropout_key, softcap, dropout):
    wide, count = jnp.promote_types(queries.dtype, jnp.float32), len(queries)

    def attend_from(part):
        i, query = part

        def take(j, carry):
            mixed, most, total = carry
            visible = _heads_apart(mask.block(i, j), query)
            scores = _cap(jnp.einsum("rhqd,rhkd->rhqk", query, keys[j], preferred_element_type=wide), softcap)
            higher = jnp.maximum(most, jnp.where(visible, scores, -jnp.inf).max(-1))
            exps = jnp.where(visible, jnp.exp(scores - higher[..., None]), 0)
            kept = exps if dropout_key is None else exps * _keep(dropout_key, i * len(keys) + j, exps.shape, dropout)
            added = jnp.einsum("rhqk,rhkd->rhqd", kept.astype(query.dtype), values[j], preferred_element_type=wide)
            shrink = jnp.exp(most - higher)
            return mixed * shrink[..., None] + added, higher, total * shrink + exps.sum(-1)

        def step(j, carry):
            return jax.lax.cond(mask.needed[i, j], partial(take, j), lambda kept: kept, carry)

        # Any finite start below all scores will do: it cancels, and a query that sees nothing keeps a total of 0.
        start = (
            jnp.zeros(query.shape, wide),
            jnp.full(query.shape[:-1], -1e30, wide),
            jnp.zeros(query.shape[:-1], wide),
        )
        mixed, most, total = jax.lax.fori_loop(*_bounds(mask.needed[i]), step, start)
        seen = jnp.where(total > 0, total, 1)
        return (mixed / seen[..., None]).astype(query.dtype), most + jnp.log(seen)

    mixed, log_total = (checkpoint_name(x, OUTPUT_NAME) for x in jax.lax.map(attend_from, (jnp.arange(count), queries)))
    return mixed, (queries, keys, values, mask, dropout_key, mixed, log_total)


def _backward(softcap, dropout, saved, grads):
    queries, keys, values, mask, dropout_key, mixed, log_total = saved
    wide, count = jnp.promote_types(queries.dtype, jnp.float32), len(queries)

    def go_back(totals, part):
        i, query, grad, out, log_sum = part
        inner = jnp.einsum("rhqd,rhqd->rhq", grad, out, preferred_element_type=wide)

        def take(j):
            # Keys before queries, so that no product needs a transposed copy of a block.
            visible = _heads_apart(mask.block(i, j), query).swapaxes(2, 3)
            scores = _cap(jnp.einsum("rhkd,rhqd->rhkq", keys[j], query, preferred_element_type=wide), softcap)
            probs = jnp.where(visible, jnp.exp(scores - log_sum[:, :, None]), 0)
            grad_probs = jnp.einsum("rhkd,rhqd->rhkq", values[j], grad, preferred_element_type=wide)
            weights = probs
            if dropout_key is not None:
                shape = (*probs.shape[:2], probs.shape[3], probs.shape[2])
                keep = _keep(dropout_key, i * len(keys) + j, shape, dropout).swapaxes(2, 3)
                weights, grad_probs = probs * keep, grad_probs * keep
            grad_scores = probs * (grad_probs - inner[:, :, None])
            if softcap is not None:
                grad_scores *= 1 - jnp.square(scores / softcap)
            grad_scores = grad_scores.astype(query.dtype)
            of_query = jnp.einsum("rhkd,rhkq->rhdq", keys[j], grad_scores, preferred_element_type=wide).swapaxes(2, 3)
            of_key = jnp.einsum("rhkq,rhqd->rhkd", grad_scores, query, preferred_element_type=wide)
            of_value = jnp.einsum("rhkq,rhqd->rhkd", weights.astype(query.dtype), grad, preferred_element_type=wide)
            return of_query, of_key, of_value

        def skip(j):
            del j
            return jnp.zeros(query.shape, wide), *(jnp.zeros(keys.shape[1:], wide) for _ in range(2))

        def step(j, carry):
            # Only blocks pass through the branch: a carry that did would be copied whole.
            of_query, of_key, of_value = jax.lax.cond(mask.needed[i, j], take, skip, j)
            total, by_key, by_value = carry
            return total + of_query, by_key.at[j].add(of_key), by_value.at[j].add(of_value)

        total, *totals = jax.lax.fori_loop(*_bounds(mask.needed[i]), step, (jnp.zeros(query.shape, wide), *totals))
        return tuple(totals), total

    start = (jnp.zeros(keys.shape, wide), jnp.zeros(values.shape, wide))
    parts = (jnp.arange(count), queries, grads, mixed, log_total)
    (of_keys, of_values), of_queries = jax.lax.scan(go_back, start, parts)
    dtype = queries.dtype
    return of_queries.astype(dtype), of_keys.astype(dtype), of_values.astype(dtype), None, None


_attend.defvjp(_forward, _backward)


def _bounds(needed: Array) -> tuple[jax.Array, jax.Array]:
    """The first block that is needed, and the one after the last.

    Bounds that are computed also make a `while` of the loop. A `scan` of known length would be taken apart where
    layers are scanned: what does not depend on the layer, the masks, is computed beforehand and kept for all blocks.
    """
    any_needed = needed.any()
    first, end = needed.argmax(), needed.size - needed[::-1].argmax()
    return jnp.where(any_needed, first, 0).astype(jnp.int32), jnp.where(any_needed, end, 0).astype(jnp.int32)


def _heads_apart(block: Array, query: Array) -> jax.Array:
    """A mask `[rows, size, size]` for all heads: `[rows, 1, groups * size, size]`."""
    groups = query.shape[2] // block.shape[1]
    return jnp.tile(block, (1, groups, 1))[:, None]


def _cap(scores: Array, softcap: float | None) -> Any:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _keep(key: jax.Array, number: Array, shape: tuple[int, ...], dropout: float) -> jax.Array:
    """What dropout leaves of a block's probabilities, the same in both passes."""
    return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - dropout, shape) / (1 - dropout)
