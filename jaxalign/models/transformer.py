"""The one decoder: built from a `ModelConfig`, used as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.models import context
from jaxalign.models.attention import MASKS, MISFITS, Attention, Keys, cache_mask, cap, rows_mask
from jaxalign.models.cache import Cache, layer_of, write
from jaxalign.models.config import DType, Layer, ModelConfig, Rope, segments
from jaxalign.models.experts import Experts, Sums, add_sums
from jaxalign.models.freezing import whole
from jaxalign.models.heads import init_score_head
from jaxalign.models.layers import ACTIVATION_FUNCTIONS, Linear, Mlp, Norm, residual_norm
from jaxalign.models.lora import expand
from jaxalign.models.remat import INPUT_NAME, POLICIES, Remat
from jaxalign.models.rope import rope_frequencies, rotate
from jaxalign.models.unrolling import outside_segments, repeat_name, unroll
from jaxalign.sharding import BATCH_AXES, data_shards
from jaxalign.types import Array, Predictions, PyTree, TokenRows, Variables


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
      predict: `(head, variables, hidden, predictions) -> pytree of [rows, predictions]`: runs a head, as
        `(variables, states [rows, n, embed_dim], targets [rows, n]) -> pytree of [rows, n]`, on the hidden states that
        predict, over the mesh's axis `context` on a share of them.
      rebuild: `config -> Model`, another config with the same dtypes, rematerialisation and attention.
      mesh: the mesh that it was built for; None = one device.
      unrolled: `() -> (Model, unroll)`: the same functions over `unroll(variables)`, in which every layer has arrays of
        its own, in the dtype of computation. For sampling: out of stacked arrays XLA copies each layer for each token.

    `logits` and `scores` raise ValueError on a model that has no such head.
    """

    config: ModelConfig
    init: Callable[[jax.Array], Variables]
    apply: Callable[..., tuple[jax.Array, Cache | None, dict[str, jax.Array]]]
    logits: Callable[[Variables, Array], jax.Array]
    scores: Callable[[Variables, Array], jax.Array]
    predict: Callable[[Callable[..., PyTree], Variables, Array, Predictions], PyTree]
    rebuild: Callable[[ModelConfig], Model]
    mesh: Mesh | None
    unrolled: Callable[[], tuple[Model, Callable[[Variables], Variables]]]


def build(
    config: ModelConfig,
    *,
    param_dtype: DType = "float32",
    compute_dtype: DType = "float32",
    remat: Remat = "none",
    attention: Attention = "xla",
    mesh: Mesh | None = None,
) -> Model:
    """Builds the decoder.

    Args:
      config: the model.
      param_dtype: dtype of the parameters that `init` makes.
      compute_dtype: dtype of activations and matrix products; norms, softmax, logits and scores are float32 or wider.
      remat: what the backward pass recomputes, see `remat.POLICIES`.
      attention: by which of `attention.MASKS` rows attend to themselves; with a cache it is always `xla`. `splash` is
        for rows in which no two branches share a trunk (packed with `share_prompt=False`): it cannot tell them apart.
      mesh: the mesh that it will run on, of which experts, `splash` and the axis `context` need to know.

    Raises:
      ValueError: an attention that cannot serve this model or mesh.
    """
    return _build(config, param_dtype, compute_dtype, remat, attention, mesh)


def _build(
    config: ModelConfig,
    param_dtype: DType,
    compute_dtype: DType,
    remat: Remat,
    attention: Attention,
    mesh: Mesh | None,
    unrolled: bool = False,
) -> Model:
    if problem := MISFITS[attention](config, compute_dtype) or context.misfit(attention, mesh):
        raise ValueError(f"model.attention={attention}: {problem}; set it to xla or auto")
    decoder = _Decoder(config, jnp.dtype(param_dtype), jnp.dtype(compute_dtype), remat, attention, mesh, unrolled)
    stretch = decoder.clone(split=True)

    def init(key: jax.Array) -> Variables:
        rows = TokenRows.from_padded(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        return {"params": decoder.init(key, rows, None)["params"]}

    def apply(variables: Variables, rows: TokenRows, cache: Cache | None = None, *, key=None, weights=None, noise=None):
        def read(part, variables, rows, key, weights, noise):
            rngs = {} if key is None else {"dropout": key}
            found = part.apply(expand(whole(variables)), rows, cache, weights, noise, rngs=rngs)
            return cast("tuple[jax.Array, Cache | None, Sums]", found)

        if mesh is None or cache is not None or context.shards(mesh) == 1:
            return read(decoder, variables, rows, key, weights, noise)
        return context.read_rows(mesh, partial(read, stretch), variables, rows, key, weights, noise)

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
        return _build(other, param_dtype, compute_dtype, remat, attention, mesh, unrolled)

    def unrolled_too():
        apart = _build(config, param_dtype, compute_dtype, remat, attention, mesh, unrolled=True)
        return apart, partial(unroll, config, jnp.dtype(compute_dtype))

    return Model(config, init, apply, logits, scores, partial(context.predict, mesh), rebuild, mesh, unrolled_too)


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
        mixed = context.attend(
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
        x = checkpoint_name(x, INPUT_NAME)
        for place, layer in enumerate(self.layers):
            kind = windows.index(layer.window)
            cached = ()
            if cache is not None and cache.positions.shape[1]:
                k, v = (layer_of(each, first_layer + place).astype(x.dtype) for each in (cache.k, cache.v))
                cached = (Keys(k, v, cache_masks[kind]),)
            block = _Block(self.config, self.param_dtype, layer, self.mesh, name=f"block_{place}")
            x, keys, of_block = block(
                _by_rows(self.mesh, x, cache), angles[ropes.index(layer.rope)], masks[kind], weights, cached
            )
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
    attention: Attention
    mesh: Mesh | None
    unrolled: bool = False
    split: bool = False  # it reads a stretch of rows, under `context.read_rows`

    @nn.compact
    def __call__(self, rows, cache, weights=None, noise=None):
        c = self.config
        normal = nn.initializers.normal(0.02)
        embed = partial(nn.Embed, features=c.embed_dim, embedding_init=normal, param_dtype=self.param_dtype)
        table = embed(c.vocab_size, name="embed")
        x = jnp.take(_one_axis(table.embedding), rows.tokens, axis=0) if self.split else table(rows.tokens)
        x = x if noise is None else x + noise.astype(x.dtype)
        if c.learned_positions:
            x = x + embed(c.max_position, name="positions")(rows.positions)
        x = x.astype(self.compute_dtype) * c.embedding_multiplier
        x = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(x)
        x = _by_rows(self.mesh, x, cache)
        windows, ropes = _kinds(c)
        angles = tuple(_angles(rows, rope, c.head_dim) for rope in ropes)
        alone = cache is None or not cache.positions.shape[1]
        of_rows = MASKS["xla" if cache is not None or self.is_initializing() else self.attention]

        def make_mask(window):
            if self.split:
                return context.self_mask(rows, window)
            return of_rows(rows, window, self.mesh) if alone else rows_mask(rows, window)

        masks = tuple(make_mask(window) for window in windows)
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
        x = residual_norm(c, self.param_dtype, "final_norm")(_by_rows(self.mesh, x, cache))
        return x, None if cache is None else write(cache, rows, new, x), add_sums(sums)

    def _scan(self, segment):
        body = _Pattern
        if self.remat != "none":
            body = nn.remat(body, policy=POLICIES[self.remat], prevent_cse=False)
        return nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast("Any", (0, *[nn.broadcast] * 5)),  # flax says nothing of its type but the default, 0
            length=segment.repeats,
        )


def _one_axis(table: jax.Array) -> jax.Array:
    """An embedding table whole along its width: in a `shard_map` XLA cannot look up in one that is split both ways."""
    around = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(table, NamedSharding(around, PartitionSpec("tensor", None)))


def _by_rows(mesh: Mesh | None, x: jax.Array, cache: Cache | None) -> jax.Array:
    """Hidden states `[rows, length, embed]` kept where their rows are.

    XLA would else follow the parameters, which are split along the same axes: every device would read all rows and sum
    parts of the hidden states. Decoding, whose rows a `shard_map` has split, says so itself.
    """
    if mesh is None or cache is not None or mesh.size == 1 or x.shape[0] % data_shards(mesh):
        return x
    # Where `context` has split the rows, the mesh that is meant is that of its `shard_map`.
    around = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(around if around.manual_axes else mesh, PartitionSpec(BATCH_AXES))
    )


def _kinds(config: ModelConfig) -> tuple[list[int | None], list[Rope | None]]:
    """The different windows and ropes, in order of appearance: one mask, one table of angles each."""
    return list(dict.fromkeys(config.windows)), list(dict.fromkeys(config.layer_ropes))


def _angles(rows: TokenRows, rope: Rope | None, head_dim: int) -> jax.Array | None:
    if rope is None:
        return None
    return jnp.asarray(rows.positions)[..., None] * rope_frequencies(rope, head_dim).reshape(1, 1, -1)
