"""What the methods share: splitting variables, starting a state, making a step, packing examples, evaluating."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.losses import TokenStatistics, state_statistics
from jaxalign.methods import balance
from jaxalign.models import Model, freezing
from jaxalign.packing import Document, pack
from jaxalign.sharding import data_shards
from jaxalign.training.coupled import CoupledLoss
from jaxalign.training.state import TrainState, init_state
from jaxalign.training.step import LossFn, Step, TotalsFn, evaluate
from jaxalign.training.step import make_step as make_training_step
from jaxalign.types import Array, Batch, Experience, Mean, Metrics, Predictions, PyTree, Variables

Example = Mapping[str, Any]

# Predictions per row whose logits exist at once on a CPU, and at least; bytes of float32 logits on an accelerator.
LEAST_CHUNK = 128
CHUNK_BYTES = 2**29


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


def policy_of(params: PyTree, frozen: PyTree) -> Variables:
    """The policy's variables."""
    return join_variables(params, frozen)


def init(
    config: Any, model: Model, variables: Variables, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, Variables]:
    """The state at step 0 and the frozen variables; what the step donates is copied.

    Raises:
      ValueError: quantised weights would be trained.
    """
    del config, model
    params, frozen = split_variables(variables)
    freezing.check_trainable(params)
    return init_state(params, optimizer, key), frozen


class MakeStep(Protocol):
    """A method's `make_step`."""

    def __call__(
        self,
        config: Any,
        model: Model,
        optimizer: optax.GradientTransformation,
        learning_rate: Callable[[Array], Array] | None = None,
    ) -> Step:
        """`(state, frozen, batch) -> (state, metrics)`; jit it and donate the state."""
        ...


def step_maker(make_loss: Callable[[Any, Model], LossFn | CoupledLoss], totals: TotalsFn) -> MakeStep:
    """The `make_step` of a method whose step is its loss's and nothing more."""

    def make_step(
        config: Any,
        model: Model,
        optimizer: optax.GradientTransformation,
        learning_rate: Callable[[Array], Array] | None = None,
    ) -> Step:
        """`(state, frozen, batch) -> (state, metrics)`; jit it and donate the state."""
        return make_training_step(make_loss(config, model), totals, optimizer, learning_rate)

    return make_step


def read(
    model: Model,
    variables: Variables,
    batch: Batch,
    key: jax.Array | None,
    chunk: int | None,
    *,
    temperature: float = 1.0,
    noise: Array | None = None,
    square_sums: bool = False,
    every: int = 1,
) -> TokenStatistics:
    """Runs the model on a micro-batch and the head where its predictions ask; `every` as in `balance.token_weights`."""
    weights = balance.token_weights(batch, every) if any(model.config.sparse_layers) else None
    hidden, _, aux = model.apply(variables, batch.rows, key=key, weights=weights, noise=noise)
    head = partial(statistics, model, temperature=temperature, chunk=chunk, square_sums=square_sums)
    return model.predict(head, variables, hidden, batch.predictions)._replace(aux=aux)


def statistics(
    model: Model, variables: Variables, states: Array, targets: Array, *, chunk: int | None, **options: Any
) -> TokenStatistics:
    """`losses.state_statistics` under a model's LM head: a head for `Model.predict`."""
    chunk = chunk or choose_chunk(model, states.shape[0])
    return state_statistics(partial(model.logits, variables), states, targets, chunk=chunk, **options)


def choose_chunk(model: Model, rows: int) -> int:
    """How many predictions per row have logits at the same time, where `logits_chunk` does not say.

    On a CPU 128, which stay in its caches. On a TPU or GPU so many that they make half a GiB on each device: for every
    chunk the head's weights are read, gathered where they are split, and their gradients summed.
    """
    mesh = model.mesh
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform == "cpu":
        return LEAST_CHUNK
    per_device = -(-rows // (1 if mesh is None else data_shards(mesh)))
    split = 1 if mesh is None else mesh.shape["tensor"]
    return max(LEAST_CHUNK, split * CHUNK_BYTES // (4 * model.config.vocab_size * per_device))


def read_scores(
    model: Model, variables: Variables, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, Mapping[str, Array]]:
    """What the score head says where a micro-batch's predictions ask, float32 `[rows, predictions]`; and `aux`."""
    options = {"weights": balance.token_weights(batch)} if any(model.config.sparse_layers) else {}
    hidden, _, aux = model.apply(variables, batch.rows, key=key, **options)
    return scores_of(model, variables, hidden, batch.predictions), aux


def scores_of(model: Model, variables: Variables, hidden: Array, predictions: Predictions) -> jax.Array:
    """The score head on known hidden states `[rows, length, embed]`, float32 `[rows, predictions]`."""
    return model.predict(lambda own, states, _: model.scores(own, states), variables, hidden, predictions)


def make_logps(model: Model, chunk: int | None, *, temperature: float = 1.0) -> Callable[[Variables, Batch], jax.Array]:
    """`(variables, batch) -> token_logps`, float32 `[micro, rows, predictions]`: a pass without gradients."""

    def logps(variables: Variables, batch: Batch) -> jax.Array:
        def one(micro_batch: Batch) -> jax.Array:
            return read(model, variables, micro_batch, None, chunk, temperature=temperature).logps

        return jax.lax.map(one, replace(batch, fields={}))

    return logps


def make_policy_logps(config: Any, model: Model) -> Callable[[Variables, Batch], jax.Array]:
    """`(variables, batch) -> token_logps`, float32 `[micro, rows, predictions]`, at the config's temperature."""
    return make_logps(model, config.logits_chunk, temperature=config.temperature)


def make_reference(config: Any, model: Model) -> Callable[[Variables, Batch], Batch]:
    """`(variables, batch) -> batch` with `ref_logps`, float32 `[micro, rows, predictions]`."""
    logps = make_logps(model, config.logits_chunk)
    return lambda variables, batch: replace(batch, fields={**batch.fields, "ref_logps": logps(variables, batch)})


def ref_logps(batch: Batch) -> Array:
    """Those that the batch carries; raises ValueError where it has none."""
    if "ref_logps" not in batch.fields:
        raise ValueError("the batch has no ref_logps: fill it with make_reference, or give examples that carry them")
    return batch.fields["ref_logps"]


def without_reference(config: Any) -> bool:
    """Whether log-probs of a reference enter: never."""
    del config
    return False


def with_reference(config: Any) -> bool:
    """Whether log-probs of a reference enter: always, into the metrics if not into the loss."""
    del config
    return True


def start_nothing(config: Any) -> dict[str, float]:
    """What goes from rollout to rollout: nothing."""
    del config
    return {}


def no_drawn_metrics(config: Any, drawn: Experience) -> Metrics:
    """Metrics of all that was drawn, of a method that learns from all of it: `estimate` gives them."""
    del config, drawn
    return {}


def no_batch_fields(config: Any, experience: Experience, micro_batches: int, update: int = 0) -> dict[str, np.ndarray]:
    """Numbers of a whole batch: none."""
    del config, experience, micro_batches, update
    return {}


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
