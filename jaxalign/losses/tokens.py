"""The chunked LM head: logits exist for one chunk of predictions at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.types import Array, Predictions

# What the backward pass of a chunk does not compute again.
KEPT = "head_sums"


class TokenStatistics(NamedTuple):
    """What a loss or a metric needs to know of each prediction's distribution; float32 `[rows, predictions]` each.

    Attributes:
      logps: log-probability of the target. It and `mean_logps` are differentiable, the entropy on request.
      entropy: `-sum_v p log p`, in nats.
      hits: 1 where no token is more probable than the target.
      mean_logits: mean over the vocabulary of the raw logits.
      mean_logps: mean over the vocabulary of the log-probabilities.
      log_square_sums: `log sum_v p^2`; None where it was not asked for.
      aux: what `Model.apply` says beside, if anything.
    """

    logps: jax.Array
    entropy: jax.Array
    hits: jax.Array
    mean_logits: jax.Array
    mean_logps: jax.Array
    log_square_sums: jax.Array | None = None
    aux: Mapping[str, jax.Array] = {}


def gather_sources(hidden: Array, predictions: Predictions) -> jax.Array:
    """The hidden states that predict: `[rows, length, embed]` -> `[rows, predictions, embed]`."""
    chex.assert_rank([hidden, predictions.sources], [3, 2])
    return jnp.take_along_axis(hidden, predictions.sources[..., None], axis=1)


def map_chunks(function: Callable, inputs, *, chunk: int):
    """Maps over chunks of predictions, each under `jax.checkpoint` that keeps what is named `KEPT`.

    Args:
      function: pytree of `[rows, chunk, ...]` -> pytree of `[rows, chunk]`.
      inputs: pytree of `[rows, predictions, ...]`.
      chunk: most predictions per row and chunk; chunks are made equal, the last is padded with zeros.

    Returns:
      `[rows, predictions]` leaves. Rows stay a batch axis, so a sharded batch needs no collective here.
    """
    rows, size = jax.tree.leaves(inputs)[0].shape[:2]
    count = -(-size // min(chunk, size))
    chunk = -(-size // count)

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, count * chunk - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    one = jax.checkpoint(function, policy=policy, prevent_cse=False)
    _, mapped = jax.lax.scan(lambda _, part: (None, one(part)), None, jax.tree.map(split, inputs))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, count * chunk)[:, :size], mapped)


def token_statistics(
    logits: Callable[[Array], Array],
    hidden: Array,
    predictions: Predictions,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
    entropy_gradient: bool = False,
    square_sums: bool = False,
) -> TokenStatistics:
    """Statistics of each prediction; no `[rows, length, vocab]` array exists at any time.

    Args:
      logits: `[..., embed]` -> float32 `[..., vocab]`, for example `partial(model.logits, variables)`.
      hidden: `[rows, length, embed]`.
      predictions: what is asked; padding gives finite numbers that nobody may read.
      temperature: divides the logits, save for `mean_logits`.
      chunk: predictions per row whose logits exist at once.
      entropy_gradient: let gradients flow through the entropy, for a loss that it is a term of.
      square_sums: fill `log_square_sums`.
    """
    states = gather_sources(hidden, predictions)
    return state_statistics(
        logits,
        states,
        jnp.asarray(predictions.targets),
        temperature=temperature,
        chunk=chunk,
        entropy_gradient=entropy_gradient,
        square_sums=square_sums,
    )


def state_statistics(
    logits: Callable[[Array], Array],
    states: Array,
    targets: Array,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
    entropy_gradient: bool = False,
    square_sums: bool = False,
) -> TokenStatistics:
    """`token_statistics` of gathered hidden states `[rows, predictions, embed]` and `targets` `[rows, predictions]`."""
    options = (temperature, entropy_gradient, square_sums)

    def statistics(part):
        states, targets = part
        return _statistics(logits(states), targets, options)

    return map_chunks(statistics, (states, targets), chunk=chunk)


Options = tuple[float, bool, bool]  # temperature, entropy_gradient, square_sums


def _forward(raw: Array, targets: Array, options: Options):
    temperature, _, square_sums = options
    most = raw.max(-1)
    chosen = jnp.take_along_axis(raw, targets[..., None], axis=-1)[..., 0]
    shifted = (raw - most[..., None]) / temperature
    exps = jnp.exp(shifted)
    total = exps.sum(-1)
    log_sum = jnp.log(total)
    mean_logits = raw.mean(-1)
    found = TokenStatistics(
        logps=(chosen - most) / temperature - log_sum,
        entropy=log_sum - (exps * shifted).sum(-1) / total,
        hits=(chosen >= most).astype(jnp.float32),
        mean_logits=mean_logits,
        mean_logps=(mean_logits - most) / temperature - log_sum,
        log_square_sums=jnp.log((exps**2).sum(-1)) - 2 * log_sum if square_sums else None,
    )
    # Three numbers per prediction: with them the backward pass computes the logits again, but none of their sums.
    most, log_sum, entropy = (checkpoint_name(x, KEPT) for x in (most, log_sum, found.entropy))
    return found, (raw, targets, most, log_sum, entropy)


def _backward(options: Options, saved, grads: TokenStatistics):
    """`d log p_t / d x_v = ([v = t] - p_v) / T` and `dH / d x_v = -p_v (log p_v + H) / T` of logits x, in one pass."""
    temperature, entropy_gradient, _ = options
    raw, targets, most, log_sum, entropy = saved
    log_probs = (raw - most[..., None]) / temperature - log_sum[..., None]
    slopes = (grads.logps + grads.mean_logps)[..., None]
    if entropy_gradient:
        slopes = slopes + grads.entropy[..., None] * (log_probs + entropy[..., None])
    taken = jnp.arange(raw.shape[-1]).reshape((1,) * targets.ndim + (-1,)) == targets[..., None]
    direct = jnp.where(taken, grads.logps[..., None], 0) + grads.mean_logps[..., None] / raw.shape[-1]
    return (direct - jnp.exp(log_probs) * slopes) / temperature, None


def _forward_alone(raw: Array, targets: Array, options: Options) -> TokenStatistics:
    return _forward(raw, targets, options)[0]


_statistics = jax.custom_vjp(_forward_alone, nondiff_argnums=(2,))
_statistics.defvjp(_forward, _backward)


def token_logps(
    logits: Callable[[Array], Array],
    hidden: Array,
    predictions: Predictions,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
) -> jax.Array:
    """Log-probabilities of the targets alone, float32 `[rows, predictions]`; arguments as `token_statistics`."""
    return token_statistics(logits, hidden, predictions, temperature=temperature, chunk=chunk).logps
