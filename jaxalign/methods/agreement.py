"""Whether the sampler and the trainer compute the same: their log-probs of drawn tokens, side by side."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.losses import KL_ESTIMATORS
from jaxalign.methods.common import masked_mean
from jaxalign.types import Array, Batch, Max, Metrics

# The field of a batch that says which update of its rollout it is, from 0; int32, one number per micro-batch.
UPDATE = "update"


def number_update(update: int, micro_batches: int) -> dict[str, np.ndarray]:
    """The field `UPDATE` of a batch."""
    return {UPDATE: np.full(micro_batches, update, np.int32)}


def agreement(logps: Array, batch: Batch, mask: Array) -> Metrics:
    """Metrics of a rollout's first update, where the policy is still the one that drew; absent at later ones.

    With d = log p_trainer - log p_sampler of a token, q half of both probabilities together, and
    k3(x) = exp(x) - x - 1: mean and maximum of |d| (TRL), and means of exp|d|, of k3(d), which estimates
    KL(sampler, trainer), and of (k3(log p_trainer - log q) + k3(log p_sampler - log q)) / 2 (NeMo-RL).

    Args:
      logps: the trainer's, float `[rows, predictions]`; no gradient.
      batch: a micro-batch with the fields `sampler_logps` (NaN = not known, which counts as none) and `UPDATE`.
      mask: the same shape, 1 = counts.
    """
    sampler = batch.fields["sampler_logps"]
    real = (mask > 0) & ~jnp.isnan(sampler) & (batch.fields[UPDATE] == 0)
    sampler, trainer = (jnp.where(real, each, 0) for each in (sampler, jax.lax.stop_gradient(logps)))
    apart, k3 = jnp.abs(trainer - sampler), KL_ESTIMATORS["k3"]
    middle = jnp.logaddexp(trainer, sampler) - jnp.log(2.0)
    means = {
        "sampling/sampling_logp_difference/mean": apart,
        "token_mult_prob_error": jnp.exp(apart),
        "gen_kl_error": k3(sampler, trainer),
        "js_divergence_error": (k3(middle, trainer) + k3(middle, sampler)) / 2,
    }
    return {
        **{name: masked_mean(values, real) for name, values in means.items()},
        "sampling/sampling_logp_difference/max": Max(jnp.where(real, apart, -jnp.inf).max()),
    }
