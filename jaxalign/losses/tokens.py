"""The chunked LM head: logits exist for one chunk of predictions at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array, Predictions


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
    """Maps over chunks of predictions, each under `jax.checkpoint`.

    Args:
      function: pytree of `[rows, chunk, ...]` -> pytree of `[rows, chunk]`.
      inputs: pytree of `[rows, predictions, ...]`.
      chunk: predictions per row and chunk; the last chunk is padded with zeros.

    Returns:
      `[rows, predictions]` leaves. Rows stay a batch axis, so a sharded batch needs no collective here.
    """
    rows, size = jax.tree.leaves(inputs)[0].shape[:2]
    chunk = min(chunk, size)
    count = -(-size // chunk)

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, count * chunk - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    _, mapped = jax.lax.scan(lambda _, part: (None, jax.checkpoint(function)(part)), None, jax.tree.map(split, inputs))
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

    def statistics(part):
        states, targets = part
        raw = logits(states)
        most = jax.lax.stop_gradient(raw.max(-1))
        chosen = jnp.take_along_axis(raw, targets[..., None], axis=-1)[..., 0]
        # One pass of exp serves the log-sum, its gradient and the entropy.
        shifted, taken = (raw - most[..., None]) / temperature, (chosen - most) / temperature
        exps = jnp.exp(shifted)
        total = exps.sum(-1)
        log_sum = jnp.log(total)
        entropy = log_sum - (exps * shifted).sum(-1) / total
        entropy = entropy if entropy_gradient else jax.lax.stop_gradient(entropy)
        hits = jax.lax.stop_gradient(chosen >= most).astype(jnp.float32)
        mean_logits = jax.lax.stop_gradient(raw).mean(-1)
        mean_logps = shifted.mean(-1) - log_sum
        squares = jax.lax.stop_gradient(jnp.log((exps**2).sum(-1)) - 2 * log_sum) if square_sums else None
        return TokenStatistics(taken - log_sum, entropy, hits, mean_logits, mean_logps, squares)

    return map_chunks(statistics, (states, targets), chunk=chunk)


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
