"""Keys and values of tokens already read, and how a model puts new ones beside them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxalign.models.config import DType, ModelConfig
from jaxalign.types import TokenRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of tokens already read.

    Attributes:
      k: per layer `[slots, kv_heads, capacity, head_dim]`; the token at position p of a slot lies at index p. Layers
        are apart so that each is read where it lies.
      v: the same for values.
      positions: int32 `[slots, capacity]`, the token's position; -1 = empty.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    positions: jax.Array


def init_cache(config: ModelConfig, slots: int, capacity: int, dtype: DType = "float32") -> Cache:
    """An empty cache for `slots` documents of up to `capacity` tokens.

    With capacity 0 there is nothing to attend to, and `apply` returns a cache of just the rows' own tokens, each at its
    place in its row: for right-padded rows of one document that is its position.
    """
    empty = (jnp.zeros((slots, config.num_kv_heads, capacity, config.head_dim), dtype),) * config.num_layers
    return Cache(empty, empty, jnp.full((slots, capacity), -1, jnp.int32))


def layer_of(cached: tuple[jax.Array, ...], index: int | jax.Array) -> jax.Array:
    """One layer's keys or values; in a scan over layers, whose index is traced, out of a stacked copy of all."""
    return cached[index] if isinstance(index, int) else jnp.stack(cached)[index]


def write(cache: Cache, rows: TokenRows, new: list, hidden: jax.Array) -> Cache:
    """Scatters the new tokens of all layers into the cache; padding is dropped."""
    layers = [layer for each in new for layer in zip(*map(_apart, each), strict=True)]
    if not cache.positions.shape[1]:
        dtype = cache.k[0].dtype
        keys, values = zip(*((key.astype(dtype), value.astype(dtype)) for key, value in layers), strict=True)
        return Cache(keys, values, jnp.where(rows.documents > 0, rows.positions, -1))
    slots = jnp.arange(rows.tokens.shape[0])[:, None]
    # Where to write hangs on what was read last: else XLA keeps the old cache beside the new one, a copy per token.
    read = hidden[..., 0] < jnp.inf
    index = jnp.where((rows.documents > 0) & read, rows.positions, cache.positions.shape[1])

    def scatter(old, values):
        # Indexed dimensions come first: [slots, length, kv_heads, head_dim].
        return old.at[slots, :, index].set(values.astype(old.dtype).swapaxes(1, 2), mode="drop")

    return Cache(
        k=tuple(scatter(old, key) for old, (key, _) in zip(cache.k, layers, strict=True)),
        v=tuple(scatter(old, value) for old, (_, value) in zip(cache.v, layers, strict=True)),
        positions=cache.positions.at[slots, index].set(rows.positions, mode="drop"),
    )


def _apart(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """`[repeats, places, ...]` -> its layers, in order."""
    flat = stacked.reshape(-1, *stacked.shape[2:])
    return tuple(flat[i] for i in range(len(flat)))
