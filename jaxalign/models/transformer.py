"""The one decoder: built from a `ModelConfig`, used as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxalign.models.attention import Keys, attend, cache_mask, rows_mask, self_mask
from jaxalign.models.cache import Cache, layer_of, write
from jaxalign.models.config import DType, ModelConfig, Rope, segments
from jaxalign.models.heads import init_score_head
from jaxalign.types import Array, TokenRows, Variables

Remat = Literal["none", "dots", "full"]

ACTIVATION_FUNCTIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class Model:
    """A decoder as pure functions of its variables (`{"params": ...}`).

    Attributes:
      config: what it computes.
      init: `key -> variables`, a random model (normal, standard deviation 0.02).
      apply: `(variables, rows, cache=None, *, key=None, noise=None) -> (hidden [rows, length, embed_dim], cache, aux)`.
        With a cache, row i continues slot i and the returned cache holds the new tokens too; dropout is on only with a
        key; `noise`, `[rows, length, embed_dim]`, is added to the token embeddings;
        `aux` is a dict of float32 scalars to add to a loss, empty for dense models.
      logits: `(variables, hidden [..., embed_dim]) -> float32 [..., vocab_size]`.
      scores: `(variables, hidden [..., embed_dim]) -> float32 [...]`, one number per hidden state: a reward, a value,
        or the log-odds that a step is right.
      rebuild: `config -> Model`, another config with the same dtypes and rematerialisation.
      unrolled: `() -> (Model, unroll)`: the same functions over `unroll(variables)`, in which every layer has arrays of
        its own, in the dtype of computation. For sampling: out of stacked arrays XLA copies each layer for each token.

    `logits` and `scores` raise ValueError on a model that has no such head.
    """

    config: ModelConfig
    init: Callable[[jax.Array], Variables]
    apply: Callable[..., tuple[jax.Array, Cache | None, dict[str, jax.Array]]]
    logits: Callable[[Variables, Array], jax.Array]
    scores: Callable[[Variables, Array], jax.Array]
    rebuild: Callable[[ModelConfig], Model]
    unrolled: Callable[[], tuple[Model, Callable[[Variables], Variables]]]


def build(
    config: ModelConfig, *, param_dtype: DType = "float32", compute_dtype: DType = "float32", remat: Remat = "none"
) -> Model:
    """Builds the decoder.

    Args:
      config: the model.
      param_dtype: dtype of the parameters that `init` makes.
      compute_dtype: dtype of activations and matrix products; norms, softmax, logits and scores are float32 or wider.
      remat: what the backward pass recomputes: nothing, all but matrix products, or whole blocks.
    """
    return _build(config, param_dtype, compute_dtype, remat)


def _build(
    config: ModelConfig, param_dtype: DType, compute_dtype: DType, remat: Remat, unrolled: bool = False
) -> Model:
    decoder = _Decoder(config, jnp.dtype(param_dtype), jnp.dtype(compute_dtype), remat, unrolled)

    def init(key: jax.Array) -> Variables:
        rows = TokenRows.from_padded(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        return {"params": decoder.init(key, rows, None)["params"]}

    def apply(
        variables: Variables,
        rows: TokenRows,
        cache: Cache | None = None,
        *,
        key: jax.Array | None = None,
        noise: Array | None = None,
    ):
        rngs = {} if key is None else {"dropout": key}
        read = cast("tuple[jax.Array, Cache | None]", decoder.apply(variables, rows, cache, noise, rngs=rngs))
        return *read, {}

    def logits(variables: Variables, hidden: Array) -> jax.Array:
        if not config.lm_head:
            raise ValueError("this is a reward or value model: it has a score head and no LM head, so it says no words")
        params, dtype = variables["params"], jnp.dtype(compute_dtype)
        equation = "nd,vd->nv" if config.tie_embeddings else "nd,dv->nv"
        table = params["embed"]["embedding"] if config.tie_embeddings else params["head"]["kernel"]
        wide = jnp.promote_types(dtype, jnp.float32)
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(dtype)
        product = jnp.einsum(equation, flat, table.astype(dtype), preferred_element_type=wide)
        return product.reshape(*hidden.shape[:-1], -1)

    def scores(variables: Variables, hidden: Array) -> jax.Array:
        if not config.score_head:
            raise ValueError("this is a language model without a score head: models.add_score_head gives it one")
        head = variables["params"]["score"]
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(wide)
        # One output costs nothing: TPUs and GPUs would round a float32 product to bfloat16 or TF32.
        product = jnp.matmul(flat, head["kernel"].astype(wide), precision=jax.lax.Precision.HIGHEST)
        if config.score_labels == 2:
            product = product + head["bias"].astype(wide)[None]
            product = product[:, 1] - product[:, 0]
        return product.reshape(hidden.shape[:-1]) + config.score_bias

    def rebuild(other: ModelConfig) -> Model:
        return _build(other, param_dtype, compute_dtype, remat, unrolled)

    def unroll():
        apart = _build(config, param_dtype, compute_dtype, remat, unrolled=True)
        return apart, partial(_unroll, config, jnp.dtype(compute_dtype))

    return Model(config, init, apply, logits, scores, rebuild, unroll)


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Angle per position of each pair of dimensions, float32 `[head_dim / 2]`.

    `theta ** (-2 i / head_dim)`, scaled as the kind says. Source: Su et al., arXiv 2104.09864; Llama 3.1's scaling as
    in its reference code: wavelengths between the bounds are blended linearly in original_max_position / wavelength.
    """
    base = 1.0 / rope.theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position * base / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        return base * (blend + (1 - blend) / rope.factor)
    return base


def rotate(x: Array, angles: Array) -> jax.Array:
    """Rotates dimension i with dimension i + head_dim / 2.

    Args:
      x: `[rows, length, heads, head_dim]`.
      angles: `[rows, length, head_dim / 2]`.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sin, cos = jnp.sin(angles)[:, :, None].astype(wide), jnp.cos(angles)[:, :, None].astype(wide)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class _Norm(nn.Module):
    kind: str
    eps: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype).astype(wide.dtype)
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        normed = wide * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
            normed = normed + bias.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return normed.astype(x.dtype)


class _Linear(nn.Module):
    """`x @ kernel (+ bias)` over the last `inputs` axes of x."""

    features: tuple[int, ...]
    use_bias: bool
    param_dtype: jnp.dtype
    inputs: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.param_dtype).astype(x.dtype)
        leading = x.shape[: x.ndim - self.inputs]
        # As one plain matrix product: XLA then needs no transposed copy of x for the gradient.
        width = math.prod(shape[: self.inputs])
        y = (x.reshape(-1, width) @ kernel.reshape(width, -1)).reshape(*leading, *self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, self.param_dtype).astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class _Attention(nn.Module):
    config: ModelConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, angles, mask, cached):
        c, linear = self.config, partial(_Linear, param_dtype=self.param_dtype)
        query = linear((c.num_heads, c.head_dim), c.qkv_bias, name="query")(x)
        key = linear((c.num_kv_heads, c.head_dim), c.qkv_bias, name="key")(x)
        value = linear((c.num_kv_heads, c.head_dim), c.qkv_bias, name="value")(x)
        if c.qk_norm:
            query = _Norm("rms", c.norm_eps, self.param_dtype, name="query_norm")(query)
            key = _Norm("rms", c.norm_eps, self.param_dtype, name="key_norm")(key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        drop = c.attention_dropout if self.has_rng("dropout") else 0.0
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        mixed = attend(
            query,
            (*cached, Keys(key, value, mask)),
            scale=c.head_dim**-0.5,
            dropout=drop,
            dropout_key=self.make_rng("dropout") if drop else None,
        )
        return linear((c.embed_dim,), c.output_bias, inputs=2, name="output")(mixed), key, value


class _Mlp(nn.Module):
    config: ModelConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c, linear = self.config, partial(_Linear, use_bias=self.config.mlp_bias, param_dtype=self.param_dtype)
        activation = ACTIVATION_FUNCTIONS[c.activation]
        up = linear((c.mlp_dim,), name="up")(x)
        inner = activation(linear((c.mlp_dim,), name="gate")(x)) * up if c.gated_mlp else activation(up)
        return linear((c.embed_dim,), name="down")(inner)


class _Block(nn.Module):
    config: ModelConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, angles, mask, cached):
        c = self.config
        norm = partial(_Norm, c.norm, c.norm_eps, self.param_dtype)
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        attention, normed = _Attention(c, self.param_dtype, name="attention"), norm(name="attention_norm")(x)
        mixed, key, value = attention(normed, angles, mask, cached)
        x = x + drop(mixed)
        x = x + drop(_Mlp(c, self.param_dtype, name="mlp")(norm(name="mlp_norm")(x)))
        return x, key, value


class _Pattern(nn.Module):
    """The blocks of one repeat of a segment: the body of the scan."""

    config: ModelConfig
    param_dtype: jnp.dtype
    windows: tuple[int | None, ...]

    @nn.compact
    def __call__(self, x, first_layer, angles, masks, cache, cache_masks):
        new, kinds = [], _kinds(self.config)
        for place, window in enumerate(self.windows):
            kind = kinds.index(window)
            cached = ()
            if cache is not None and cache.positions.shape[1]:
                k, v = (layer_of(each, first_layer + place).astype(x.dtype) for each in (cache.k, cache.v))
                cached = (Keys(k, v, cache_masks[kind]),)
            x, key, value = _Block(self.config, self.param_dtype, name=f"block_{place}")(x, angles, masks[kind], cached)
            new.append((key, value))
        # Without a cache nobody wants the keys and values: stacking them would cost memory.
        return x, None if cache is None else jax.tree.map(lambda *a: jnp.stack(a), *new)


class _Decoder(nn.Module):
    config: ModelConfig
    param_dtype: jnp.dtype
    compute_dtype: jnp.dtype
    remat: Remat
    unrolled: bool = False

    @nn.compact
    def __call__(self, rows, cache, noise=None):
        c = self.config
        normal = nn.initializers.normal(0.02)
        embed = partial(nn.Embed, features=c.embed_dim, embedding_init=normal, param_dtype=self.param_dtype)
        x = embed(c.vocab_size, name="embed")(rows.tokens)
        x = x if noise is None else x + noise.astype(x.dtype)
        if c.learned_positions:
            x = x + embed(c.max_position, name="positions")(rows.positions)
        x = x.astype(self.compute_dtype)
        x = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(x)
        angles = rows.positions[..., None] * rope_frequencies(c.rope, c.head_dim).reshape(1, 1, -1) if c.rope else None
        alone = cache is None or not cache.positions.shape[1]
        masks = tuple((self_mask if alone else rows_mask)(rows, window) for window in _kinds(c))
        cache_masks = () if cache is None else tuple(cache_mask(rows, cache.positions, window) for window in _kinds(c))
        new = []
        for index, segment in enumerate(segments(c)):
            block = partial(_Pattern if self.unrolled else self._scan(segment), c, self.param_dtype, segment.windows)
            size, rest = len(segment.windows), (angles, masks, cache, cache_masks)
            if self.unrolled:
                for repeat in range(segment.repeats):
                    x, keys = block(name=_repeat_name(index, repeat))(x, segment.start + repeat * size, *rest)
                    new.append(jax.tree.map(lambda a: a[None], keys))
            else:
                starts = segment.start + jnp.arange(segment.repeats) * size
                x, keys = block(name=f"segment_{index}")(x, starts, *rest)
                new.append(keys)
        # The heads are applied by `Model.logits` and `Model.scores`; they are declared here so that `init` makes them.
        if c.lm_head and not c.tie_embeddings:
            shape = (c.embed_dim, c.vocab_size)
            self.param("head", lambda key: {"kernel": normal(key, shape, self.param_dtype)})
        if c.score_head:
            self.param("score", lambda key: init_score_head(key, c, dtype=self.param_dtype))
        x = _Norm(c.norm, c.norm_eps, self.param_dtype, name="final_norm")(x)
        return x, None if cache is None else write(cache, rows, new, x)

    def _scan(self, segment):
        body = _Pattern
        if self.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast("Any", (0, *[nn.broadcast] * 4)),  # flax says nothing of its type but the default, 0
            length=segment.repeats,
        )


def _repeat_name(segment: int, repeat: int) -> str:
    return f"segment_{segment}_{repeat}"


def _unroll(config: ModelConfig, dtype: jnp.dtype, variables: Variables) -> Variables:
    """The layers of each segment apart, in the dtype of computation; norms, which compute wider, stay as they are."""

    def cast_leaf(path, x):
        kept = path[-1].key == "scale" or any(part.key == "score" for part in path[:-1])
        return x if kept else x.astype(dtype)

    params = dict(variables["params"])
    for index, segment in enumerate(segments(config)):
        stacked = params.pop(f"segment_{index}")
        for repeat in range(segment.repeats):
            params[_repeat_name(index, repeat)] = jax.tree.map(lambda x, repeat=repeat: x[repeat], stacked)
    return {**variables, "params": jax.tree.map_with_path(cast_leaf, params)}


def _kinds(config: ModelConfig) -> list[int | None]:
    """The different windows, in order of appearance: one mask each."""
    return list(dict.fromkeys(config.windows))
