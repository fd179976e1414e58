"""Matrix products by group: each row of x with the matrix of its group, rows sorted by group, sizes only known at run
time.

`jax.lax.ragged_dot` says just this. On TPU it is an instruction that does the work of the rows alone. Elsewhere XLA
multiplies every row with every group's matrix and throws the rest away, so there the rows are cut into blocks of one
group each, and a loop does these.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import Array

LEAST_BLOCK, LARGEST_BLOCK = 8, 256


def grouped_matmul(x: Array, matrices: Array, sizes: Array) -> jax.Array:
    """`y[i] = x[i] @ matrices[group of i]`; 0 in rows behind the last group.

    Args:
      x: `[rows, inputs]`: the rows of group 0 first, then those of group 1, and so on.
      matrices: `[groups, inputs, outputs]`.
      sizes: int32 `[groups]`, rows of each group; together at most the rows of x.

    Returns:
      `[rows, outputs]` in the dtype of x; differentiable (reverse mode) in x and the matrices.
    """
    real = (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
    # What ragged_dot does with rows of no group is not said: they are 0 on the way in and out, backwards too.
    y = jax.lax.platform_dependent(
        jnp.where(real, x, 0), matrices, sizes.astype(jnp.int32), tpu=jax.lax.ragged_dot, default=blocked_matmul
    )
    return jnp.where(real, y, 0)


@jax.custom_vjp
def blocked_matmul(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` by a loop over blocks of rows; rows behind the last group are not defined."""
    return _multiply(x, matrices, sizes)


def _multiply(x, matrices, sizes, *, transposed: bool = False):
    rows, outputs = len(x), matrices.shape[1 if transposed else 2]
    block = _block(rows, len(sizes))
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def one(group, at, used, y):
        del used
        part = jax.lax.dynamic_slice_in_dim(padded, at, block)
        product = part @ (matrices[group].T if transposed else matrices[group])
        # The rows behind the group's end are written again by the groups that they belong to.
        return jax.lax.dynamic_update_slice_in_dim(y, product, at, axis=0)

    return _each_block(block, sizes, one, jnp.zeros((rows + block, outputs), x.dtype))[:rows]


def _forward(x, matrices, sizes):
    return blocked_matmul(x, matrices, sizes), (x, matrices, sizes)


def _backward(saved, dy):
    x, matrices, sizes = saved
    block = _block(len(x), len(sizes))
    padded, padded_dy = (jnp.pad(each, ((0, block), (0, 0))) for each in (x, dy))
    wide = jnp.promote_types(matrices.dtype, jnp.float32)

    def one(group, at, used, total):
        part = jax.lax.dynamic_slice_in_dim(padded, at, block)
        cotangent = jax.lax.dynamic_slice_in_dim(padded_dy, at, block)
        cotangent = jnp.where(jnp.arange(block)[:, None] < used, cotangent, 0)
        return total.at[group].add(jnp.matmul(part.T, cotangent, preferred_element_type=wide))

    dmatrices = _each_block(block, sizes, one, jnp.zeros(matrices.shape, wide))
    return _multiply(dy, matrices, sizes, transposed=True), dmatrices.astype(matrices.dtype), None


blocked_matmul.defvjp(_forward, _backward)


def _block(rows: int, groups: int) -> int:
    """Rows of a block: a power of two near half a group's mean size, as each group wastes half a block."""
    half = max(rows // (2 * groups), 1)
    return min(max(1 << (half.bit_length() - 1), LEAST_BLOCK), LARGEST_BLOCK)


def _each_block(block: int, sizes, body, start):
    """`body(group, first row, rows that are the group's own, carry)` for each block, in the order of the rows."""
    sizes = jnp.asarray(sizes)
    starts, counts = jnp.cumsum(sizes) - sizes, -(-sizes // block)
    ends = jnp.cumsum(counts)

    def one(number, carry):
        group = jnp.searchsorted(ends, number, side="right")
        done = (number - ends[group] + counts[group]) * block
        return body(group, starts[group] + done, sizes[group] - done, carry)

    return jax.lax.fori_loop(0, ends[-1], one, start)
