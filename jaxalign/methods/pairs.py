"""What the methods that learn from pairs share: their documents, their totals, their metrics."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxalign.losses import TokenStatistics
from jaxalign.methods.common import Example, masked_mean
from jaxalign.packing import Document
from jaxalign.training.step import Totals
from jaxalign.types import Array, Batch, Mean, Metric, Sum


def to_document(example: Example, *, prompt_targets: bool = False) -> Document:
    """The prompt as trunk, the chosen and the rejected completion as its branches.

    Args:
      example: `prompt_ids`, `chosen_ids`, `rejected_ids` int32, the completions ending as they should be learned (with
        EOS); with a precomputed reference `ref_chosen_logps` and `ref_rejected_logps`, float32 per token.
      prompt_targets: ask for the prompt's tokens too, all but the first.
    """
    branches = tuple(np.asarray(example[name], np.int32) for name in ("chosen_ids", "rejected_ids"))
    prompt = np.asarray(example["prompt_ids"], np.int32)
    fields = {}
    if "ref_chosen_logps" in example:
        fields["ref_logps"] = tuple(
            np.asarray(example[name], np.float32) for name in ("ref_chosen_logps", "ref_rejected_logps")
        )
    return Document(prompt, branches, np.arange(len(prompt)) > 0 if prompt_targets else None, fields)


def count_tokens(example: Example) -> int:
    """Tokens of an example as `num_tokens` counts them: the prompt with each completion."""
    return 2 * len(example["prompt_ids"]) + len(example["chosen_ids"]) + len(example["rejected_ids"])


def totals(batch: Batch) -> Totals:
    """Denominators of the loss's terms over the global batch: its pairs, and the tokens of `learned`."""
    learnt = learned(batch.predictions.completions, batch.present.shape[-1])
    return {"loss": batch.present[..., 0::2].sum(), "tokens": learnt.sum()}


def learned(completions: Array, n: int) -> Array:
    """float32, 1 for predictions that a likelihood term asks for: of chosen completions, and of prompts if there are.

    Args:
      completions: int32, numbers of a micro-batch's completions and (from n) prompts; -1 = padding.
      n: number of its completions.
    """
    return ((completions >= n) | ((completions >= 0) & (completions % 2 == 0))).astype(jnp.float32)


def loss_metric(parts: Sequence[tuple[Array, str]], batch: Batch) -> Sum:
    """The loss as evaluation merges it over batches.

    Args:
      parts: sums of its terms over a micro-batch, and the key of `totals` by whose number each is divided.
      batch: the micro-batch.
    """
    counts = totals(batch)
    return Sum(tuple(Mean(jnp.asarray(total, jnp.float32), counts[name]) for total, name in parts))


def reward_metrics(chosen: Array, rejected: Array, present: Array) -> dict[str, Metric]:
    """`rewards/*` of `[pairs]` rewards."""
    return {
        "rewards/chosen": masked_mean(chosen, present),
        "rewards/rejected": masked_mean(rejected, present),
        "rewards/accuracies": masked_mean((chosen > rejected).astype(jnp.float32), present),
        "rewards/margins": masked_mean(chosen - rejected, present),
    }


def token_metrics(tokens: TokenStatistics, logps: Array, batch: Batch) -> dict[str, Metric]:
    """`logps/*` of `[completions]` log-probs, and means over completion tokens; prompts never count."""
    completions, n = batch.predictions.completions, batch.present.shape[0]
    within = (completions >= 0) & (completions < n)
    chosen = (within & (completions % 2 == 0)).astype(jnp.float32)
    rejected = (within & (completions % 2 == 1)).astype(jnp.float32)
    present = batch.present[0::2]
    return {
        "logps/chosen": masked_mean(logps[0::2], present),
        "logps/rejected": masked_mean(logps[1::2], present),
        "logits/chosen": masked_mean(tokens.mean_logits, chosen),
        "logits/rejected": masked_mean(tokens.mean_logits, rejected),
        "entropy": masked_mean(tokens.entropy, chosen + rejected),
        "mean_token_accuracy": masked_mean(tokens.hits, chosen),
    }
