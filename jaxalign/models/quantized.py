"""Frozen weights in 8 or 4 bits: blocks along the inputs, one float32 scale each; every use takes them apart anew.

A quantised projection has the leaves `values` and `scales` where a plain one has `kernel`; the dtype of `values` says
which kind it is. qwix has the same mathematics, but keeps nf4 in arrays of `uint4`, which on CPU take a byte per
weight, and its product would be saved for the backward pass at full precision: what is below would be needed anyway.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.projections import axes_of, copy_tree, projections, put
from jaxalign.types import Array

Quantization = Literal["int8", "nf4"]
BLOCK = 64
# The 16 levels of NormalFloat4: quantiles of a normal distribution, scaled to [-1, 1], 0 among them. Source: Dettmers
# et al., arXiv 2305.14314, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Kind(NamedTuple):
    """How blocks `[..., blocks, block, outputs]` are kept.

    Attributes:
      dtype: of what is stored.
      per_byte: weights in a byte.
      peak: the level that a block's largest weight has.
      encode: weights over their block's scale, float32 -> `dtype`, `[..., blocks, block / per_byte, outputs]`.
      decode: the inverse.
    """

    dtype: Any
    per_byte: int
    peak: float
    encode: Callable[[Array], jax.Array]
    decode: Callable[[Array], jax.Array]


def quantize(kernel: Array, kind: str, axes: tuple[int, int]) -> dict[str, jax.Array]:
    """A kernel as `values` and `scales`: `weight = level(value) * scale`, the largest weight of a block exact.

    `int8` has the levels -127 .. 127, and 127 is the block's largest weight: an error of at most 1/254 of it. `nf4` has
    `NF4`: at most 0.152 of it. A block is `block_size` weights of one output, along the last input axis.

    Args:
      kernel: `[..., *inputs, *outputs]`, float.
      kind: key of `KINDS`.
      axes: how many axes are inputs, and how many outputs.

    Returns:
      `values`, of the kernel's shape (for nf4 the last input axis half as long: two weights share a byte), and `scales`
      float32, one per block on that axis.

    Raises:
      ValueError: the last input axis has no block size.
    """
    how, last = KINDS[kind], kernel.ndim - axes[1] - 1
    lead, length, outputs = kernel.shape[:last], kernel.shape[last], kernel.shape[last + 1 :]
    blocks = kernel.reshape(*lead, -1, block_size(length), math.prod(outputs)).astype(jnp.float32)
    scales = jnp.abs(blocks).max(-2, keepdims=True) / how.peak
    values = how.encode(blocks / jnp.where(scales > 0, scales, 1))
    return {
        "values": values.reshape(*lead, length // how.per_byte, *outputs),
        "scales": scales.reshape(*lead, -1, *outputs),
    }


def quantize_params(params: Any, kind: str) -> dict:
    """Parameters whose blocks' projections are quantised; `models.load` does it leaf by leaf."""
    found = copy_tree(params)
    for path, leaves in projections(params):
        rest = {name: leaf for name, leaf in leaves.items() if name != "kernel"}
        put(found, path, {**rest, **quantize(leaves["kernel"], kind, axes_of(path))})
    return found


def dequantize(leaves: Mapping[str, Array], axes: tuple[int, int]) -> jax.Array:
    """The kernel again, float32 `[..., *inputs, *outputs]`; see `quantize`."""
    values, scales = leaves["values"], leaves["scales"]
    return jnp.reshape(_decode(*_blocks(values, scales, axes)), full_shape(leaves, axes))


def full_shape(leaves: Mapping[str, Array], axes: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the kernel behind `values` and `scales`, or of a plain `kernel`."""
    if "kernel" in leaves:
        return tuple(leaves["kernel"].shape)
    shape = list(leaves["values"].shape)
    shape[len(shape) - axes[1] - 1] *= _kind(leaves["values"]).per_byte
    return tuple(shape)


def matmul(x: Array, values: Array, scales: Array, axes: tuple[int, int]) -> jax.Array:
    """`x @ kernel`: `[n, inputs]` to `[n, outputs]`, both flat, in x's dtype; differentiable by x alone."""
    return _matmul(x, *_blocks(values, scales, axes))


def block_size(length: int) -> int:
    """The largest even divisor of an axis up to `BLOCK`; raises ValueError where there is none."""
    sizes = [size for size in range(2, BLOCK + 1, 2) if length % size == 0]
    if not sizes:
        raise ValueError(f"an axis of {length} weights cannot be quantised in blocks: it has no even divisor")
    return sizes[-1]


def is_quantized(leaves: Any) -> bool:
    """Whether a projection's leaves are those of a quantised one."""
    return isinstance(leaves, dict) and "scales" in leaves


@jax.custom_vjp
def _matmul(x: jax.Array, values: Array, scales: Array) -> jax.Array:
    return x @ _matrix(values, scales, x.dtype)


def _forward(x, values, scales):
    # Nothing but the bits is kept for the backward pass, which takes them apart once more.
    return _matmul(x, values, scales), (values, scales)


def _backward(kept, g):
    values, scales = kept
    return g @ _matrix(values, scales, g.dtype).T, np.zeros(values.shape, jax.dtypes.float0), jnp.zeros_like(scales)


_matmul.defvjp(_forward, _backward)


def _matrix(values: Array, scales: Array, dtype: Any) -> jax.Array:
    return _decode(values, scales).reshape(-1, scales.shape[-1]).astype(dtype)


def _decode(values: Array, scales: Array) -> jax.Array:
    return _kind(values).decode(values) * jnp.asarray(scales)


def _kind(values: Array) -> Kind:
    return next(kind for kind in KINDS.values() if kind.dtype == values.dtype)


def _blocks(values: Array, scales: Array, axes: tuple[int, int]) -> tuple[Array, Array]:
    """Both as `[..., blocks, block, outputs]`; of the inputs all axes are one."""
    first, last = values.ndim - sum(axes), values.ndim - axes[1]
    lead, count = scales.shape[:first], math.prod(scales.shape[first:last])
    outputs = math.prod(scales.shape[last:])
    return values.reshape(*lead, count, -1, outputs), scales.reshape(*lead, count, 1, outputs)


def _encode_int8(x: Array) -> jax.Array:
    return jnp.round(x).astype(jnp.int8)


def _decode_int8(values: Array) -> jax.Array:
    return jnp.asarray(values).astype(jnp.float32)


def _encode_nf4(x: Array) -> jax.Array:
    middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    codes = jnp.asarray(sum((x > middle).astype(jnp.uint8) for middle in middles))
    low, high = jnp.split(codes, 2, axis=-2)
    return low | (high << 4)


def _decode_nf4(values: Array) -> jax.Array:
    # Each half by itself: XLA makes one loop of it then, and keeps none of the choices.
    return jnp.concatenate([_level(values & 15), _level(values >> 4)], axis=-2)


def _level(codes: Array) -> jax.Array:
    # A tree of choices, bit by bit: a look-up in a table is slow on TPUs, and on CPU it is no vector instruction.
    levels: list[Any] = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        upper = (codes >> bit) & 1 == 1
        levels = [jnp.where(upper, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


KINDS: dict[str, Kind] = {
    "int8": Kind(jnp.int8, 1, 127.0, _encode_int8, _decode_int8),
    "nf4": Kind(jnp.uint8, 2, 1.0, _encode_nf4, _decode_nf4),
}
