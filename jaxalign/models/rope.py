"""Rotary position embeddings: their frequencies, and turning queries and keys by them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxalign.models.config import Rope, rotary_dim
from jaxalign.types import Array


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Angle per position of each rotated pair of dimensions, float32 `[rotary_dim / 2]`.

    `theta ** (-2 i / rotary_dim)`, scaled as the kind says. Source: Su et al., arXiv 2104.09864; Llama 3.1's scaling
    as in its reference code: wavelengths between the bounds are blended linearly in original_max_position /
    wavelength; LongRoPE: Ding et al., arXiv 2402.13753.
    """
    size = rotary_dim(rope, head_dim)
    base = 1.0 / rope.theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "longrope":
        return base / jnp.asarray(rope.long_factors if rope.long else rope.short_factors, jnp.float32)
    if rope.kind == "llama3":
        turns = rope.original_max_position * base / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        return base * (blend + (1 - blend) / rope.factor)
    return base


def rotate(x: Array, angles: Array, rope: Rope) -> jax.Array:
    """Rotates pairs of dimensions: i with i + rotary_dim / 2, or 2 i with 2 i + 1 where the rope is interleaved.

    Args:
      x: `[rows, length, heads, head_dim]`; what lies beyond the rope's part of a head stays as it is.
      angles: `[rows, length, rotary_dim / 2]`.
      rope: how; its `attention_factor` multiplies what is rotated.
    """
    wide, size = jnp.promote_types(x.dtype, jnp.float32), 2 * angles.shape[-1]
    sin, cos = ((wave(angles) * rope.attention_factor)[:, :, None].astype(wide) for wave in (jnp.sin, jnp.cos))
    turned, rest = x[..., :size].astype(wide), x[..., size:]
    if rope.interleaved:
        pairs = turned.reshape(*turned.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
