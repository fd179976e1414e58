"""What a decoder is, as data: one frozen config for every family, and how its layers fold into scanned segments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

DType = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      theta: base of the frequencies.
      kind: `default`, `linear` (positions divided by `factor`), `llama3` (Llama 3.1's per-frequency scaling) or
        `longrope` (each frequency divided by a factor of its own).
      factor: how much longer the context became.
      low_freq_factor: `llama3`: wavelengths above `original_max_position / low_freq_factor` are divided by `factor`.
      high_freq_factor: `llama3`: wavelengths below `original_max_position / high_freq_factor` stay; between, a blend.
      original_max_position: context length in tokens before scaling.
      partial: how much of each head is rotated, its first dimensions.
      interleaved: dimension 2i is rotated with 2i + 1, instead of i with i + half of them.
      short_factors: `longrope`: divisors of the frequencies up to `original_max_position`, one per rotated pair.
      long_factors: `longrope`: the same beyond it.
      long: `longrope`: the long factors are used, for every document however short; see `extend_context`.
      max_position: `longrope`: context length in tokens with the long factors.
      attention_factor: `longrope`: multiplies what is rotated.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    partial: float = 1.0
    interleaved: bool = False
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long: bool = False
    max_position: int = 8192
    attention_factor: float = 1.0


@dataclass(frozen=True)
class LoraConfig:
    """An adapter; see `models.lora`. Names and defaults are PEFT's and TRL's, but for the targets (TRL: by family).

    Attributes:
      r: rank.
      alpha: the adapter's product is multiplied by `alpha / r`.
      dropout: rate on the adapter's input; only with a key.
      target_modules: `all-linear` (every linear module of the blocks), a list of their names in the checkpoint
        (`q_proj`, `mlp.down_proj`), or a regular expression for whole names.
      use_rslora: multiply by `alpha / sqrt(r)` instead.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False

    def __post_init__(self):
        """Raises ValueError on what makes no adapter."""
        if self.r < 1 or self.alpha <= 0:
            raise ValueError(f"r={self.r} must be at least 1, and alpha={self.alpha} above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      family: key in `FAMILIES`; it only matters for import and export.
      vocab_size: rows of the embedding table.
      embed_dim: width of the residual stream.
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; `num_heads` must be a multiple.
      head_dim: width of one head; even when `rope` is used.
      mlp_dim: width of the feed-forward layer.
      max_position: longest context in tokens; the table's length under `learned_positions`.
      norm: `rms` or `layer` (mean subtracted).
      norm_eps: added to the variance.
      norm_bias: `layer` norms have a bias.
      norm_plus_one: norms multiply by `1 + scale` instead of `scale`.
      norm_place: norms stand before each block's attention and MLP (`pre`), on what these give (`post`), or `both`.
      parallel_residual: attention and MLP both read the block's input, instead of one after the other.
      shared_norm: under `parallel_residual`, both read it through the same norm.
      activation: `silu`, `gelu` (exact) or `gelu_tanh`.
      gated_mlp: `down(act(gate x) * up x)` instead of `down(act(up x))`.
      rope: rotary embedding of every layer, or None.
      ropes: per layer instead of `rope`, its rotary embedding or None; empty: `rope` says it.
      learned_positions: a table of positions is added to the token embedding.
      windows: per layer, how many of the latest positions a query sees (itself included), or None for all.
      qk_norm: RMS norm of query and key, before the rotary embedding.
      qk_norm_over: it runs over each `head`, or over all heads of a `projection` at once.
      qkv_bias: bias of the query, key and value projections.
      output_bias: bias of the attention's output projection.
      mlp_bias: bias of the feed-forward projections.
      attention_scale: multiplies the attention scores; None: `head_dim ** -0.5`.
      attention_softcap: attention scores s become `cap * tanh(s / cap)`, or None.
      logit_softcap: the same for logits.
      embedding_multiplier: multiplies the token embeddings.
      residual_multiplier: multiplies what attention and MLP add to the residual stream.
      logit_multiplier: multiplies the logits.
      sparse_layers: per layer, whether experts stand in the place of the feed-forward layer; empty = in none.
      num_experts: experts of a sparse layer.
      experts_per_token: how many of them a token runs through.
      expert_mlp_dim: width of one expert.
      shared_mlp_dim: width of a further expert that every token runs through, behind a gate of its own; 0 = none.
      norm_topk_prob: a token's experts are weighed by their probabilities over the sum of these, not as they are.
      router_aux_loss_coef: weight of the load-balancing loss in training, where a method names none.
      tie_embeddings: the head is the transposed embedding table.
      lm_head: there is an LM head, of its own or tied; a reward or value model has none.
      score_head: there is a linear head, `Model.scores`.
      score_labels: its outputs: 1, or 2 with a bias each (a step is wrong, a step is right), whose score is the second
        less the first, the log-odds that the step is right.
      score_bias: added to every score. Hugging Face's heads have no bias: it is kept in the config.json alone.
      dropout: rate on embeddings and on each block's two outputs; only with a key.
      attention_dropout: rate on attention probabilities; only with a key.
      bos_id: id of the token that begins a text, or None.
      eos_ids: ids that end a completion.
      pad_id: id used for padding by others; nothing here depends on it.
      lora: of the adapter in `variables["lora"]`, where there is one.
    """

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_position: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    norm_plus_one: bool = False
    norm_place: Literal["pre", "post", "both"] = "pre"
    parallel_residual: bool = False
    shared_norm: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    rope: Rope | None = None
    ropes: tuple[Rope | None, ...] = ()
    learned_positions: bool = False
    windows: tuple[int | None, ...] = ()
    qk_norm: bool = False
    qk_norm_over: Literal["head", "projection"] = "head"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    sparse_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_mlp_dim: int = 0
    shared_mlp_dim: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.0
    tie_embeddings: bool = False
    lm_head: bool = True
    score_head: bool = False
    score_labels: int = 1
    score_bias: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    lora: LoraConfig | None = None

    def __post_init__(self):
        """Raises ValueError on sizes that cannot be built."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.rope and self.ropes:
            raise ValueError("rope is every layer's, ropes is each layer's: give one of them")
        for rope in filter(None, dict.fromkeys(self.layer_ropes)):
            _check_rope(rope, self.head_dim)
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for num_layers={self.num_layers}")
        if len(self.layer_ropes) != self.num_layers:
            raise ValueError(f"ropes has {len(self.ropes)} entries for num_layers={self.num_layers}")
        if self.shared_norm and (self.norm_place != "pre" or not self.parallel_residual):
            raise ValueError("shared_norm needs parallel_residual and norm_place='pre'")
        if self.sparse_layers and len(self.sparse_layers) != self.num_layers:
            raise ValueError(f"sparse_layers has {len(self.sparse_layers)} entries for num_layers={self.num_layers}")
        if any(self.sparse_layers) and not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and num_experts={self.num_experts}"
            )
        if not self.lm_head and not self.score_head:
            raise ValueError("a model has an LM head, a score head or both: lm_head and score_head are off")
        if self.score_labels not in (1, 2):
            raise ValueError(f"score_labels={self.score_labels}: a score head has 1 output, or 2")

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """The rotary embedding of each layer."""
        return self.ropes or (self.rope,) * self.num_layers


def _check_rope(rope: Rope, head_dim: int) -> None:
    size = rotary_dim(rope, head_dim)
    if size % 2 or not 0 < size <= head_dim:
        raise ValueError(f"head_dim={head_dim}: the part that a rotary embedding turns, {size}, must be even")
    factors = {len(rope.short_factors), len(rope.long_factors)}
    if rope.kind == "longrope" and factors != {size // 2}:
        raise ValueError(f"longrope needs a short and a long factor for each of {size // 2} pairs; it has {factors}")


def rotary_dim(rope: Rope, head_dim: int) -> int:
    """How many dimensions of a head are rotated."""
    return int(head_dim * rope.partial)


class Layer(NamedTuple):
    """What tells one layer's block from another's."""

    window: int | None
    rope: Rope | None
    sparse: bool


@dataclass(frozen=True)
class Segment:
    """A static pattern of blocks, scanned `repeats` times, from layer `start` on."""

    start: int
    layers: tuple[Layer, ...]
    repeats: int


def segments(config: ModelConfig, longest: int = 8) -> tuple[Segment, ...]:
    """Folds the layers into repeated patterns: the one that covers most layers first, the shortest on a tie."""
    sparse = config.sparse_layers or (False,) * config.num_layers
    layers = tuple(map(Layer, config.windows, config.layer_ropes, sparse))
    found, start = [], 0
    while start < len(layers):
        best = Segment(start, layers[start : start + 1], 1)
        for period in range(1, min(longest, len(layers) - start) + 1):
            pattern, repeats = layers[start : start + period], 1
            while layers[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > len(best.layers) * best.repeats:
                best = Segment(start, pattern, repeats)
        found.append(best)
        start += len(best.layers) * best.repeats
    return tuple(found)


def locate(config: ModelConfig, layer: int) -> tuple[int, int, int]:
    """Where a layer's parameters lie: (segment, repeat, place in the pattern)."""
    for index, segment in enumerate(segments(config)):
        offset = layer - segment.start
        if offset < segment.repeats * len(segment.layers):
            return index, offset // len(segment.layers), offset % len(segment.layers)
    raise ValueError(f"layer {layer} of a model with {config.num_layers} layers")


def extend_context(config: ModelConfig) -> ModelConfig:
    """The config with every `longrope` at its long factors, and the context that they were made for.

    Which factors count is the model's choice and not a document's: a token's logits then never depend on how long its
    document becomes, and what was drawn token by token is read again with the same numbers.

    Raises:
      ValueError: there is no longrope.
    """
    found = {rope for rope in config.layer_ropes if rope is not None and rope.kind == "longrope"}
    if not found:
        raise ValueError(f"a {config.family} model without longrope has one context only, of {config.max_position}")
    longer = {rope: replace(rope, long=True) for rope in found}
    rope = longer.get(config.rope, config.rope) if config.rope else None
    ropes = tuple(longer.get(each, each) if each else None for each in config.ropes)
    return replace(config, rope=rope, ropes=ropes, max_position=max(each.max_position for each in found))


def count_params(config: ModelConfig, *, embeddings: bool = True, active: bool = False) -> int:
    """Number of parameters.

    Args:
      config: the model.
      embeddings: count the tables and heads, and not the blocks alone.
      active: of a sparse layer only the experts that one token runs through (what its FLOPs follow).
    """
    matrices = 3 if config.gated_mlp else 2
    attention = config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    experts = config.experts_per_token if active else config.num_experts
    widths = 3 * experts * config.expert_mlp_dim + matrices * config.shared_mlp_dim
    sparse = config.embed_dim * (widths + config.num_experts + bool(config.shared_mlp_dim))
    dense = config.embed_dim * config.mlp_dim * matrices
    layers = sum(config.sparse_layers)
    blocks = config.num_layers * attention + layers * sparse + (config.num_layers - layers) * dense
    tables = config.vocab_size * config.embed_dim * (2 if config.lm_head and not config.tie_embeddings else 1)
    return blocks + (tables + config.score_head * config.score_labels * config.embed_dim if embeddings else 0)


def mean_attended(config: ModelConfig, length: float) -> float:
    """Keys that a token of a document of `length` tokens attends to, mean over its tokens and the layers' windows."""
    # Half the document; under a window w < n all but the first w tokens see w: (w n - w^2 / 2) / n.
    seen = (length / 2 if not w or w >= length else w - w * w / (2 * length) for w in config.windows)
    return sum(seen) / config.num_layers


def forward_flops(config: ModelConfig, tokens: int, attended: int, predictions: int) -> int:
    """FLOPs of one forward pass, two per multiply-add; matrix products only.

    Args:
      config: the model.
      tokens: tokens that run through the blocks.
      attended: sum over these tokens of the keys that each attends to (a mean over layers, see `mean_attended`).
      predictions: tokens on which the heads run.
    """
    scores = 4 * config.num_layers * config.num_heads * config.head_dim * attended
    head = 2 * (config.lm_head * config.vocab_size + config.score_head) * config.embed_dim * predictions
    return 2 * count_params(config, embeddings=False, active=True) * tokens + scores + head
