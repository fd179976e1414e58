"""Preference losses against a reference: log-ratios of a chosen and a rejected completion in, one loss per pair out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.divergences import bounded_exp
from jaxalign.losses.masking import ratio
from jaxalign.losses.transport import aot, aot_unpaired
from jaxalign.types import Array


class PreferenceLogps(NamedTuple):
    """What a preference loss may look at; float `[pairs]` each.

    Attributes:
      chosen_log_ratios: `sum_t log policy - log reference` over the chosen completion, differenced per token; or what
        an f-divergence makes of it (see `DIVERGENCES`).
      rejected_log_ratios: the same over the rejected one.
      chosen_lengths: tokens of the chosen completion, EOS included.
      rejected_lengths: tokens of the rejected completion.
      chosen_logps: `sum_t log policy` over the chosen completion; `sft` and `aot` read it.
      rejected_logps: the same over the rejected one; `aot` reads it.
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
      label_smoothing: e, the probability that a label is wrong, in [0, 0.5). TRL's `sigmoid` has none.

    Returns:
      `[pairs]`.

    Source: Rafailov et al., arXiv 2305.18290, eq. 7; Mitchell, "A note on DPO with noisy preferences", eq. 3.
    """
    return smoothed_sigmoid(beta * _margin(logps), label_smoothing)


def robust(logps: PreferenceLogps, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Robust DPO: an unbiased estimate of DPO's loss where labels are flipped with a known probability.

    `(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)`; arguments as `sigmoid`. Has no lower bound.

    Source: Chowdhury et al., arXiv 2403.00409.
    """
    margin = beta * _margin(logps)
    kept = (1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    return (label_smoothing * jax.nn.log_sigmoid(-margin) - kept) / (1 - 2 * label_smoothing)


def hinge(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """SLiC's hinge on the DPO margin: `max(0, 1 - beta d)`; beta = 1 / the margin that is asked for.

    Source: Zhao et al., arXiv 2305.10425, eq. 3; with log-ratios as Liu et al., arXiv 2309.06657, section 3.2.
    """
    return jax.nn.relu(1 - beta * _margin(logps))


def ipo(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """IPO on per-token means.

    `(a / |chosen| - b / |rejected| - 1 / (2 beta))^2`, a and b the two log-ratios. The paper (Azar et al., arXiv
    2310.12036, eq. 17) writes sums, see `ipo_sum`; TRL averages over tokens, which its authors confirmed, and so do we.

    Args:
      logps: `[pairs]` fields.
      beta: regularisation (the paper's tau), > 0.

    Returns:
      `[pairs]`.
    """
    return jnp.square(_mean_margin(logps) - 1 / (2 * beta))


def ipo_sum(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """IPO on sums over tokens, as the paper writes it and OpenRLHF has it: `(d - 1 / (2 beta))^2`; see `ipo`."""
    return jnp.square(_margin(logps) - 1 / (2 * beta))


def exo_pair(logps: PreferenceLogps, *, beta: float, label_smoothing: float = 1e-3) -> jax.Array:
    """EXO for pairs: the KL divergence of the policy's preference from the smoothed label, this way round.

    `p (log p - log(1 - e)) + q (log q - log e)`, p = sigmoid(beta d), q = 1 - p, e = `label_smoothing` in (0, 0.5).

    Source: Ji et al., arXiv 2402.00856, eq. 16.
    """
    margin = beta * _margin(logps)
    right = jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing)
    wrong = jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing)
    return jax.nn.sigmoid(margin) * right + jax.nn.sigmoid(-margin) * wrong


def nca_pair(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """NCA for pairs: `-log sigmoid(beta a) - (log sigmoid(-beta a) + log sigmoid(-beta b)) / 2`.

    Source: Chen et al., arXiv 2402.05369, with two completions.
    """
    chosen, rejected = _rewards(logps, beta)
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise


def bco_pair(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """BCO for pairs, without its running shift: `-log sigmoid(beta a) - log sigmoid(-beta b)`.

    Source: Jung et al., arXiv 2404.04656.
    """
    chosen, rejected = _rewards(logps, beta)
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def sppo_hard(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """SPPO with hard labels: `(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2`; beta is the paper's 1 / eta.

    Source: Wu et al., arXiv 2405.00675, eq. 4.7 with probabilities 1 and 0.
    """
    _check(logps)
    target = 1 / (2 * beta)
    return jnp.square(logps.chosen_log_ratios - target) + jnp.square(logps.rejected_log_ratios + target)


def apo_zero(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """APO-zero: `sigmoid(-beta a) + sigmoid(beta b)`; for chosen completions that are better than the policy's own.

    Source: D'Oosterlinck et al., arXiv 2408.06266, eq. 7.
    """
    chosen, rejected = _rewards(logps, beta)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """APO-down: `sigmoid(beta a) + sigmoid(-beta d)`; for chosen completions that are worse than the policy's own.

    Source: D'Oosterlinck et al., arXiv 2408.06266, eq. 8.
    """
    chosen, rejected = _rewards(logps, beta)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def discopop(logps: PreferenceLogps, *, beta: float, discopop_tau: float = 0.05) -> jax.Array:
    """DiscoPOP: a mixture of the logistic and the exponential loss, by the margin itself.

    `-(1 - m) log sigmoid(z) + m exp(-z)`, z = beta d, m = sigmoid(z / tau). The second term is one exponential, of
    `log m - z`, which for tau < 1 is never above 0; for others it is bounded (see `bounded_exp`).

    Args:
      logps: `[pairs]` fields.
      beta: inverse strength of the KL penalty, > 0.
      discopop_tau: tau, > 0.

    Returns:
      `[pairs]`.

    Source: Lu et al., arXiv 2406.08414, eq. 5.
    """
    margin = beta * _margin(logps)
    logistic = -jax.nn.log_sigmoid(margin) * jax.nn.sigmoid(-margin / discopop_tau)
    return logistic + bounded_exp(jax.nn.log_sigmoid(margin / discopop_tau) - margin)


def sft(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """The chosen completion's negative log-probability, summed over its tokens; see `PER_TOKEN`.

    Source: MPO's third term, Wang et al., arXiv 2411.10442.
    """
    del beta
    if logps.chosen_logps is None:
        raise ValueError("the loss 'sft' needs chosen_logps")
    chex.assert_equal_shape([logps.chosen_logps, logps.chosen_lengths])
    return -jnp.asarray(logps.chosen_logps)


def sigmoid_norm(logps: PreferenceLogps, *, beta: float) -> jax.Array:
    """Length-normalised DPO: `-log sigmoid(beta (a / |chosen| - b / |rejected|))`.

    Source: Lambert et al., arXiv 2411.15124.
    """
    return -jax.nn.log_sigmoid(beta * _mean_margin(logps))


def smoothed_sigmoid(margin: Array, label_smoothing: float) -> jax.Array:
    """`-(1 - e) log sigmoid(m) - e log sigmoid(-m)`, whatever the margin m is made of."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def preference_options(name: str) -> tuple[str, ...]:
    """Names of the keyword options that the loss `name` of `PREFERENCE_LOSSES` takes."""
    parameters = inspect.signature(PREFERENCE_LOSSES[name]).parameters.values()
    names = (parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    return tuple(name for name in names if name != "where")


def _check(logps: PreferenceLogps) -> None:
    chex.assert_equal_shape(list(logps[:4]))


def _rewards(logps: PreferenceLogps, beta: float) -> tuple[Array, Array]:
    _check(logps)
    return beta * logps.chosen_log_ratios, beta * logps.rejected_log_ratios


def _margin(logps: PreferenceLogps) -> Array:
    _check(logps)
    return logps.chosen_log_ratios - logps.rejected_log_ratios


def _mean_margin(logps: PreferenceLogps) -> Array:
    _check(logps)
    chosen = ratio(logps.chosen_log_ratios, logps.chosen_lengths)
    return chosen - ratio(logps.rejected_log_ratios, logps.rejected_lengths)


PreferenceLoss = Callable[..., jax.Array]
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
}
# Losses of a margin between two scores, which an f-divergence may take from log-ratios; `sft` looks at neither.
MARGIN_LOSSES = frozenset(
    {"sigmoid", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "discopop", "sft", "sigmoid_norm"}
)
# Losses whose sum over pairs is divided by the chosen tokens of the batch instead of its pairs.
PER_TOKEN = frozenset({"sft"})
