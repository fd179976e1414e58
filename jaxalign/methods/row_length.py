"""How long rows should be: the length at which a data set costs the least to train on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.models import ModelConfig
from jaxalign.models.config import count_params
from jaxalign.placing import PREDICTIONS_MULTIPLE, Piece, bucket, place, share_out

# Time per FLOP of attention over that of the blocks' matrix products, which its softmax and its small products raise. A
# round figure for one that varies: `benchmarks/attention_cost.py` gave 3.8 for SmolLM2's blocks on 2 CPU cores.
ATTENTION_SLOWNESS = 2.5
# How many completions `choose_rollout_length` places: enough for a steady mean, few enough to take no time.
LOOKED_AT = 512


def choose_length(
    batches: Sequence[Sequence[Sequence[Piece]]],
    micro_batch_size: int,
    *,
    attention_weight: float,
    prediction_weight: float = 0.0,
    multiple: int = 64,
    longest: int | None = None,
) -> int:
    """The row length that makes a set of examples cheapest to train on.

    Packs each batch at candidate lengths (multiples of `multiple` between the longest example and four times that) and
    adds up `rows * (length * (1 + attention_weight * length) + prediction_weight * predictions)`, `predictions`
    being those that a row has room for.

    Args:
      batches: the pieces of each document, of a sample of the data set in training order or shuffled.
      micro_batch_size: documents per micro-batch.
      attention_weight: cost of one token attending to one key, over the cost of one token in the blocks.
      prediction_weight: cost of one prediction in the head, over the same.
      multiple: row lengths are multiples of this.
      longest: the data set's longest piece, where the sample may lack it.
    """
    longest = max([longest or 1, *(piece.size for batch in batches for document in batch for piece in document)])
    shortest = -(-longest // multiple)
    shared = [_micro_batches(batch, micro_batch_size) for batch in batches]

    def cost(length: int) -> float:
        total = 0.0
        for micro_batches in shared:
            rows = predictions = 1
            for pieces in micro_batches:
                placed = place(pieces, length)
                rows = max(rows, len(placed))
                predictions = max([predictions, *(sum(pieces[i].predictions for i in row) for row in placed)])
            room = bucket(predictions, PREDICTIONS_MULTIPLE)
            row = length * (1 + attention_weight * length) + prediction_weight * room
            total += len(micro_batches) * bucket(rows) * row
        return total

    # Of long rows not every length is tried, but steps of a sixteenth.
    return min((n * multiple for n in range(shortest, 4 * shortest + 1, max(1, shortest // 16))), key=cost)


def choose_rollout_length(
    prompts: Sequence[int] | np.ndarray,
    batch_size: int,
    micro_batch_size: int,
    *,
    steps: int,
    completions: int,
    share_prompt: bool,
    least: int,
    model: ModelConfig,
    multiple: int,
) -> int:
    """The row length for rollouts on these prompts, if every completion takes all tokens that it may.

    Args:
      prompts: tokens of each prompt, in training order or shuffled; the first ones are looked at.
      batch_size: prompts per batch.
      micro_batch_size: prompts per micro-batch.
      steps: most tokens of a completion; the last one is only a target.
      completions: per prompt.
      share_prompt: whether they share a copy of their prompt, and so a row.
      least: the shortest length that may be taken.
      model: whose costs count.
      multiple: row lengths are multiples of this.
    """
    together, rows = (completions, 1) if share_prompt else (1, completions)
    looked_at = prompts[: max(micro_batch_size, LOOKED_AT // rows)]
    pieces = [[Piece(int(n) + together * (steps - 1), together * steps, together)] * rows for n in looked_at]
    return choose_length(
        [pieces[start : start + batch_size] for start in range(0, len(pieces), batch_size)],
        micro_batch_size,
        attention_weight=attention_weight(model),
        prediction_weight=prediction_weight(model),
        multiple=multiple,
        longest=least,
    )


def _micro_batches(batch: Sequence[Sequence[Piece]], size: int) -> list[list[Piece]]:
    """The pieces of each micro-batch of a batch."""
    shared: list[list[Piece]] = [[] for _ in range(-(-len(batch) // size))]
    for document, at in zip(batch, share_out(batch, len(shared), size), strict=True):
        shared[at // size].extend(document)
    return shared


def attention_weight(model: ModelConfig) -> float:
    """Cost of one token attending to one key over that of one token in the blocks."""
    return (
        ATTENTION_SLOWNESS
        * 2
        * model.num_layers
        * model.num_heads
        * model.head_dim
        / count_params(model, embeddings=False, active=True)
    )


def prediction_weight(model: ModelConfig) -> float:
    """Cost of one prediction in the heads over that of one token in the blocks.

    A step's three passes over the logits (one forward, two backward) are four, since they are computed again.
    """
    head = (model.lm_head * model.vocab_size + model.score_head) * model.embed_dim
    return 4 / 3 * head / count_params(model, embeddings=False, active=True)
