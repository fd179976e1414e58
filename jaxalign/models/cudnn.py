"""Attention by cuDNN on NVIDIA GPUs, in 16 bits: scores never leave the chip.

It knows no documents. The mask of rows with several, or with branches, is handed to it as a bias, which costs
`rows * length^2` numbers, one head's worth; every block of scores is then computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.models.config import ModelConfig
from jaxalign.models.splash import OUTPUT_NAME
from jaxalign.types import Array

HEAD_DIM, HOPPER_HEAD_DIM = 128, 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visible:
    """Which token of a row sees which: bool `[rows, queries, keys]`, as `attention.rows_mask`."""

    mask: Array


def misfit(config: ModelConfig, dtype: str) -> str | None:
    """Why cuDNN cannot serve this model, or None."""
    if dtype != "bfloat16":
        return f"it computes in bfloat16, not in {dtype}"
    if config.attention_softcap is not None:
        return f"it caps no scores, and the model's attention_softcap is {config.attention_softcap}"
    if config.attention_dropout:
        return f"it is used here without dropout, and the model's attention_dropout is {config.attention_dropout}"
    if config.head_dim % 8 or config.head_dim > HOPPER_HEAD_DIM:
        return f"head_dim={config.head_dim} is no multiple of 8 up to {HEAD_DIM}, on Hopper {HOPPER_HEAD_DIM}"
    return None


def attend_cudnn(
    query: Array,
    key: Array,
    value: Array,
    mask: Visible,
    *,
    scale: float,
    softcap: float | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Softmax attention of rows to themselves.

    Args:
      query: `[rows, length, heads, head_dim]`, bfloat16 (or float16), an even length.
      key: `[rows, kv_heads, length, head_dim]`.
      value: the same shape.
      mask: of these rows.
      scale: multiplies the scores.
      softcap: must be None.
      implementation: `xla` computes the same call by other means, to compare with.

    Returns:
      The query's shape and dtype.

    Raises:
      ValueError: a soft-cap, or rows of odd length.
    """
    if softcap is not None:
        raise ValueError(f"model.attention=cudnn caps no scores, and the model's attention_softcap is {softcap}")
    if query.shape[1] % 2:
        raise ValueError(f"model.attention=cudnn needs an even row length, not {query.shape[1]}: set train.row_length")
    mixed = jax.nn.dot_product_attention(
        jnp.asarray(query),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        mask=mask.mask[:, None],
        scale=scale,
        implementation=implementation,
    )
    return checkpoint_name(mixed, OUTPUT_NAME)
