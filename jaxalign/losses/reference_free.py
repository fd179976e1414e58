"""Preference losses without a reference: CPO, SimPO, AlphaPO, ORPO. Log-probs in, one unreduced loss per pair out."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.divergences import bounded_exp
from jaxalign.losses.preference import smoothed_sigmoid
from jaxalign.types import Array

# All losses here: (chosen, rejected, *, beta, ...) -> [pairs]. `chosen` and `rejected` are float [pairs], log-probs of
# completions under the policy: means over tokens for `PER_TOKEN_REWARDS`, else sums; or what `alpha_reward` makes of
# them.


def cpo_sigmoid(chosen: Array, rejected: Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """CPO: `-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)`, d = chosen - rejected, e = `label_smoothing`.

    Source: Xu et al., arXiv 2401.08417, eq. 3.
    """
    return smoothed_sigmoid(beta * _margin(chosen, rejected), label_smoothing)


def cpo_hinge(chosen: Array, rejected: Array, *, beta: float) -> jax.Array:
    """SLiC's hinge without a reference: `max(0, 1 - beta d)`.

    Source: Zhao et al., arXiv 2305.10425, eq. 3.
    """
    return jax.nn.relu(1 - beta * _margin(chosen, rejected))


def cpo_ipo(chosen: Array, rejected: Array, *, beta: float) -> jax.Array:
    """IPO's square on token means without a reference: `(d - 1 / (2 beta))^2`.

    Source: Azar et al., arXiv 2310.12036, eq. 17.
    """
    return jnp.square(_margin(chosen, rejected) - 1 / (2 * beta))


def simpo(
    chosen: Array, rejected: Array, *, beta: float, simpo_gamma: float = 0.5, label_smoothing: float = 0.0
) -> jax.Array:
    """SimPO: CPO's loss at the margin `beta d - gamma` of token means.

    Args:
      chosen: `[pairs]`.
      rejected: `[pairs]`.
      beta: scale of the rewards, > 0; 2 to 10.
      simpo_gamma: gamma, the margin asked for (not its ratio to beta), >= 0.
      label_smoothing: as in `cpo_sigmoid`.

    Returns:
      `[pairs]`.

    Source: Meng et al., arXiv 2405.14734, eq. 6.
    """
    return smoothed_sigmoid(beta * _margin(chosen, rejected) - simpo_gamma, label_smoothing)


def orpo(chosen: Array, rejected: Array, *, beta: float) -> jax.Array:
    """ORPO's odds-ratio term: `-beta log sigmoid(log_odds)`; beta is the paper's lambda.

    Source: Hong et al., arXiv 2403.07691, eq. 7.
    """
    return -beta * jax.nn.log_sigmoid(log_odds(chosen, rejected))


def log_odds(chosen: Array, rejected: Array) -> Array:
    """`log(p / (1 - p)) - log(q / (1 - q))`, p and q the geometric mean probabilities of two completions' tokens.

    Args:
      chosen: float `[pairs]`, log p.
      rejected: float `[pairs]`, log q.
    """
    return _margin(chosen, rejected) - (log1mexp(chosen) - log1mexp(rejected))


def log1mexp(x: Array) -> jax.Array:
    """`log(1 - exp(x))` for x <= 0 without cancellation; x closer to 0 than the dtype's rounding counts as that far.

    Source: Maechler, "Accurately computing log(1 - exp(-|a|))", 2012: the branch at -log 2.
    """
    x = jnp.asarray(x)
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    near = x > -jnp.log(2.0)
    # Each branch is kept away from where the other one is meant: its gradient would be infinite there.
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1))), jnp.log1p(-jnp.exp(jnp.where(near, -1, x))))


def alpha_reward(logps: Array, alpha: float) -> Array:
    """AlphaPO's reward `(1 - p^-alpha) / alpha` of log p, at alpha = 0 log p itself.

    The exponent `-alpha log p` is bounded (see `bounded_exp`): it is meant for means over tokens.

    Source: Gupta et al., arXiv 2501.03884.
    """
    return (1 - bounded_exp(-alpha * logps)) / alpha if alpha else logps


def reference_free_options(name: str) -> tuple[str, ...]:
    """Names of the keyword options that the loss `name` of `REFERENCE_FREE_LOSSES` takes."""
    parameters = inspect.signature(REFERENCE_FREE_LOSSES[name]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def _margin(chosen: Array, rejected: Array) -> Array:
    chex.assert_equal_shape([chosen, rejected])
    return chosen - rejected


REFERENCE_FREE_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "sigmoid": cpo_sigmoid,
    "hinge": cpo_hinge,
    "ipo": cpo_ipo,
    "simpo": simpo,
    "orpo": orpo,
}
# Losses of means over tokens; the others are of sums.
PER_TOKEN_REWARDS = frozenset({"ipo", "simpo", "orpo"})
