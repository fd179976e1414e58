"""The one decoder: built from a `ModelConfig`, used as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from jaxalign.models.attention import Keys, attend, cache_mask, cap, rows_mask, self_mask
from jaxalign.models.cache import Cache, layer_of, write
from jaxalign.models.config import DType, Layer, ModelConfig, Rope, segments
from jaxalign.models.experts import Experts, Sums, add_sums
from jaxalign.models.freezing import whole
from jaxalign.models.heads import init_score_head
from jaxalign.models.layers import ACTIVATION_FUNCTIONS, Linear, Mlp, Norm, residual_norm
from jaxalign.models.lora import expand
from jaxalign.models.rope import rope_frequencies, rotate
from jaxalign.models.unrolling import outside_segments, repeat_name, unroll
from jaxalign.types import Array, TokenRows, Variables

Remat = Literal["none", "dots", "full"]

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
      apply: `(variables, rows, cache=None, *, key=None, weights=None, noise=None) -> (hidden [rows, length, embed_dim],
        cache, aux)`. With a cache, row i continues slot i and the returned cache holds the new tokens too; dropout is
        on only with a key; `noise`, `[rows, length, embed_dim]`, is added to the token embeddings; `aux` holds
        `experts.router_sums` over the layers of a sparse model (not with a cache), in which a token counts as often as
        `weights` `[rows, length]` says, by default once.
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
    config: ModelConfig,
    *,
    param_dtype: DType = "float32",
    compute_dtype: DType = "float32",
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> Model:
    """Builds the decoder.

    Args:
      config: the model.
      param_dtype: dtype of the parameters that `init` makes.
      compute_dtype: dtype of activations and matrix products; norms, softmax, logits and scores are float32 or wider.
      remat: what the backward pass recomputes: nothing, all but matrix products, or whole blocks.
      mesh: the mesh that it will run on, of which only experts need to know.
    """
    return _build(config, param_dtype, compute_dtype, remat, mesh)


def _build(
    config: ModelConfig,
    param_dtype: DType,
    compute_dtype: DType,
    remat: Remat,
    mesh: Mesh | None,
    unrolled: bool = False,
) -> Model:
    decoder = _Decoder(config, jnp.dtype(param_dtype), jnp.dtype(compute_dtype), remat, mesh, unrolled)

    def init(key: jax.Array) -> Variables:
        rows = TokenRows.from_padded(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        return {"params": decoder.init(key, rows, None)["params"]}

    def apply(variables: Variables, rows: TokenRows, cache: Cache | None = None, *, key=None, weights=None, noise=None):
        rngs = {} if key is None else {"dropout": key}
        read = decoder.apply(expand(whole(variables)), rows, cache, weights, noise, rngs=rngs)
        return cast("tuple[jax.Array, Cache | None, Sums]", read)

    def logits(variables: Variables, hidden: Array) -> jax.Array:
        if not config.lm_head:
            raise ValueError("this is a reward or value model: it has a score head and no LM head, so it says no words")
        params, dtype = outside_segments(variables), jnp.dtype(compute_dtype)
        equation = "nd,vd->nv" if config.tie_embeddings else "nd,dv->nv"
        table = params["embed"]["embedding"] if config.tie_embeddings else params["head"]["kernel"]
        wide = jnp.promote_types(dtype, jnp.float32)
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(dtype)
        product = jnp.einsum(equation, flat, table.astype(dtype), preferred_element_type=wide)
        product = product.reshape(*hidden.shape[:-1], -1)
        return cap(product * config.logit_multiplier, config.logit_softcap)

    def scores(variables: Variables, hidden: Array) -> jax.Array:
        if not config.score_head:
            raise ValueError("this is a language model without a score head: models.add_score_head gives it one")
        head = outside_segments(variables)["score"]
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(wide)
        # One output costs nothing: TPUs and GPUs would round a float32 product to bfloat16 or TF32.
        product = jnp.matmul(flat, head["kernel"].astype(wide), precision=jax.lax.Precision.HIGHEST)
        if config.score_labels == 2:
            product = product + head["bias"].astype(wide)[None]
            product = product[:, 1] - product[:, 0]
        return product.reshape(hidden.shape[:-1]) + config.score_bias

    def rebuild(other: ModelConfig) -> Model:
        return _build(other, param_dtype, compute_dtype, remat, mesh, unrolled)

    def unrolled_too():
        apart = _build(config, param_dtype, compute_dtype, remat, mesh, unrolled=True)
        return apart, partial(unroll, config, jnp.dtype(compute_dtype))

    return Model(config, init, apply, logits, scores, rebuild, unrolled_too)


class _Attention(nn.Module):
    config: ModelConfig
    param_dtype: jnp.dtype
    rope: Rope | None

    @nn.compact
    def __call__(self, x, angles, mask, cached):
        c = self.config
        linear = partial(Linear, param_dtype=self.param_dtype, config=c)
        query = linear((c.num_heads, c.head_dim), c.qkv_bias, name="query")(x)
        key = linear((c.num_kv_heads, c.head_dim), c.qkv_bias, name="key")(x)
        value = linear((c.num_kv_heads, c.head_dim), c.qkv_bias, name="value")(x)
        if c.qk_norm:
            query, key = self.normed("query_norm", query), self.normed("key_norm", key)
        if self.rope is not None:
            query, key = rotate(query, angles, self.rope), rotate(key, angles, self.rope)
        drop = c.attention_dropout if self.has_rng("dropout") else 0.0
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        mixed = attend(
            query,
            (*cached, Keys(key, value, mask)),
            scale=c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            softcap=c.attention_softcap,
            dropout=drop,
            dropout_key=self.make_rng("dropout") if drop else None,
        )
        return linear((c.embed_dim,), c.output_bias, inputs=2, name="output")(mixed), key, value

    def normed(self, name, x):
        c = self.config
        norm = Norm("rms", c.norm_eps, self.param_dtype, False, c.norm_plus_one, name=name)
        return norm(x) if c.qk_norm_over == "head" else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class _Block(nn.Module):
    config: ModelConfig
    param_dtype: jnp.dtype
    layer: Layer
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, angles, mask, weights, cached):
        c, norm = self.config, partial(residual_norm, self.config, self.param_dtype)
        before, after = c.norm_place != "post", c.norm_place != "pre"
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        normed = norm("attention_norm")(x) if before else x
        attention = _Attention(c, self.param_dtype, self.layer.rope, name="attention")
        mixed, key, value = attention(normed, angles, mask, cached)
        mixed = norm("attention_post_norm")(mixed) if after else mixed
        attended = x + drop(mixed) * c.residual_multiplier
        if not c.shared_norm:
            normed = x if c.parallel_residual else attended
            normed = norm("mlp_norm")(normed) if before else normed
        inner, sums = self._feed(normed, weights)
        inner = norm("mlp_post_norm")(inner) if after else inner
        return attended + drop(inner) * c.residual_multiplier, (key, value), sums

    def _feed(self, x, weights):
        """The feed-forward layer, or the experts in its place and the sums of their router."""
        c = self.config
        if not self.layer.sparse:
            return Mlp(c, self.param_dtype, name="mlp")(x), {}
        activation = ACTIVATION_FUNCTIONS[c.activation]
        return Experts(c, self.param_dtype, activation, self.mesh, name="experts")(x, weights)


class _Pattern(nn.Module):
    """The blocks of one repeat of a segment: the body of the scan."""

    config: ModelConfig
    param_dtype: jnp.dtype
    layers: tuple[Layer, ...]
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, first_layer, angles, masks, weights, cache, cache_masks):
        new, sums, (windows, ropes) = [], [], _kinds(self.config)
        for place, layer in enumerate(self.layers):
            kind = windows.index(layer.window)
            cached = ()
            if cache is not None and cache.positions.shape[1]:
                k, v = (layer_of(each, first_layer + place).astype(x.dtype) for each in (cache.k, cache.v))
                cached = (Keys(k, v, cache_masks[kind]),)
            block = _Block(self.config, self.param_dtype, layer, self.mesh, name=f"block_{place}")
            x, keys, of_block = block(x, angles[ropes.index(layer.rope)], masks[kind], weights, cached)
            new.append(keys)
            sums.append(of_block)
        # Without a cache nobody wants the keys and values: stacking them would cost memory.
        keys = None if cache is None else jax.tree.map(lambda *a: jnp.stack(a), *new)
        return x, (keys, add_sums(sums))


class _Decoder(nn.Module):
    config: ModelConfig
    param_dtype: jnp.dtype
    compute_dtype: jnp.dtype
    remat: Remat
    mesh: Mesh | None
    unrolled: bool = False

    @nn.compact
    def __call__(self, rows, cache, weights=None, noise=None):
        c = self.config
        normal = nn.initializers.normal(0.02)
        embed = partial(nn.Embed, features=c.embed_dim, embedding_init=normal, param_dtype=self.param_dtype)
        x = embed(c.vocab_size, name="embed")(rows.tokens)
        x = x if noise is None else x + noise.astype(x.dtype)
        if c.learned_positions:
            x = x + embed(c.max_position, name="positions")(rows.positions)
        x = x.astype(self.compute_dtype) * c.embedding_multiplier
        x = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(x)
        windows, ropes = _kinds(c)
        angles = tuple(_angles(rows, rope, c.head_dim) for rope in ropes)
        alone = cache is None or not cache.positions.shape[1]
        masks = tuple((self_mask if alone else rows_mask)(rows, window) for window in windows)
        cache_masks = () if cache is None else tuple(cache_mask(rows, cache.positions, window) for window in windows)
        counted = any(c.sparse_layers) and cache is None
        weights = (rows.documents > 0 if weights is None else weights) if counted else None
        new, sums = [], []
        for index, segment in enumerate(segments(c)):
            body = _Pattern if self.unrolled else self._scan(segment)
            block = partial(body, c, self.param_dtype, segment.layers, self.mesh)
            size, rest = len(segment.layers), (angles, masks, weights, cache, cache_masks)
            if self.unrolled:
                for repeat in range(segment.repeats):
                    run = block(name=repeat_name(index, repeat))
                    x, (keys, of_block) = run(x, segment.start + repeat * size, *rest)
                    new.append(jax.tree.map(lambda a: a[None], keys))
                    sums.append(of_block)
            else:
                starts = segment.start + jnp.arange(segment.repeats) * size
                x, (keys, stacked) = block(name=f"segment_{index}")(x, starts, *rest)
                new.append(keys)
                sums.append(jax.tree.map(lambda a: a.sum(0), stacked))
        # The heads are applied by `Model.logits` and `Model.scores`; they are declared here so that `init` makes them.
        if c.lm_head and not c.tie_embeddings:
            shape = (c.embed_dim, c.vocab_size)
            self.param("head", lambda key: {"kernel": normal(key, shape, self.param_dtype)})
        if c.score_head:
            self.param("score", lambda key: init_score_head(key, c, dtype=self.param_dtype))
        x = residual_norm(c, self.param_dtype, "final_norm")(x)
        return x, None if cache is None else write(cache, rows, new, x), add_sums(sums)

    def _scan(self, segment):
        body = _Pattern
        if self.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast("Any", (0, *[nn.broadcast] * 5)),  # flax says nothing of its type but the default, 0
            length=segment.repeats,
        )


def _kinds(config: ModelConfig) -> tuple[list[int | None], list[Rope | None]]:
    """The different windows and ropes, in order of appearance: one mask, one table of angles each."""
    return list(dict.fromkeys(config.windows)), list(dict.fromkeys(config.layer_ropes))


def _angles(rows: TokenRows, rope: Rope | None, head_dim: int) -> jax.Array | None:
    if rope is None:
        return None
    return jnp.asarray(rows.positions)[..., None] * rope_frequencies(rope, head_dim).reshape(1, 1, -1)
