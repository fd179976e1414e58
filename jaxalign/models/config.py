"""What a decoder is, as data: one frozen config for every family, and how its layers fold into scanned segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      theta: base of the frequencies.
      kind: `default`, `linear` (positions divided by `factor`) or `llama3` (Llama 3.1's per-frequency scaling).
      factor: how much longer the context became.
      low_freq_factor: `llama3`: wavelengths above `original_max_position / low_freq_factor` are divided by `factor`.
      high_freq_factor: `llama3`: wavelengths below `original_max_position / high_freq_factor` stay; between, a blend.
      original_max_position: context length in tokens before scaling.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


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
      norm: `rms` or `layer` (mean subtracted, with bias).
      norm_eps: added to the variance.
      activation: `silu`, `gelu` (exact) or `gelu_tanh`.
      gated_mlp: `down(act(gate x) * up x)` instead of `down(act(up x))`.
      rope: rotary embedding, or None.
      learned_positions: a table of positions is added to the token embedding.
      windows: per layer, how many of the latest positions a query sees (itself included), or None for all.
      qk_norm: RMS norm over each head of query and key, before the rotary embedding.
      qkv_bias: bias of the query, key and value projections.
      output_bias: bias of the attention's output projection.
      mlp_bias: bias of the feed-forward projections.
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
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    rope: Rope | None = None
    learned_positions: bool = False
    windows: tuple[int | None, ...] = ()
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
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

    def __post_init__(self):
        """Raises ValueError on sizes that cannot be built."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for a rotary embedding")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for num_layers={self.num_layers}")
        if not self.lm_head and not self.score_head:
            raise ValueError("a model has an LM head, a score head or both: lm_head and score_head are off")
        if self.score_labels not in (1, 2):
            raise ValueError(f"score_labels={self.score_labels}: a score head has 1 output, or 2")


@dataclass(frozen=True)
class Segment:
    """A static pattern of blocks (their windows), scanned `repeats` times, from layer `start` on."""

    start: int
    windows: tuple[int | None, ...]
    repeats: int


def segments(config: ModelConfig, longest: int = 8) -> tuple[Segment, ...]:
    """Folds the layers into repeated patterns: the one that covers most layers first, the shortest on a tie."""
    found, start, windows = [], 0, config.windows
    while start < len(windows):
        best = Segment(start, windows[start : start + 1], 1)
        for period in range(1, min(longest, len(windows) - start) + 1):
            pattern, repeats = windows[start : start + period], 1
            while windows[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > len(best.windows) * best.repeats:
                best = Segment(start, pattern, repeats)
        found.append(best)
        start += len(best.windows) * best.repeats
    return tuple(found)


def locate(config: ModelConfig, layer: int) -> tuple[int, int, int]:
    """Where a layer's parameters lie: (segment, repeat, place in the pattern)."""
    for index, segment in enumerate(segments(config)):
        offset = layer - segment.start
        if offset < segment.repeats * len(segment.windows):
            return index, offset // len(segment.windows), offset % len(segment.windows)
    raise ValueError(f"layer {layer} of a model with {config.num_layers} layers")


def count_params(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Number of parameters; without `embeddings`, only those in the blocks (what a token's FLOPs follow)."""
    attention = config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = config.embed_dim * config.mlp_dim * (3 if config.gated_mlp else 2)
    blocks = config.num_layers * (attention + mlp)
    tables = config.vocab_size * config.embed_dim * (2 if config.lm_head and not config.tie_embeddings else 1)
    return blocks + (tables + config.score_head * config.score_labels * config.embed_dim if embeddings else 0)


def forward_flops(config: ModelConfig, tokens: int, attended: int, predictions: int) -> int:
    """FLOPs of one forward pass, two per multiply-add; matrix products only.

    Args:
      config: the model.
      tokens: tokens that run through the blocks.
      attended: sum over these tokens of the keys that each attends to.
      predictions: tokens on which the heads run.
    """
    scores = 4 * config.num_layers * config.num_heads * config.head_dim * attended
    head = 2 * (config.lm_head * config.vocab_size + config.score_head) * config.embed_dim * predictions
    return 2 * count_params(config, embeddings=False) * tokens + scores + head
