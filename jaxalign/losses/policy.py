"""Policy-gradient losses: a level at which ratios are taken, and a loss per token that bounds them.

The two are chosen apart:

    log_ratios = RATIO_LEVELS[level](logps, old_logps, completions, n)
    terms = POLICY_LOSSES[name](log_ratios, advantages, logps, **options)

`policy_options(name)` names the options that a loss takes. Ratios are `exp(log_ratios)` with the exponent held within
±20, where their gradient ends (see `kl.prob_ratios`). Nothing flows back into old log-probs or advantages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.losses.aggregation import spread_by_completion
from jaxalign.losses.kl import MAX_LOG_RATIO, prob_ratios
from jaxalign.losses.masking import count_by_completion, mean_by_completion, sum_by_completion
from jaxalign.types import Array, Max, Mean, Metrics, Min


class PolicyTerms(NamedTuple):
    """What a policy loss gives back, each in the shape of its `log_ratios`.

    Attributes:
      loss: to be minimised.
      clipped_low: 1 where the lower bound of the ratio stopped the gradient and the advantage is negative; None where
        the loss has no such bound.
      clipped_high: 1 where the upper bound stopped it and the advantage is positive; None where there is no such bound.
      capped: 1 where the advantage is negative and its second bound (δ, dual clip) stopped the gradient; None without.
    """

    loss: jax.Array
    clipped_low: jax.Array | None = None
    clipped_high: jax.Array | None = None
    capped: jax.Array | None = None


def token_log_ratios(logps: Array, old_logps: Array, completions: Array, n: int) -> jax.Array:
    """`log p - log p_old` of each token.

    Args:
      logps: log-probs of the drawn tokens under the policy, float `[rows, predictions]`.
      old_logps: under the policy that drew them, the same shape; no gradient.
      completions: int32, the same shape, number of the completion; -1 = not in the loss.
      n: number of completions.

    Returns:
      The same shape; 0 at -1.
    """
    del n
    chex.assert_equal_shape([logps, old_logps, completions])
    return jnp.where(completions >= 0, logps - jax.lax.stop_gradient(old_logps), 0)


def sequence_log_ratios(logps: Array, old_logps: Array, completions: Array, n: int) -> jax.Array:
    """The mean log-ratio of a token's completion: GSPO. Every token moves the ratio of all.

    `s_i = (p(y_i) / p_old(y_i))^(1 / |y_i|)`. Arguments and result as `token_log_ratios`.

    Source: Zheng et al., arXiv 2507.18071, eq. 7.
    """
    means = mean_by_completion(token_log_ratios(logps, old_logps, completions, n), completions, n)
    return spread_by_completion(means, completions)


def sequence_token_log_ratios(logps: Array, old_logps: Array, completions: Array, n: int) -> jax.Array:
    """The value of `sequence_log_ratios`, with the gradient of the token's own log-prob: GSPO-token.

    `sg(s_i) * p_t / sg(p_t)`. Where advantages are equal within a completion, the policy loss has the gradient of
    `sequence_log_ratios`; a bias-corrected KL term does not. Arguments and result as `token_log_ratios`.

    Source: Zheng et al., arXiv 2507.18071, eq. 14.
    """
    own = token_log_ratios(logps, logps, completions, n)
    return jax.lax.stop_gradient(sequence_log_ratios(logps, old_logps, completions, n)) + own


def sequence_sum_log_ratios(logps: Array, old_logps: Array, completions: Array, n: int) -> jax.Array:
    """The summed log-ratio of a token's completion, the ratio of whole completions: TRL's RLOO, and VESPO.

    Arguments and result as `token_log_ratios`.
    """
    sums = sum_by_completion(token_log_ratios(logps, old_logps, completions, n), completions, n)
    return spread_by_completion(sums, completions)


def clip(
    log_ratios: Array,
    advantages: Array,
    logps: Array,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> PolicyTerms:
    """PPO's clipped surrogate, with bounds of its own below and above, and if wished a second one above.

    `-min(min(w, δ) A, clip(w, 1 - ε_low, 1 + ε_high) A)`.

    Args:
      log_ratios: log of w, any shape.
      advantages: A, the shape of `log_ratios`; no gradient.
      logps: not used.
      epsilon_low: ε_low.
      epsilon_high: ε_high; DAPO's clip-higher where it is the larger.
      delta: δ, above 1 + ε_high: bounds what a token of negative advantage can cost. None = no such bound.

    Source: Schulman et al., arXiv 1707.06347, eq. 7; ε_high: Yu et al., arXiv 2503.14476, eq. 10; δ: arXiv 2505.07291.
    """
    del logps
    ratios, advantages = _ratios(log_ratios, advantages)
    bounded = jnp.clip(ratios, 1 - epsilon_low, 1 + epsilon_high)
    capped = None
    if delta is not None:
        capped = _ones((ratios > delta) & (advantages < 0), ratios)
        ratios = jnp.minimum(ratios, delta)
    low, high = _clipped(ratios, advantages, 1 - epsilon_low, 1 + epsilon_high)
    return PolicyTerms(-jnp.minimum(ratios * advantages, bounded * advantages), low, high, capped)


def dual(
    log_ratios: Array,
    advantages: Array,
    logps: Array,
    *,
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float = 3.0,
) -> PolicyTerms:
    """Dual-clip PPO: where the advantage is negative, no token costs more than `-c A`.

    `-max(min(w A, clip(w) A), c A)` for A < 0, else `clip`. The same function as `clip` with δ = c > 1 + ε_high.

    Args:
      log_ratios: log of w, any shape.
      advantages: A, the shape of `log_ratios`; no gradient.
      logps: not used.
      epsilon_low: as `clip`.
      epsilon_high: as `clip`.
      dual_clip: c, > 1.

    Source: Ye et al., arXiv 1912.09729.
    """
    once = clip(log_ratios, advantages, logps, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    advantages = jax.lax.stop_gradient(advantages)
    most = -dual_clip * advantages
    capped = _ones((advantages < 0) & (once.loss > most), once.loss)
    return once._replace(loss=jnp.where(advantages < 0, jnp.minimum(once.loss, most), once.loss), capped=capped)


CISPO_BOUNDS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "absolute": lambda low, high: (0.0, high),
    "relative": lambda low, high: (0.0, 1 + high),
    "two_sided": lambda low, high: (1 - low, 1 + high),
}


def cispo(
    log_ratios: Array,
    advantages: Array,
    logps: Array,
    *,
    epsilon_low: float,
    epsilon_high: float,
    cispo_bounds: str = "absolute",
) -> PolicyTerms:
    """CISPO: bounds the weight of a token and never drops its gradient.

    `-sg(clip(w)) A log p`.

    Args:
      log_ratios: log of w, any shape; no gradient.
      advantages: A, the shape of `log_ratios`; no gradient.
      logps: log p of the drawn tokens, the shape of `log_ratios`; the only way of the gradient.
      epsilon_low: for `two_sided` bounds only.
      epsilon_high: what it means depends on the bounds.
      cispo_bounds: key in `CISPO_BOUNDS`. `absolute`: w ≤ ε_high, so that 5.0 is a usual value (TRL, ScaleRL);
        `relative`: w ≤ 1 + ε_high (open-instruct); `two_sided`: 1 - ε_low ≤ w ≤ 1 + ε_high (verl).

    Source: MiniMax-M1, arXiv 2506.13585, eq. 4 and 5; ScaleRL, arXiv 2510.13786.
    """
    chex.assert_equal_shape([log_ratios, logps])
    ratios, advantages = _ratios(jax.lax.stop_gradient(log_ratios), advantages)
    least, most = CISPO_BOUNDS[cispo_bounds](epsilon_low, epsilon_high)
    low, high = _clipped(ratios, advantages, least, most)
    return PolicyTerms(-jnp.clip(ratios, least, most) * advantages * logps, low if least > 0 else None, high)


def sapo(
    log_ratios: Array,
    advantages: Array,
    logps: Array,
    *,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> PolicyTerms:
    """SAPO: a smooth gate in place of the clip.

    `-(4 / τ) sigmoid(τ (w - 1)) A`, τ by the sign of A; its gradient at w = 1 is that of `-w A`.

    Args:
      log_ratios: log of w, any shape.
      advantages: A, the shape of `log_ratios`; no gradient.
      logps: not used.
      sapo_temperature_pos: τ where A > 0.
      sapo_temperature_neg: τ elsewhere.

    Source: Gao et al., arXiv 2511.20347.
    """
    del logps
    ratios, advantages = _ratios(log_ratios, advantages)
    temperatures = jnp.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg).astype(ratios.dtype)
    return PolicyTerms(-jax.nn.sigmoid(temperatures * (ratios - 1)) * 4 / temperatures * advantages)


def vespo(
    log_ratios: Array,
    advantages: Array,
    logps: Array,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> PolicyTerms:
    """VESPO: weighs a completion by a gamma-shaped function of its ratio, which is 1 at W = 1.

    `-sg(W^k exp(λ (1 - W))) A log p`, k and λ by the sign of A.

    Args:
      log_ratios: log of W at the level `sequence_sum`, any shape; no gradient.
      advantages: A, the shape of `log_ratios`; no gradient.
      logps: log p of the drawn tokens, the shape of `log_ratios`; the only way of the gradient.
      vespo_k_pos: k where A ≥ 0.
      vespo_lambda_pos: λ where A ≥ 0.
      vespo_k_neg: k elsewhere.
      vespo_lambda_neg: λ elsewhere.

    Source: arXiv 2602.10693; its bounds on log W as in TRL, but for the lower (log 1e-8 there, where the weight is 0).
    """
    chex.assert_equal_shape([log_ratios, logps])
    log_ratios = jnp.clip(jax.lax.stop_gradient(log_ratios), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratios, advantages = _ratios(log_ratios, advantages)
    k = jnp.where(advantages >= 0, vespo_k_pos, vespo_k_neg).astype(ratios.dtype)
    rate = jnp.where(advantages >= 0, vespo_lambda_pos, vespo_lambda_neg).astype(ratios.dtype)
    return PolicyTerms(-jnp.exp(rate + k * log_ratios - rate * ratios) * advantages * logps)


def policy_options(name: str) -> tuple[str, ...]:
    """Names of the keyword options that the loss `name` of `POLICY_LOSSES` takes."""
    parameters = inspect.signature(POLICY_LOSSES[name]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def clip_metrics(terms: PolicyTerms, completions: Array, n: int, *, per_completion: bool = False) -> Metrics:
    """Fractions of clipped tokens as TRL names them; nothing for a loss that does not clip.

    `clip_ratio/low_mean` and so on; `low_min` and `high_max` are over completions. A completion without tokens does not
    count. `clip_ratio/capped_mean` (ours) is the second bound's. CISPO's `high_mean` is TRL's `cispo_clip_ratio`.

    Args:
      terms: of one micro-batch, fields `[rows, predictions]`.
      completions: int32 `[rows, predictions]`, -1 = not in the loss.
      n: number of completions.
      per_completion: weigh completions equally, not tokens: for ratio levels that give a completion one ratio.
    """
    counts = count_by_completion(completions, n)
    seen = counts > 0

    def fractions(clipped: Array) -> tuple[Mean, jax.Array]:
        means = mean_by_completion(clipped, completions, n)
        weights = seen.astype(jnp.float32) if per_completion else counts
        return Mean((means * weights).sum(), weights.sum()), means

    metrics = {}
    if terms.clipped_low is not None:
        metrics["clip_ratio/low_mean"], means = fractions(terms.clipped_low)
        metrics["clip_ratio/low_min"] = Min(jnp.where(seen, means, jnp.inf).min())
    if terms.clipped_high is not None:
        metrics["clip_ratio/high_mean"], means = fractions(terms.clipped_high)
        metrics["clip_ratio/high_max"] = Max(jnp.where(seen, means, -jnp.inf).max())
    if terms.clipped_low is not None and terms.clipped_high is not None:
        metrics["clip_ratio/region_mean"] = fractions(jnp.maximum(terms.clipped_low, terms.clipped_high))[0]
    if terms.capped is not None:
        metrics["clip_ratio/capped_mean"] = fractions(terms.capped)[0]
    return jax.lax.stop_gradient(metrics)


def _ratios(log_ratios: Array, advantages: Array) -> tuple[jax.Array, jax.Array]:
    chex.assert_equal_shape([log_ratios, advantages])
    return prob_ratios(log_ratios), jax.lax.stop_gradient(jnp.asarray(advantages))


def _clipped(ratios: jax.Array, advantages: jax.Array, least: float, most: float) -> tuple[jax.Array, jax.Array]:
    return _ones((ratios < least) & (advantages < 0), ratios), _ones((ratios > most) & (advantages > 0), ratios)


def _ones(chosen: Array, like: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.asarray(chosen, like.dtype))


RatioLevel = Callable[[Array, Array, Array, int], jax.Array]
RATIO_LEVELS: dict[str, RatioLevel] = {
    "token": token_log_ratios,
    "sequence": sequence_log_ratios,
    "sequence_token": sequence_token_log_ratios,
    "sequence_sum": sequence_sum_log_ratios,
}

PolicyLoss = Callable[..., PolicyTerms]
POLICY_LOSSES: dict[str, PolicyLoss] = {"clip": clip, "dual": dual, "cispo": cispo, "sapo": sapo, "vespo": vespo}
