"""Supervised fine-tuning: the mean loss of the target tokens, by default their negative log-probability."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.losses import SFT_LOSSES
from jaxalign.methods import balance, common
from jaxalign.methods.checks import check_chunk
from jaxalign.methods.noise import embedding_noise
from jaxalign.models import Model
from jaxalign.packing import Document
from jaxalign.training.state import TrainState
from jaxalign.training.step import LossFn, Step, Totals
from jaxalign.training.step import make_step as make_training_step
from jaxalign.types import Array, Batch, Metrics, PyTree, Variables

KIND = "sft"
COMPLETIONS = 1
LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning.

    Attributes:
      loss_type: key in `SFT_LOSSES`: `nll`, or `dft` (each target weighted by its own probability).
      label_smoothing_factor: share of each target that is spread over the vocabulary, in [0, 1); `nll` only.
      neftune_noise_alpha: scale of NEFTune's noise on the embeddings in training; None = none.
      disable_dropout: no dropout even if the model's config has some.
      logits_chunk: predictions per row whose logits exist at once; None = `common.choose_chunk`.
      router_aux_loss_coef: weight of the load-balancing loss of sparse models; None = what the model's config says.
    """

    loss_type: Literal["nll", "dft"] = "nll"
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    disable_dropout: bool = False
    logits_chunk: int | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning."""
        if self.loss_type not in SFT_LOSSES:
            raise ValueError(f"loss_type={self.loss_type!r} is unknown; known: {', '.join(SFT_LOSSES)}")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} must lie in [0, 1)")
        if self.label_smoothing_factor and self.loss_type != "nll":
            raise ValueError(f"label_smoothing_factor goes with loss_type nll; {self.loss_type} has no such form")
        if self.neftune_noise_alpha is not None and self.neftune_noise_alpha <= 0:
            raise ValueError(f"neftune_noise_alpha={self.neftune_noise_alpha} must be above 0; null turns it off")
        check_chunk(self)


needs_reference = common.without_reference
init = common.init


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
    """Tokens of an example as `num_tokens` counts them; of a wrapped row, those that the row before has not."""
    return len(example["input_ids"]) - int(np.sum(example.get("carried", 0)))


def totals(batch: Batch) -> Totals:
    """The loss's denominator: targets of the global batch."""
    return {"loss": (batch.predictions.completions >= 0).sum()}


def make_loss(config: Config, model: Model) -> LossFn:
    """The loss of a micro-batch: the sum of its targets' losses (`SFT_LOSSES`) / targets of the global batch.

    NEFTune's noise is drawn under `batch.fields["noise_key"]`, uint32 `[2]`, which `make_step` puts there; without a
    key (in evaluation) there is none.
    """
    weight = balance.coefficient(config.router_aux_loss_coef, model)
    per_token, alpha = SFT_LOSSES[config.loss_type], config.neftune_noise_alpha

    def draw(batch: Batch, key: jax.Array | None) -> jax.Array | None:
        if alpha is None or key is None:
            return None
        drawn = jax.random.wrap_key_data(jnp.asarray(batch.fields["noise_key"]))
        return embedding_noise(batch.rows, drawn, alpha=alpha, embed_dim=model.config.embed_dim)

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        noise = draw(batch, key)
        key = None if config.disable_dropout else key
        variables = common.join_variables(params, frozen)
        tokens = common.read(model, variables, batch, key, config.logits_chunk, noise=noise)
        real = (batch.predictions.completions >= 0).astype(tokens.logps.dtype)
        losses = per_token(tokens, label_smoothing=config.label_smoothing_factor)
        value = jnp.where(real > 0, losses, 0).sum() / jnp.maximum(totals["loss"], 1)
        metrics = {
            "entropy": common.masked_mean(tokens.entropy, real),
            "mean_token_accuracy": common.masked_mean(tokens.hits, real),
        }
        return balance.add(weight, model, batch, tokens.aux, value, metrics)

    return balance.couple(weight, model, loss, disable_dropout=config.disable_dropout, noise=draw)


def make_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array] | None = None,
) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`; jit it and donate the state."""
    plain = make_training_step(make_loss(config, model), totals, optimizer, learning_rate)
    if config.neftune_noise_alpha is None:
        return plain

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        # All micro-batches draw under the step's own key, so that their split does not change an example's noise.
        data = jax.random.key_data(jax.random.fold_in(state.key, state.step))
        repeated = jnp.broadcast_to(data[None], (batch.present.shape[0], *data.shape))
        return plain(state, frozen, replace(batch, fields={**batch.fields, "noise_key": repeated}))

    return step


def make_batch(config: Config, examples: Sequence[common.Example], **layout: Any) -> Batch:
    """Packs examples (see `to_document`) into a batch; `layout` as `packing.pack`."""
    return common.pack_examples(sys.modules[__name__], config, examples, **layout)
