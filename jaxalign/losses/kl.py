"""Estimators of the KL divergence from a reference, one per drawn token, and the controller of its coefficient."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array

MAX_LOG_RATIO = 20.0


def prob_ratios(log_ratios: Array) -> jax.Array:
    """`exp(log_ratios)`, the exponent held within ±20: beyond that neither value nor gradient follows it.

    exp(20) is 4.9e8, far outside what a policy update should see; float32 itself overflows at 88.
    """
    return jnp.exp(jnp.clip(log_ratios, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def k1(logps: Array, ref_logps: Array) -> jax.Array:
    """The log-ratio `log p - log q`: unbiased, of either sign.

    Its gradient has expectation zero, so it belongs in a reward; as a loss it does nothing.

    Args:
      logps: log-probs of drawn tokens under the policy p, any shape.
      ref_logps: the same under the reference q; no gradient.

    Returns:
      The shape of `logps`, in nats.

    Source: Schulman, "Approximating KL divergence" (2020), http://joschu.net/blog/kl-approx.html.
    """
    return -_reference_over_policy(logps, ref_logps)


def k2(logps: Array, ref_logps: Array) -> jax.Array:
    """`(log p - log q)^2 / 2`: biased, never negative, and its gradient is that of the KL itself.

    Arguments, result and source as `k1`. With old log-probs as the reference its mean is PPO's `approx_kl`.
    """
    return jnp.square(_reference_over_policy(logps, ref_logps)) / 2


def k3(logps: Array, ref_logps: Array) -> jax.Array:
    """`q/p - 1 - log(q/p)`: unbiased, never negative; the exponent is held within ±20 (see `prob_ratios`).

    Arguments, result and source as `k1`. GRPO's KL term: Shao et al., arXiv 2402.03300, eq. 4.
    """
    log_ratios = _reference_over_policy(logps, ref_logps)
    return prob_ratios(log_ratios) - log_ratios - 1


def bias_corrected(kl: Array, log_ratios: Array) -> jax.Array:
    """`kl * p / p_old`: the estimate for tokens that an older policy drew. The gradient flows through both factors.

    Args:
      kl: any shape.
      log_ratios: `log p - log p_old` at the loss's ratio level, the shape of `kl`; held within ±20.

    Source: DeepSeek-V3.2, arXiv 2512.02556, "Unbiased KL Estimate".
    """
    chex.assert_equal_shape([kl, log_ratios])
    return prob_ratios(log_ratios) * kl


def update_kl_coef(kl_coef: Array | float, kl: Array | float, *, target: float, horizon: float, num_samples: int):
    """The adaptive controller: raises the coefficient while the KL is above its target, and lowers it below.

    `kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)`.

    Args:
      kl_coef: the coefficient that was in force.
      kl: what was measured under it, in nats per completion.
      target: the KL to hold, in nats per completion, > 0.
      horizon: completions in which the coefficient moves by at most about 20 %, > 0.
      num_samples: completions since the last update.

    Returns:
      The next coefficient, a scalar.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2.
    """
    error = jnp.clip(jnp.asarray(kl) / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * num_samples / horizon)


def _reference_over_policy(logps: Array, ref_logps: Array) -> jax.Array:
    chex.assert_equal_shape([logps, ref_logps])
    return jnp.subtract(jax.lax.stop_gradient(ref_logps), logps)


KlEstimator = Callable[[Array, Array], jax.Array]
KL_ESTIMATORS: dict[str, KlEstimator] = {"k1": k1, "k2": k2, "k3": k3}
