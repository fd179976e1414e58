"""The parts of a block: norms, linear layers with their adapters or quantised weights, the feed-forward layer."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxalign.models.config import ModelConfig
from jaxalign.models.lora import adapter_config
from jaxalign.models.quantized import matmul

ACTIVATION_FUNCTIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Norm(nn.Module):
    """A norm over the last axis, in float32 or wider: of kind `rms`, or `layer` (the mean subtracted)."""

    kind: str
    eps: float
    param_dtype: jnp.dtype
    use_bias: bool = False
    plus_one: bool = False

    @nn.compact
    def __call__(self, x):
        """`[..., features]`, in the dtype of x."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", start, x.shape[-1:], self.param_dtype).astype(wide.dtype) + float(self.plus_one)
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        normed = wide * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
            normed = normed + bias.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return normed.astype(x.dtype)


def residual_norm(config: ModelConfig, param_dtype: jnp.dtype, name: str) -> Norm:
    """A norm of the residual stream."""
    bias = config.norm == "layer" and config.norm_bias
    return Norm(config.norm, config.norm_eps, param_dtype, bias, config.norm_plus_one, name=name)


class Linear(nn.Module):
    """`x @ kernel (+ bias)` over the last `inputs` axes of x."""

    features: tuple[int, ...]
    use_bias: bool
    param_dtype: jnp.dtype
    config: ModelConfig | None = None  # whose adapter it may have
    inputs: int = 1

    @nn.compact
    def __call__(self, x):
        """`[..., features]`, in the dtype of x."""
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        leading = x.shape[: x.ndim - self.inputs]
        # As one plain matrix product: XLA then needs no transposed copy of x for the gradient.
        width = math.prod(shape[: self.inputs])
        flat = x.reshape(-1, width)
        if self.has_variable("params", "values"):
            values, scales = (self.get_variable("params", name) for name in ("values", "scales"))
            y = matmul(flat, values, scales, (self.inputs, len(self.features)))
        else:
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.param_dtype).astype(x.dtype)
            y = flat @ kernel.reshape(width, -1)
        if self.has_variable("lora", "a"):
            y = y + self._adapt(flat)
        y = y.reshape(*leading, *self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, self.param_dtype).astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y

    def _adapt(self, x):
        """The adapter's part, see `models.lora`."""
        lora = adapter_config(self.config)
        a, b = (self.get_variable("lora", name).astype(x.dtype) for name in ("a", "b"))
        x = nn.Dropout(lora.dropout, deterministic=not self.has_rng("dropout"))(x)
        return lora.scale * ((x @ a) @ b)


class Mlp(nn.Module):
    """The dense feed-forward layer."""

    config: ModelConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        """`[..., features]`, in the dtype of x."""
        c = self.config
        linear = partial(Linear, use_bias=c.mlp_bias, param_dtype=self.param_dtype, config=c)
        activation = ACTIVATION_FUNCTIONS[c.activation]
        up = linear((c.mlp_dim,), name="up")(x)
        inner = activation(linear((c.mlp_dim,), name="gate")(x)) * up if c.gated_mlp else activation(up)
        return linear((c.embed_dim,), name="down")(inner)
