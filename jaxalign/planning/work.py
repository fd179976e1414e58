"""Work of a program, counted from the model and the batch: tokens and FLOPs, matrix products only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from jaxalign.models import ModelConfig
from jaxalign.models.config import forward_flops
from jaxalign.types import Batch


@dataclass(frozen=True)
class Work:
    """What a program computes, over all devices.

    Attributes:
      flops: of the model: forward passes, and backward passes at twice (frozen weights: once) their price.
      computed: with what rematerialisation computes again.
      tokens: read by the model, or drawn.
    """

    flops: float
    computed: float
    tokens: int

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(self.flops + other.flops, self.computed + other.computed, self.tokens + other.tokens)


def forward_of_batch(config: ModelConfig, batch: Batch) -> Work:
    """One forward pass over the real tokens of a packed batch (padding is no work of the model).

    A token attends to its document's tokens up to its own position, so to `position + 1`, or as many as the window has.
    """
    real = np.asarray(batch.rows.documents) > 0
    seen = np.asarray(batch.rows.positions)[real].astype(np.int64) + 1
    attended = sum(int((np.minimum(seen, window) if window else seen).sum()) for window in config.windows)
    predictions = int((np.asarray(batch.predictions.completions) >= 0).sum())
    flops = _flops(config, int(real.sum()), attended, predictions)
    return Work(flops, flops, int(real.sum()))


def training_of(forward: Work, *, frozen: bool, remat: str) -> Work:
    """A forward and a backward pass; `frozen` weights need no gradient, and `full` remat computes the blocks twice."""
    passes = 2.0 if frozen else 3.0
    again = {"full": 1.0}.get(remat, 0.0)
    return Work(passes * forward.flops, (passes + again) * forward.flops, forward.tokens)


def generation_of(config: ModelConfig, prompts: np.ndarray, completions: int, steps: int) -> Work:
    """Reading prompts once and drawing `steps` tokens for each of their completions.

    Args:
      config: the model.
      prompts: int `[prompts]`, their lengths.
      completions: per prompt.
      steps: tokens of every completion.
    """
    lengths = np.asarray(prompts, np.int64)
    # Prefill reads all but a prompt's last token; drawing reads that one and all drawn tokens but the last.
    read, drawn = int((lengths - 1).sum()), len(lengths) * completions * steps
    attended = 0
    for window, layers in Counter(config.windows).items():
        most = window or np.iinfo(np.int64).max
        for length, prompts_of in Counter(lengths.tolist()).items():
            prefix = int(np.minimum(np.arange(1, length), most).sum())
            decoded = int(np.minimum(np.arange(length, length + steps), most).sum())
            attended += layers * prompts_of * (prefix + completions * decoded)
    flops = _flops(config, read + drawn, attended, drawn)
    return Work(flops, flops, drawn)


def prefill_of(config: ModelConfig, prompts: np.ndarray) -> Work:
    """Of `generation_of`, reading the prompts, all but their last tokens; the rest is drawing."""
    lengths = np.asarray(prompts, np.int64)
    attended = 0
    for window, layers in Counter(config.windows).items():
        most = window or np.iinfo(np.int64).max
        attended += layers * sum(int(np.minimum(np.arange(1, length), most).sum()) for length in lengths.tolist())
    flops = _flops(config, int((lengths - 1).sum()), attended, 0)
    return Work(flops, flops, 0)


def _flops(config: ModelConfig, tokens: int, attended: int, predictions: int) -> float:
    """`forward_flops`, with the keys that are attended to summed over layers."""
    scores = 4 * config.num_heads * config.head_dim * attended
    return float(forward_flops(config, tokens, 0, predictions) + scores)
