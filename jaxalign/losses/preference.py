"""Preference losses: log-probs of a chosen and a rejected completion in, one unreduced loss per pair out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.transport import aot, aot_unpaired
from jaxalign.types import Array


class PreferenceLogps(NamedTuple):
    """What a preference loss may look at; float `[pairs]` each.

    Attributes:
      chosen_log_ratios: `sum_t log policy - log reference` over the chosen completion, differenced per token.
      rejected_log_ratios: the same over the rejected one.
      chosen_lengths: tokens of the chosen completion, EOS included.
      rejected_lengths: tokens of the rejected completion.
      chosen_logps: `sum_t log policy` over the chosen completion, for losses that need it.
      rejected_logps: the same over the rejected one.
    """

    chosen_log_ratios: Array
    rejected_log_ratios: Array
    chosen_lengths: Array
    rejected_lengths: Array
    chosen_logps: Array | None = None
    rejected_logps: Array | None = None


def sigmoid(logps: PreferenceLogps, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO, and with label smoothing cDPO.

    `-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)`, d = chosen minus rejected log-ratio.

    Args:
      logps: `[pairs]` fields.
      beta: inverse strength of the KL penalty, > 0.
      label_smoothing: e, the probability that a label is wrong, in [0, 0.5).

    Returns:
      `[pairs]`.

    Source: Rafailov et al., arXiv 2305.18290, eq. 7; Mitchell, "A note on DPO with noisy preferences", eq. 3.
    """
    margin = beta * _margin(logps)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def ipo(logps: PreferenceLogps, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """IPO on per-token means.

    `(a / |chosen| - b / |rejected| - 1 / (2 beta))^2`, a and b the two log-ratios. The paper (Azar et al., arXiv
    2310.12036, eq. 17) writes sums; TRL averages over tokens, which its authors confirmed, and so do we.

    Args:
      logps: `[pairs]` fields.
      beta: regularisation (the paper's tau), > 0.
      label_smoothing: must be 0; this loss has no such term.

    Returns:
      `[pairs]`.
    """
    _no_smoothing("ipo", label_smoothing)
    chex.assert_equal_shape(list(logps[:4]))
    chosen = logps.chosen_log_ratios / jnp.maximum(logps.chosen_lengths, 1)
    rejected = logps.rejected_log_ratios / jnp.maximum(logps.rejected_lengths, 1)
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def hinge(logps: PreferenceLogps, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """SLiC's hinge on the DPO margin.

    `max(0, 1 - beta d)`, d = chosen minus rejected log-ratio.

    Args:
      logps: `[pairs]` fields.
      beta: 1 / the margin that is asked for, > 0.
      label_smoothing: must be 0; this loss has no such term.

    Returns:
      `[pairs]`.

    Source: Zhao et al., arXiv 2305.10425, eq. 3; with log-ratios as Liu et al., arXiv 2309.06657, section 3.2.
    """
    _no_smoothing("hinge", label_smoothing)
    return jax.nn.relu(1 - beta * _margin(logps))


def _margin(logps: PreferenceLogps) -> Array:
    chex.assert_equal_shape(list(logps[:4]))
    return logps.chosen_log_ratios - logps.rejected_log_ratios


def _no_smoothing(name: str, label_smoothing: float) -> None:
    if label_smoothing:
        raise ValueError(f"loss_type {name!r} has no label smoothing: set label_smoothing to 0")


PreferenceLoss = Callable[..., jax.Array]
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
}
