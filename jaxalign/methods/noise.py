"""NEFTune: noise on the token embeddings of each document, the same however the documents are packed or split."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import Array, TokenRows

STREAM = 0x4EF7  # sets this noise apart from what else is drawn under a step's key


def embedding_noise(rows: TokenRows, key: jax.Array, *, alpha: float, embed_dim: int) -> jax.Array:
    """Uniform noise in `±alpha / sqrt(L embed_dim)`, L the document's tokens.

    L counts the document's tokens in the row and the last target, which is read by nobody and takes no place there. The
    noise of a token is a function of the key, of all of its document's tokens and of its position alone, so that
    neither packing nor the split into micro-batches changes it; equal documents of one step get equal noise. Source:
    Jain et al., arXiv 2310.05914, algorithm 1 (where L is the example's own length; transformers takes the padded one).

    Args:
      rows: `[rows, length]`.
      key: of the optimiser step, the same for all its micro-batches.
      alpha: scale of the noise.
      embed_dim: width of an embedding.

    Returns:
      float32 `[rows, length, embed_dim]`, 0 in padding.
    """
    hashes, sizes = _describe(rows)
    base = jax.random.fold_in(key, STREAM)

    def one(document: Array, position: Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(base, document), position)
        return jax.random.uniform(own, (embed_dim,), minval=-1.0, maxval=1.0)

    noise = jax.vmap(jax.vmap(one))(hashes, rows.positions)
    scale = jnp.where(rows.documents > 0, alpha / jnp.sqrt((sizes + 1.0) * embed_dim), 0.0)
    return noise * scale[:, :, None]


def _describe(rows: TokenRows) -> tuple[jax.Array, jax.Array]:
    """Of each token's document: a hash of its tokens in their order, uint32, and how many there are in the row."""
    tokens, positions = (jnp.asarray(x).astype(jnp.uint32) for x in (rows.tokens, rows.positions))
    mixed = _mix(_mix(tokens + jnp.uint32(0x9E3779B9)) ^ (positions * jnp.uint32(0x85EBCA6B)))

    def total(values: Array, documents: Array) -> jax.Array:
        sums = jax.ops.segment_sum(values, documents, num_segments=documents.shape[0] + 1)
        return sums[documents]

    documents = jnp.asarray(rows.documents)
    return jax.vmap(total)(mixed, documents), jax.vmap(total)(jnp.ones_like(documents), documents)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 whose every output bit depends on every input bit (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
