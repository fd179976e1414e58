"""Attention by splash, the TPU kernel among jax's Pallas operations: scores never leave the chip's fast memory.

A row holds whole documents side by side, told apart by their numbers; the mask is causal by place in the row. That is
`attention.rows_mask` wherever no two branches share a trunk, since places differ as positions do within a document.

jax's own kernel rather than that of tokamax, from which it differs little: this one has a public address and comes with
jax, the other lies among tokamax's private and experimental modules and brings pinned dependencies of its own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jaxalign.models.config import ModelConfig
from jaxalign.sharding import BATCH_AXES
from jaxalign.types import Array, TokenRows

LANES = 128
# Queries, and keys, that the kernel takes at a time: the largest that divides the row.
BLOCKS = (512, 256, LANES)
# What a rematerialisation policy may keep: the kernel's output and the logarithm of each query's sum.
OUTPUT_NAME = "attention"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """Which token of a row sees which: those of its own document that are not later, and not out of the window.

    Attributes:
      documents: int32 `[rows, length]`; padding is a document of its own, that nobody reads.
      window: as in `attention.rows_mask`.
      mesh: over which rows and heads are split.
    """

    documents: Array
    window: int | None = field(metadata={"static": True})
    mesh: Mesh | None = field(metadata={"static": True})


def segments(rows: TokenRows, window: int | None, mesh: Mesh | None) -> Segments:
    """The mask of rows in which no two branches share a trunk."""
    return Segments(rows.documents, window, mesh)


def misfit(config: ModelConfig, dtype: str) -> str | None:
    """Why the kernel cannot serve this model, or None."""
    if config.attention_dropout:
        return f"it has no dropout, and the model's attention_dropout is {config.attention_dropout}"
    if dtype not in ("float32", "bfloat16"):
        return f"it computes in float32 or bfloat16, not in {dtype}"
    return None


def attend_splash(query: Array, key: Array, value: Array, mask: Segments, *, scale: float, softcap: float | None):
    """Softmax attention of rows to themselves.

    Args:
      query: `[rows, length, heads, head_dim]`, float32 or bfloat16.
      key: `[rows, kv_heads, length, head_dim]`.
      value: the same shape.
      mask: of these rows.
      scale: multiplies the scores.
      softcap: scores s become `softcap * tanh(s / softcap)`.

    Returns:
      The query's shape and dtype; scores and sums are float32. Away from TPUs the kernel is interpreted, slowly.

    Raises:
      ValueError: a dtype that the kernel does not compute in.
    """
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"model.attention=splash computes in float32 or bfloat16, not in {query.dtype}")
    around = jax.sharding.get_abstract_mesh()
    mesh = around if around.manual_axes else mask.mesh
    manual = mesh.manual_axes if isinstance(mesh, AbstractMesh) else ()
    free = () if mesh is None else tuple(name for name in mesh.axis_names if name not in manual)
    sizes: dict[str, int] = {} if mesh is None else {name: mesh.shape[name] for name in free}
    length, heads = query.shape[1:3]
    padded = -(-length // LANES) * LANES
    pad = [(0, 0), (0, 0), (0, padded - length), (0, 0)]
    queries, keys, values = (jnp.pad(x, pad) for x in ((query * scale).swapaxes(1, 2), key, value))
    documents = jnp.pad(mask.documents, pad[1:3])
    split = _split(sizes, key.shape)
    local = heads // math.prod(sizes[name] for name in split[1:2] if name)
    kernel = _kernel(local, padded, mask.window, softcap, _platform(mask.mesh) != "tpu")
    run = _over_rows if math.prod(sizes.values()) == 1 else functools.partial(_spread, cast(Any, mesh), sizes, split)
    mixed = run(kernel, queries, keys, values, documents, documents)
    return mixed[:, :, :length].swapaxes(1, 2)


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _over_rows(kernel, query, key, value, of_queries, of_keys):
    def one(query, key, value, of_query, of_key):
        return kernel(query, key, value, splash.SegmentIds(q=of_query, kv=of_key))

    return jax.vmap(one)(query, key, value, of_queries, of_keys)


def _split(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[tuple[str, ...], str | None]:
    """The mesh axes over which rows and heads of keys of this shape are split; where they do not divide, none."""
    rows = tuple(name for name in BATCH_AXES if name in sizes)
    rows = () if shape[0] % math.prod(sizes[name] for name in rows) else rows
    return rows, "tensor" if "tensor" in sizes and shape[1] % sizes["tensor"] == 0 else None


def _spread(mesh: Mesh | AbstractMesh, sizes: dict[str, int], split: tuple, kernel, *arguments) -> jax.Array:
    """`_over_rows` on every shard: a kernel is nothing that XLA could split."""
    rows, tensor = split
    heads, documents = P(rows, tensor), P(rows)
    return jax.shard_map(
        _over_rows,
        mesh=mesh,
        in_specs=(P(), heads, heads, heads, documents, documents),
        out_specs=heads,
        axis_names=frozenset(sizes),
        check_vma=False,
    )(kernel, *arguments)


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, length: int, window: int | None, softcap: float | None, interpret: bool):
    """The kernel over all queries of a row."""
    shape = (length, length)
    one = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    size = next(size for size in BLOCKS if length % size == 0)
    with jax.ensure_compile_time_eval():
        made = splash.make_splash_mha(
            splash.MultiHeadMask([one] * heads),
            # Not the fused backward kernel: it keeps a gradient of the queries for every block of keys.
            block_sizes=splash.BlockSizes(**dict.fromkeys(_SIZES, size)),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=OUTPUT_NAME,
            interpret=interpret,
        )
        # On the host: arrays of one device would tie every later program to it.
        return jax.tree.map(np.asarray, made)


_SIZES = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)
