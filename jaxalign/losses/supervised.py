"""Losses of supervised fine-tuning: one unreduced loss per target out."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.losses.tokens import TokenStatistics


def nll(tokens: TokenStatistics, *, label_smoothing: float = 0.0) -> jax.Array:
    """The negative log-likelihood, with a share of the target spread evenly over the vocabulary.

    `-(1 - e) log p(target) - e mean_v log p(v)`; e = 0 is the plain log-likelihood. Source: Szegedy et al.,
    arXiv 1512.00567, section 7, as transformers' LabelSmoother computes it.

    Args:
      tokens: statistics of each target's distribution, `[rows, predictions]`.
      label_smoothing: e, in [0, 1).

    Returns:
      float32 `[rows, predictions]`, in nats.
    """
    if not label_smoothing:
        return -tokens.logps
    return -(1 - label_smoothing) * tokens.logps - label_smoothing * tokens.mean_logps


def dft(tokens: TokenStatistics, *, label_smoothing: float = 0.0) -> jax.Array:
    """Dynamic fine-tuning: the log-likelihood weighted by the target's probability, which is held constant.

    `-sg(p) log p`. Source: Wu et al., arXiv 2508.05629, eq. 9.

    Args:
      tokens: statistics of each target's distribution, `[rows, predictions]`.
      label_smoothing: 0; the paper has none.

    Raises:
      ValueError: `label_smoothing` is not 0.
    """
    if label_smoothing:
        raise ValueError("the loss `dft` has no label smoothing: set label_smoothing_factor to 0")
    return -jax.lax.stop_gradient(jnp.exp(tokens.logps)) * tokens.logps


SFT_LOSSES: dict[str, Callable[..., jax.Array]] = {"nll": nll, "dft": dft}
