"""Supervised fine-tuning: the mean negative log-probability of the target tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.methods import common
from jaxalign.models import Model
from jaxalign.packing import Document
from jaxalign.training.state import TrainState
from jaxalign.training.step import LossFn, Step, Totals
from jaxalign.training.step import make_step as make_training_step
from jaxalign.types import Array, Batch, Variables

KIND = "sft"
COMPLETIONS = 1
LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning.

    Attributes:
      disable_dropout: no dropout even if the model's config has some.
      logits_chunk: predictions per row whose logits exist at once.
    """

    disable_dropout: bool = False
    logits_chunk: int = 128


def needs_reference(config: Config) -> bool:
    """Whether log-probs of a reference enter: never."""
    del config
    return False


def to_document(config: Config, example: common.Example) -> Document:
    """A plain document with the targets that `loss_mask` marks.

    Args:
      config: the method's.
      example: `input_ids` int32 `[tokens]`, `loss_mask` bool `[tokens]`.
    """
    del config
    targets = np.array(example["loss_mask"], dtype=bool)
    targets[:1] = False
    return Document(np.asarray(example["input_ids"], np.int32), targets=targets)


def count_tokens(example: common.Example) -> int:
    """Tokens of an example as `num_tokens` counts them."""
    return len(example["input_ids"])


def totals(batch: Batch) -> Totals:
    """The loss's denominator: targets of the global batch."""
    return {"loss": (batch.predictions.completions >= 0).sum()}


def make_loss(config: Config, model: Model) -> LossFn:
    """The loss of a micro-batch: `-sum log p(target) / targets of the global batch`."""

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        key = None if config.disable_dropout else key
        tokens = common.read(model, common.join_variables(params, frozen), batch, key, config.logits_chunk)
        real = (batch.predictions.completions >= 0).astype(tokens.logps.dtype)
        value = -jnp.where(real > 0, tokens.logps, 0).sum() / jnp.maximum(totals["loss"], 1)
        metrics = {
            "entropy": common.masked_mean(tokens.entropy, real),
            "mean_token_accuracy": common.masked_mean(tokens.hits, real),
        }
        return value, metrics

    return loss


def init(
    config: Config, model: Model, variables: Variables, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, Variables]:
    """The state at step 0 and the frozen variables."""
    del config
    return common.start(model, variables, optimizer, key)


def make_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array] | None = None,
) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`; jit it and donate the state."""
    return make_training_step(make_loss(config, model), totals, optimizer, learning_rate)


def make_batch(config: Config, examples: Sequence[common.Example], **layout: Any) -> Batch:
    """Packs examples (see `to_document`) into a batch; `layout` as `packing.pack`."""
    return common.pack_examples(sys.modules[__name__], config, examples, **layout)
