"""Process reward models: is this step right? Learned from steps with labels, read at the separator that ends each."""

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

KIND = "stepwise"
COMPLETIONS = 1
SCORES = True  # it trains a score head and no LM head
LABELS = 2  # of two outputs, as transformers' token classifiers have them
LEARNING_RATE = 1e-5
# A completion's score from its steps'. Source: Lightman et al., arXiv 2305.20050, appendix F; Wang et al., 2312.08935.
STEP_REDUCTIONS: dict[str, Callable[[np.ndarray], float]] = {
    "min": lambda right: float(np.min(right)),
    "product": lambda right: float(np.prod(right)),
    "last": lambda right: float(right[-1]),
}
EVALUATION = {"train_on_last_step_only": False}  # every step is judged there, as in TRL


@dataclass(frozen=True)
class Config:
    """Process reward modelling.

    Attributes:
      train_on_last_step_only: only the last step's label counts in training; evaluation judges every step.
      disable_dropout: no dropout even if the model's config has some.
    """

    train_on_last_step_only: bool = False
    disable_dropout: bool = True


def needs_reference(config: Config) -> bool:
    """Whether log-probs of a reference enter: never."""
    del config
    return False


def to_document(config: Config, example: common.Example) -> Document:
    """Prompt and steps as a plain document, asked at the last token of each step's separator.

    Args:
      config: the method's.
      example: `prompt_ids` and `completion_ids` int32 (every step with its separator), and per step int32 `ends`, the
        index in `completion_ids` of its separator's last token, and `labels` (1 = right, 0 = wrong); `steps`, how many
        there were before truncation, if some were lost: `train_on_last_step_only` then leaves nothing.
    """
    ends, labels = np.asarray(example["ends"], np.int64), np.asarray(example["labels"], np.float32)
    if config.train_on_last_step_only:
        last = int(np.asarray(example.get("steps", len(ends))).item()) - 1
        ends, labels = ends[last : last + 1], labels[last : last + 1]
    read = np.concatenate([example["prompt_ids"], example["completion_ids"]])
    # A prediction's source is the token before its target: one more token makes a target of what follows the last.
    tokens = np.append(read, 0).astype(np.int32)
    targets = np.zeros(len(tokens), bool)
    targets[len(example["prompt_ids"]) + ends + 1] = True
    return Document(tokens, targets=targets, fields={"labels": (labels,)})


def count_tokens(example: common.Example) -> int:
    """Tokens of an example as `num_tokens` counts them."""
    return len(example["prompt_ids"]) + len(example["completion_ids"])


def totals(batch: Batch) -> Totals:
    """The loss's denominator: labelled steps of the global batch."""
    return {"loss": (batch.predictions.completions >= 0).sum()}


def make_loss(config: Config, model: Model) -> LossFn:
    """The loss of a micro-batch: the sum of its steps' cross-entropies / labelled steps of the global batch.

    With the head's two logits z, `-log softmax(z)[label]`, which is `log(1 + exp(-s))` for a right step and
    `log(1 + exp(s))` for a wrong one, `s = z[1] - z[0]`. Source: Uesato et al., arXiv 2211.14275, section 2.4.
    """

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        key = None if config.disable_dropout else key
        odds = read_steps(model, common.join_variables(params, frozen), batch, key)
        real = (batch.predictions.completions >= 0).astype(odds.dtype)
        right = batch.fields["labels"] * real
        losses = jax.nn.softplus(jnp.where(right > 0, -odds, odds))
        value = jnp.where(real > 0, losses, 0).sum() / jnp.maximum(totals["loss"], 1)
        hits = ((odds > 0) == (right > 0)).astype(jnp.float32)
        metrics = {
            "accuracy": common.masked_mean(hits, real),
            "accuracy/right": common.masked_mean(hits, right),
            "accuracy/wrong": common.masked_mean(hits, real - right),
        }
        return value, jax.lax.stop_gradient(metrics)

    return loss


def read_steps(model: Model, variables: Variables, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Log-odds that each asked step of a micro-batch is right, float32 `[rows, predictions]`; any number in padding."""
    return common.read_scores(model, variables, batch, key)


def score_steps(
    model: Model, variables: Variables, examples: Sequence[common.Example], *, micro_batch_size: int = 16
) -> list[np.ndarray]:
    """Probabilities that the steps of completions are right, float32 `[steps]` each; see `STEP_REDUCTIONS`.

    Args:
      model: with two labels.
      variables: its variables.
      examples: as `to_document` takes them, without `labels` (`data.encode` of kind `stepwise` makes them).
      micro_batch_size: completions that go through the model together.
    """
    unlabelled = [{**example, "labels": np.zeros(len(example["ends"]))} for example in examples]
    batch = make_batch(Config(), unlabelled, micro_batch_size=micro_batch_size)
    odds = jax.jit(lambda variables, batch: jax.lax.map(lambda part: read_steps(model, variables, part), batch))
    right, asked = np.asarray(jax.nn.sigmoid(odds(variables, batch))), batch.predictions
    found = [np.zeros(len(example["ends"]), np.float32) for example in examples]
    for micro, row, place in np.argwhere(np.asarray(asked.completions) >= 0):
        number = micro * micro_batch_size + asked.completions[micro, row, place]
        found[number][asked.steps[micro, row, place]] = right[micro, row, place]
    return found


def init(
    config: Config, model: Model, variables: Variables, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, Variables]:
    """The state at step 0 and the frozen variables, of a model with two labels (see `models.add_score_head`)."""
    del config
    if model.config.score_labels != LABELS:
        raise ValueError("a process reward model has two labels: give it models.add_score_head(..., labels=2)")
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
