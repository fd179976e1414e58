"""f-DPO: what other divergences than the reverse KL make of a log-ratio, and the exponential that they share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.types import Array

# e^20 = 4.9e8: far above any score that still says something, and small enough that its square and the norm of its
# gradient are finite in float32.
MAX_EXPONENT = 20.0


def bounded_exp(x: Array) -> jax.Array:
    """`exp(min(x, MAX_EXPONENT))`: beyond the bound the value stays and the gradient is 0."""
    return jnp.exp(jnp.minimum(x, MAX_EXPONENT))


def reverse_kl(log_ratios: Array, *, alpha: float) -> Array:
    """`a`: DPO as it is."""
    del alpha
    return log_ratios


def forward_kl(log_ratios: Array, *, alpha: float) -> jax.Array:
    """`1 - exp(-a)`; the exponent is bounded."""
    del alpha
    return 1 - bounded_exp(-log_ratios)


def js_divergence(log_ratios: Array, *, alpha: float) -> jax.Array:
    """`log 2 + log sigmoid(a)`."""
    del alpha
    return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratios)


def alpha_divergence(log_ratios: Array, *, alpha: float) -> Array:
    """`(exp((alpha - 1) a) - 1) / (alpha - 1)`, in the limit alpha = 1 `a`; the exponent is bounded."""
    order = alpha - 1
    return log_ratios if abs(order) < 1e-6 else (bounded_exp(order * log_ratios) - 1) / order


# f'(u) of the divergence at u = exp(a), by TRL's names; a float `[pairs]` log-ratio, alpha the order of
# `alpha_divergence`. Source: Wang et al., arXiv 2309.16240, table 1, shifted so that a = 0 gives 0.
Divergence = Callable[..., Array]
DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
