"""What the offline methods share: splitting variables, starting a state, packing examples, evaluating."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.losses import TokenStatistics, state_statistics
from jaxalign.methods import balance
from jaxalign.models import Model, freezing
from jaxalign.packing import Document, pack
from jaxalign.training.state import TrainState, init_state
from jaxalign.training.step import evaluate
from jaxalign.types import Array, Batch, Mean, Metrics, PyTree, Variables

Example = Mapping[str, Any]


def split_variables(variables: Variables) -> tuple[Variables, Variables]:
    """The trainable part and the frozen rest: see `models.freezing.split`."""
    return freezing.split(variables)


def join_variables(params: Variables, frozen: Variables) -> Variables:
    """The inverse of `split_variables`, and of `split_start`."""
    return freezing.join(params, frozen)


def split_start(method: ModuleType, variables: Any) -> tuple[PyTree, PyTree]:
    """`split_variables` of what a method's `init` takes, which with a critic is variables by role."""
    if not has_critic(method):
        return split_variables(variables)
    parts = {role: split_variables(each) for role, each in variables.items()}
    return {role: params for role, (params, _) in parts.items()}, {role: rest for role, (_, rest) in parts.items()}


def start(
    model: Model, variables: Variables, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, Variables]:
    """The state at step 0 and the frozen variables; what the step donates is copied.

    Raises:
      ValueError: quantised weights would be trained.
    """
    del model
    params, frozen = split_variables(variables)
    freezing.check_trainable(params)
    return init_state(params, optimizer, key), frozen


def read(
    model: Model,
    variables: Variables,
    batch: Batch,
    key: jax.Array | None,
    chunk: int,
    *,
    temperature: float = 1.0,
    noise: Array | None = None,
    square_sums: bool = False,
) -> TokenStatistics:
    """Runs the model on a micro-batch and the head where its predictions ask."""
    weights = balance.token_weights(batch) if any(model.config.sparse_layers) else None
    hidden, _, aux = model.apply(variables, batch.rows, key=key, weights=weights, noise=noise)
    head = partial(statistics, model, temperature=temperature, chunk=chunk, square_sums=square_sums)
    return model.predict(head, variables, hidden, batch.predictions)._replace(aux=aux)


def statistics(model: Model, variables: Variables, states: Array, targets: Array, **options: Any) -> TokenStatistics:
    """`losses.state_statistics` under a model's LM head: a head for `Model.predict`."""
    return state_statistics(partial(model.logits, variables), states, targets, **options)


def read_scores(
    model: Model, variables: Variables, batch: Batch, key: jax.Array | None = None, hidden: Array | None = None
) -> jax.Array:
    """The score head where a micro-batch's predictions ask, float32 `[rows, predictions]`; `hidden` if it is known."""
    hidden = model.apply(variables, batch.rows, key=key)[0] if hidden is None else hidden
    return model.predict(lambda own, states, _: model.scores(own, states), variables, hidden, batch.predictions)


def make_logps(model: Model, chunk: int, *, temperature: float = 1.0) -> Callable[[Variables, Batch], jax.Array]:
    """`(variables, batch) -> token_logps`, float32 `[micro, rows, predictions]`: a pass without gradients."""

    def logps(variables: Variables, batch: Batch) -> jax.Array:
        def one(micro_batch: Batch) -> jax.Array:
            return read(model, variables, micro_batch, None, chunk, temperature=temperature).logps

        return jax.lax.map(one, replace(batch, fields={}))

    return logps


def needs_reference(method: ModuleType, config: Any) -> bool:
    """Whether a method under this config reads log-probs of a reference, and one has to be loaded."""
    return method.needs_reference(config)


def trains_scores(method: ModuleType) -> bool:
    """Whether a method trains a score head (`SCORES`) instead of an LM head."""
    return getattr(method, "SCORES", False)


def score_labels(method: ModuleType) -> int:
    """Outputs of the score head that a method trains (`LABELS`), see `ModelConfig.score_labels`."""
    return getattr(method, "LABELS", 1)


def is_online(method: ModuleType) -> bool:
    """Whether a method learns from its own completions (`ONLINE`) instead of a data set's."""
    return getattr(method, "ONLINE", False)


def has_critic(method: ModuleType) -> bool:
    """Whether a method trains a critic beside its policy (`CRITIC`)."""
    return getattr(method, "CRITIC", False)


def borrows(method: ModuleType, config: Any) -> bool:
    """Whether an example's document also holds a completion of another example of the batch (`borrows`)."""
    asked = getattr(method, "borrows", None)
    return asked is not None and asked(config)


def to_documents(
    method: ModuleType, config: Any, examples: Sequence[Example], max_length: int | None = None
) -> list[Document]:
    """The documents of a global batch, in its order; a borrowed completion is cut where it goes beyond `max_length`."""
    if borrows(method, config):
        examples = method.borrow(config, examples, max_length)
    return [method.to_document(config, example) for example in examples]


def check_examples(method: ModuleType, config: Any, examples: Any, batch_size: int, name: str) -> None:
    """Lets a method refuse data that its batches cannot be made of (`check_examples`); `name` is for the message."""
    check = getattr(method, "check_examples", None)
    if check is not None:
        check(config, examples, batch_size, name)


def in_loss(batch: Batch) -> Array:
    """Completion numbers of a batch's predictions, -1 for what its `loss_mask` leaves out."""
    return jnp.where(batch.fields["loss_mask"] > 0, batch.predictions.completions, -1)


def masked_mean(x: Array, mask: Array) -> Mean:
    """A metric: the mean of x where the mask is 1."""
    return Mean(jnp.where(mask > 0, x, 0).sum().astype(jnp.float32), mask.sum().astype(jnp.float32))


def make_eval_step(method: ModuleType, config: Any, model: Model) -> Callable[[PyTree, PyTree, Batch], Metrics]:
    """`(params, frozen, batch) -> metrics` of a method's loss, without gradients or dropout."""
    return partial(evaluate, method.make_loss(config, model), method.totals)


def for_evaluation(method: ModuleType, config: Any) -> Any:
    """The Config that a method is evaluated with (`EVALUATION`: what is other than in training)."""
    return replace(config, **getattr(method, "EVALUATION", {}))


def pack_examples(method: ModuleType, config: Any, examples: Sequence[Example], **layout: Any) -> Batch:
    """Packs examples as the method's documents; `layout` as `packing.pack`."""
    documents = to_documents(method, config, examples)
    return pack(documents, completions=method.COMPLETIONS, share_prompt=getattr(config, "share_prompt", True), **layout)
