"""Learning from single completions with a thumbs up or down against a fixed reference: KTO, BCO, APO-zero.

An update without any trainer, from dicts of `prompt_ids`, `completion_ids` and `label`:

    config = unpaired_preference.Config(loss_type="kto")
    state, frozen = unpaired_preference.init(config, model, variables, optimizer, key)
    step = jax.jit(unpaired_preference.make_step(config, model, optimizer), donate_argnums=0)
    reference = jax.jit(unpaired_preference.make_reference(config, model))
    batch = reference(variables, unpaired_preference.make_batch(config, examples))
    state, metrics = step(state, frozen, batch)

With `bco`, `make_carry` goes between the last two: it adds the mean reward of all examples so far.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data import Examples, check_labels, weight_ranges
from jaxalign.losses import (
    MISMATCHED_LOSSES,
    RUNNING_LOSSES,
    UNPAIRED_LOSSES,
    UnpairedLogps,
    kto_baseline,
    ratio,
    running_mean,
    sum_by_completion,
)
from jaxalign.methods import balance, common
from jaxalign.methods.checks import check_chunk
from jaxalign.models import Model
from jaxalign.packing import Document
from jaxalign.training.coupled import CoupledLoss
from jaxalign.training.step import LossFn, Totals
from jaxalign.types import Array, Batch, Mean, Metrics, PyTree, Variables

KIND = "unpaired"
COMPLETIONS = 2  # an example's own, and with `kto` one of another example
BRANCHES = ("completion",)  # those whose reference log-probs can be computed beforehand
LEARNING_RATE = 1e-6
PRESETS: dict[str, dict[str, Any]] = {name: {"loss_type": name} for name in UNPAIRED_LOSSES}

needs_reference = common.with_reference
init = common.init
make_reference = common.make_reference

logger = logging.getLogger("jaxalign")


@dataclass(frozen=True)
class Config:
    """Optimisation by single completions that are desirable or not.

    Attributes:
      loss_type: key in `UNPAIRED_LOSSES`.
      beta: inverse strength of the KL penalty.
      desirable_weight: of the loss of desirable completions, against unequal numbers of the two kinds.
      undesirable_weight: of the loss of undesirable ones.
      disable_dropout: no dropout even if the model's config has some.
      precompute_ref_log_probs: run the reference once over the data set before training and cache what it says on disk,
        instead of keeping it in memory and running it on every batch; not with `kto`.
      share_prompt: compute the prompt once for a completion and another example's.
      logits_chunk: predictions per row whose logits exist at once; None = `common.choose_chunk`.
      router_aux_loss_coef: weight of the load-balancing loss of sparse models; None = what the model's config says. An
        example counts with its own completion, not with another's.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    disable_dropout: bool = True
    precompute_ref_log_probs: bool = False
    share_prompt: bool = True
    logits_chunk: int | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        """Raises ValueError on settings that have no meaning."""
        if self.loss_type not in UNPAIRED_LOSSES:
            raise ValueError(f"loss_type {self.loss_type!r} is unknown; known: {', '.join(UNPAIRED_LOSSES)}")
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be greater than 0")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.precompute_ref_log_probs and self.loss_type in MISMATCHED_LOSSES:
            raise ValueError(
                f"precompute_ref_log_probs: {self.loss_type} compares with completions of other examples, which change "
                "with every shuffle; leave it false"
            )
        check_chunk(self)


def borrows(config: Config) -> bool:
    """Whether an example's document also holds the completion of its neighbour in the batch."""
    return config.loss_type in MISMATCHED_LOSSES


def borrow(config: Config, examples: Sequence[common.Example], max_length: int | None = None) -> list[dict[str, Any]]:
    """Examples of a global batch, each with its predecessor's completion as `mismatched_ids` (the first: the last's).

    Args:
      config: the method's.
      examples: of the whole batch, in its order.
      max_length: most tokens of a prompt with such a completion, which is cut at its end.

    Raises:
      ValueError: a single example, whose neighbour would be itself.
    """
    if len(examples) < 2:
        raise ValueError(
            f"loss_type {config.loss_type!r} compares with completions of other prompts: one example alone has none"
        )

    def taken(i: int) -> Array:
        room = None if max_length is None else max(max_length - len(examples[i]["prompt_ids"]), 0)
        return np.asarray(examples[i - 1]["completion_ids"])[:room]

    return [{**example, "mismatched_ids": taken(i)} for i, example in enumerate(examples)]


def check_examples(config: Config, examples: Examples, batch_size: int, name: str) -> None:
    """Raises ValueError where a batch could not be made, or all training examples have one label.

    Warns of weights that do not balance the two kinds of training examples.

    Args:
      config: the method's.
      examples: all of them.
      batch_size: examples per step.
      name: `training` or `evaluation`, for messages.
    """
    if borrows(config) and (len(examples) % batch_size or batch_size) == 1:
        raise ValueError(
            f"train.batch_size={batch_size} leaves one of the {len(examples)} {name} examples alone in a batch, and "
            f"loss_type {config.loss_type!r} compares with completions of other prompts: choose another batch size, or "
            "another number of examples"
        )
    if name == "training":
        check_labels(examples)
        low, high = weight_ranges(examples.labels)["desirable_weight"]
        given = config.desirable_weight / config.undesirable_weight
        if not 0.99 * low <= given <= 1.01 * high:
            logger.warning(
                "method.desirable_weight / method.undesirable_weight is %.3g; between %.3g and %.3g both kinds of "
                "training examples weigh about the same",
                given,
                low,
                high,
            )


def to_document(config: Config, example: common.Example) -> Document:
    """The prompt as trunk, the completion and perhaps another example's as its branches.

    Args:
      config: the method's.
      example: `prompt_ids` and `completion_ids` int32, the completion ending as it should be learned (with EOS),
        `label` (true = desirable); perhaps `mismatched_ids`, see `borrow`; with a precomputed reference
        `ref_completion_logps`, float32 per token.

    Raises:
      ValueError: a precomputed reference that lacks the other example's completion.
    """
    del config
    branches = [np.asarray(example[name], np.int32) for name in ("completion_ids", "mismatched_ids") if name in example]
    fields = {}
    if "ref_completion_logps" in example:
        fields["ref_logps"] = (np.asarray(example["ref_completion_logps"], np.float32),)
        if len(branches) > 1:
            raise ValueError("ref_completion_logps do not cover mismatched_ids: fill the batch with make_reference")
    label = float(np.asarray(example["label"]).reshape(()))
    numbers = {"labels": (label, 0.0)[: len(branches)]}
    return Document(np.asarray(example["prompt_ids"], np.int32), tuple(branches), fields=fields, numbers=numbers)


def count_tokens(example: common.Example) -> int:
    """Tokens of an example as `num_tokens` counts them: its prompt and its own completion."""
    return len(example["prompt_ids"]) + len(example["completion_ids"])


def totals(batch: Batch) -> Totals:
    """Denominators: examples of the global batch, and how many of them are of each kind."""
    present, labels = batch.present[..., 0::2], batch.fields["labels"][..., 0::2]
    desirable = (present * labels).sum()
    return {"loss": present.sum(), "desirable": desirable, "undesirable": present.sum() - desirable}


class _LogRatios(NamedTuple):
    """Sums over completions of `log policy - log reference`, `[..., examples]` each: the own, the other's."""

    own: Array
    other: Array


class _Read(NamedTuple):
    """What the loss looks at of a micro-batch, and its part of the load-balancing loss."""

    ratios: _LogRatios
    router: Array


def make_loss(config: Config, model: Model) -> LossFn | CoupledLoss:
    """The loss of a batch that carries `ref_logps`: the weighted sum over its examples / examples of the global batch.

    That of `kto` couples the batch: z0 is a mean over all of it. `bco` needs the field `delta`, see `make_carry`.
    """

    weight = balance.coefficient(config.router_aux_loss_coef, model)

    def read(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        reference = common.ref_logps(batch)
        key = None if config.disable_dropout else key
        variables, chunk = common.join_variables(params, frozen), config.logits_chunk
        tokens = common.read(model, variables, batch, key, chunk, every=COMPLETIONS)
        n = batch.present.shape[0]
        # Differenced per token before summing: the sums are large and nearly equal.
        ratios = sum_by_completion(tokens.logps - reference, batch.predictions.completions, n)
        ratios = _LogRatios(ratios[0::2], ratios[1::2])
        metrics = _metrics(config, batch, totals, tokens, ratios)
        router, metrics = balance.add(weight, model, batch, tokens.aux, jnp.zeros(()), metrics)
        return _Read(ratios, router), metrics

    def combine(found: _Read, batch: Batch, totals: Totals):
        ratios = found.ratios
        labels, present = batch.fields["labels"][..., 0::2], batch.present[..., 0::2]
        baseline, metrics = _baseline(config, ratios, batch, totals)
        losses = UNPAIRED_LOSSES[config.loss_type](UnpairedLogps(ratios.own, labels, baseline), beta=config.beta)
        weights = jnp.where(labels > 0, config.desirable_weight, config.undesirable_weight)
        value = jnp.where(present > 0, weights * losses, 0).sum() / jnp.maximum(totals["loss"], 1)
        return value + found.router.sum(), metrics

    def loss(params: Variables, frozen: Variables, batch: Batch, totals: Totals, key: jax.Array | None):
        found, metrics = read(params, frozen, batch, totals, key)
        value, extra = combine(found, batch, totals)
        return value, {**metrics, **extra}

    whole = CoupledLoss(read, combine) if borrows(config) else loss
    return balance.couple(weight, model, whole, disable_dropout=config.disable_dropout, every=COMPLETIONS)


def carries(config: Config) -> bool:
    """Whether something moves along from batch to batch: BCO's mean reward."""
    return config.loss_type in RUNNING_LOSSES


def start_carry(config: Config) -> dict[str, np.ndarray]:
    """What is carried before the first batch: a mean reward of 0 over nothing."""
    del config
    return {"mean": np.zeros((), np.float32), "count": np.zeros((), np.float32)}


def attach(config: Config, batch: Batch, carry: PyTree) -> Batch:
    """The batch with what is carried as its field `delta`, `[micro]`, as it stands: for evaluation."""
    del config
    delta = jnp.broadcast_to(carry["mean"], (batch.present.shape[0],))
    return replace(batch, fields={**batch.fields, "delta": delta})


def make_carry(config: Config, model: Model) -> Callable[[Variables, Batch, PyTree], tuple[Batch, PyTree]]:
    """`(variables, batch, carry) -> (batch, carry)`: the mean reward of all training examples so far, these included.

    A pass of the policy without gradients over a batch that has `ref_logps`; the result is its field `delta`.
    """
    logps = common.make_logps(model, config.logits_chunk)

    def step(variables: Variables, batch: Batch, carry: PyTree) -> tuple[Batch, PyTree]:
        ratios = logps(variables, batch) - batch.fields["ref_logps"]
        sums = jax.vmap(partial(sum_by_completion, n=batch.present.shape[1]))(ratios, batch.predictions.completions)
        rewards, present = config.beta * sums[:, 0::2], batch.present[:, 0::2]
        mean, count = running_mean(carry["mean"], carry["count"], rewards, present)
        carry = {"mean": mean, "count": count}
        return attach(config, batch, carry), carry

    return step


make_step = common.step_maker(make_loss, totals)


def make_batch(config: Config, examples: Sequence[common.Example], **layout: Any) -> Batch:
    """Packs examples (see `to_document`) into a batch, with `kto` each beside its neighbour's completion.

    `layout` as `packing.pack`.
    """
    return common.pack_examples(sys.modules[__name__], config, examples, **layout)


def _baseline(config: Config, ratios: _LogRatios, batch: Batch, totals: Totals) -> tuple[Array | float, Metrics]:
    """What the loss compares with, and the metric that shows it, weighed by examples."""
    present = batch.present[..., 0::2].sum()
    if borrows(config):
        z0 = kto_baseline(ratios.other, batch.present[..., 1::2])
        return z0, {"kl": Mean(z0 * present, present)}
    if carries(config):
        if "delta" not in batch.fields:
            raise ValueError("the batch has no delta: fill it with make_carry, or with attach for evaluation")
        delta = batch.fields["delta"]
        return delta, {"delta": Mean(delta * present, present)}
    return 0.0, {}


def _metrics(config: Config, batch: Batch, totals: Totals, tokens, ratios: _LogRatios) -> Metrics:
    completions, n = batch.predictions.completions, batch.present.shape[0]
    present, labels = batch.present[0::2], batch.fields["labels"][0::2]
    own = ((completions >= 0) & (completions % 2 == 0)).astype(jnp.float32)
    liked = own * jnp.asarray(batch.fields["labels"])[jnp.clip(completions, 0)]
    rewards, logps = config.beta * ratios.own, sum_by_completion(tokens.logps, completions, n)[0::2]
    kinds = {"chosen": present * labels, "rejected": present * (1 - labels)}
    means = {kind: jnp.where(mask > 0, rewards, 0).sum() for kind, mask in kinds.items()}
    means = {
        kind: ratio(means[kind], totals[name]) for kind, name in zip(means, ("desirable", "undesirable"), strict=True)
    }
    both = ((totals["desirable"] > 0) & (totals["undesirable"] > 0)).astype(jnp.float32)
    metrics = {
        **{f"rewards/{kind}": common.masked_mean(rewards, mask) for kind, mask in kinds.items()},
        # The difference of the whole batch's two means, weighed by its examples: micro-batches only add.
        "rewards/margins": Mean(both * totals["loss"] * (means["chosen"] - means["rejected"]), both * present.sum()),
        **{f"logps/{kind}": common.masked_mean(logps, mask) for kind, mask in kinds.items()},
        "logits/chosen": common.masked_mean(tokens.mean_logits, liked),
        "logits/rejected": common.masked_mean(tokens.mean_logits, own - liked),
        "entropy": common.masked_mean(tokens.entropy, own),
    }
    return jax.lax.stop_gradient(metrics)
