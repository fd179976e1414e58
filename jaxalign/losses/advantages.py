"""Scores of completions -> advantages of tokens, on whole rollouts: `[n]` and `[n, steps]` arrays, unpacked.

`mask` is 1 at a completion's tokens, EOS included (see `length_mask`); groups are numbered from 0 and may be of
different sizes; a score that does not exist is NaN. Everything here is a constant to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array

# What TRL adds to a standard deviation before it divides by it.
EPSILON = 1e-4


def length_mask(lengths: Array, steps: int) -> jax.Array:
    """1 at the first `lengths[i]` steps of each row: int `[n]` -> float32 `[n, steps]`."""
    return (jnp.arange(steps)[None, :] < jnp.asarray(lengths)[:, None]).astype(jnp.float32)


def group_advantages(scores: Array, groups: Array) -> jax.Array:
    """`(r - mean of the group) / (std of the group + 1e-4)`, std with Bessel's correction: GRPO.

    Args:
      scores: r, float `[n]`. NaN = none: it counts in no mean, and its own advantage is 0.
      groups: int `[n]`, number of the prompt, in [0, n).

    Returns:
      `[n]`; exactly 0 in a group whose scores are all equal, or that has only one.

    Source: Shao et al., arXiv 2402.03300, section 4.1.2; std and epsilon as in TRL.
    """
    centred, counts = _centre(scores, groups)
    std = jnp.sqrt(_per_group(jnp.square(centred), groups) / jnp.maximum(counts - 1, 1))
    return centred / (std + EPSILON)


def batch_advantages(scores: Array, groups: Array) -> jax.Array:
    """`(r - mean of the group) / (std of all scores + 1e-4)`, std with Bessel's correction.

    Arguments as `group_advantages`. Source: arXiv 2508.08221; std and epsilon as in TRL.
    """
    _, std, count = _moments(scores)
    return jnp.where(count > 1, _centre(scores, groups)[0] / (std + EPSILON), 0)


def unscaled_advantages(scores: Array, groups: Array) -> jax.Array:
    """`r - mean of the group`: Dr. GRPO. Arguments as `group_advantages`. Source: Liu et al., arXiv 2503.20783."""
    return _centre(scores, groups)[0]


def leave_one_out_advantages(scores: Array, groups: Array) -> jax.Array:
    """`r - mean of the others of the group`: RLOO.

    Arguments and result as `group_advantages`. Source: Ahmadian et al., arXiv 2402.14740, eq. 7.
    """
    centred, counts = _centre(scores, groups)
    return centred * counts / jnp.maximum(counts - 1, 1)


def sum_scores(scores: Array, weights: Array) -> jax.Array:
    """The weighted sum over several rewards of those that exist.

    Args:
      scores: float `[n, rewards]`, NaN = none.
      weights: float `[rewards]`.

    Returns:
      `[n]`; NaN where a completion has no score at all.
    """
    scores = _constant(scores)
    unknown = jnp.isnan(scores)
    total = jnp.where(unknown, 0, scores) @ jnp.asarray(weights, scores.dtype)
    return jnp.where(unknown.all(1), jnp.nan, total)


def normalize_then_sum(scores: Array, groups: Array, weights: Array) -> jax.Array:
    """GDPO: each reward becomes a group advantage of its own, then their weighted sum is standardised over the batch.

    Args:
      scores: float `[n, rewards]`, NaN = none.
      groups: int `[n]`, as `group_advantages`.
      weights: float `[rewards]`.

    Returns:
      Advantages `[n]`; 0 where a completion has no score at all.

    Source: GDPO, arXiv 2601.05242; NaN and epsilon as TRL's `normalize_then_sum`.
    """
    scores = _constant(scores)
    each = jax.vmap(group_advantages, in_axes=(1, None), out_axes=1)(scores, groups)
    sums = sum_scores(jnp.where(jnp.isnan(scores), jnp.nan, each), weights)
    mean, std, count = _moments(sums)
    return jnp.where(jnp.isnan(sums) | (count < 2), 0, (sums - mean) / (std + EPSILON))


def without_signal(scores: Array, groups: Array) -> jax.Array:
    """Whether all scores of a completion's group are equal, so that nothing can be learnt from it; bool `[n]`.

    True also where a group has one score or none. Arguments as `group_advantages`.
    """
    scores, known = _known(scores)
    low, high = (_extreme(jnp.where(known, scores, sign * jnp.inf), groups, sign) for sign in (1, -1))
    return low >= high


def overlong_penalty(lengths: Array, *, max_length: int, cache: int) -> jax.Array:
    """DAPO's soft overlong punishment, added to the score.

    0 up to `max_length - cache` tokens, then linear to -1 at `max_length`, and -1 above.

    Args:
      lengths: tokens per completion, int `[n]`.
      max_length: L_max, in tokens.
      cache: L_cache, in tokens, in (0, max_length].

    Returns:
      float32 `[n]`, in [-1, 0].

    Raises:
      ValueError: a cache out of bounds.

    Source: Yu et al., arXiv 2503.14476, eq. 13.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache={cache} must lie in (0, max_length={max_length}]")
    over = (max_length - cache - jnp.asarray(lengths)).astype(jnp.float32) / cache
    return jnp.clip(over, -1, 0)


def token_rewards(scores: Array, kl: Array, mask: Array, *, kl_coef: Array | float) -> jax.Array:
    """Rewards of tokens: `-kl_coef * kl` at each, and the score at the last one besides.

    Args:
      scores: float `[n]`; a NaN stays NaN at the last token, and the caller must leave such completions out.
      kl: estimate per token, float `[n, steps]`, `k1` as a rule.
      mask: `[n, steps]`.
      kl_coef: weight of the KL.

    Returns:
      `[n, steps]`, 0 where the mask is 0. A completion without tokens has no place for its score.
    """
    kl, real = _constant(kl), jnp.asarray(mask) > 0
    chex.assert_equal_shape([kl, real])
    left = jnp.flip(jnp.cumsum(jnp.flip(real, 1).astype(jnp.int32), 1), 1)
    penalty = jnp.where(real, -kl_coef * kl, 0)
    return penalty + jnp.where(real & (left == 1), _constant(scores)[:, None], 0)


@partial(jax.jit, static_argnames="carry")
def gae(
    rewards: Array, values: Array, mask: Array, *, gamma: float, gae_lambda: float, carry: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation, not whitened.

    `δ_t = r_t + γ V_{t+1} - V_t`, `A_t = δ_t + γ λ A_{t+1}`, both 0 beyond the end; returns are `A + V`.

    Args:
      rewards: r, float `[n, steps]`.
      values: V, float `[n, steps]`: of the state in which token t is drawn.
      mask: `[n, steps]`; nothing is read where it is 0.
      gamma: γ.
      gae_lambda: λ.
      carry: what a 0 between 1s means, as around tokens of a tool. False: an end, after which V and A start from 0;
        True: V and A of the next token that counts pass through (verl). Equal where tokens are contiguous.

    Returns:
      Advantages and returns, `[n, steps]` each, 0 where the mask is 0.

    Source: Schulman et al., arXiv 1506.02438, eq. 11 and 16.
    """
    real = jnp.asarray(mask) > 0
    chex.assert_equal_shape([rewards, values, real])
    rewards, values = (jnp.where(real, _constant(x), 0) for x in (rewards, values))

    def step(later, now):
        value_later, advantage_later = later
        reward, value, here = now
        advantage = reward + gamma * value_later - value + gamma * gae_lambda * advantage_later
        kept = later if carry else jax.tree.map(jnp.zeros_like, later)
        state = jnp.where(here, value, kept[0]), jnp.where(here, advantage, kept[1])
        return state, jnp.where(here, advantage, 0)

    dtype = jnp.result_type(rewards, values)
    start = (jnp.zeros(rewards.shape[0], dtype),) * 2
    columns = (rewards.T.astype(dtype), values.T.astype(dtype), real.T)
    advantages = jax.lax.scan(step, start, columns, reverse=True)[1].T
    return advantages, advantages + values


def discounted_returns(rewards: Array, mask: Array, *, gamma: float) -> jax.Array:
    """`G_t = r_t + γ G_{t+1}`, `[n, steps]`; arguments as `gae`."""
    return gae(rewards, jnp.zeros_like(_constant(rewards)), mask, gamma=gamma, gae_lambda=1.0)[0]


def whiten(x: Array, mask: Array, *, shift_mean: bool = True, bessel: bool = True, epsilon: float = 1e-8) -> jax.Array:
    """Scales to unit variance over all masked entries, and shifts to mean 0 if wished.

    `(x - mean) / sqrt(var + ε)`, plus the mean where it is kept.

    Args:
      x: float, any shape.
      mask: the shape of x; nothing is read where it is 0.
      shift_mean: False keeps the mean.
      bessel: the variance's denominator is the count less one (TRL, verl), or the count (OpenAI, OpenRLHF).
      epsilon: ε, added to the variance.

    Returns:
      The shape of x, 0 where the mask is 0.
    """
    x, real = _constant(x), jnp.asarray(mask) > 0
    chex.assert_equal_shape([x, real])
    count = real.sum()
    mean = jnp.where(real, x, 0).sum() / jnp.maximum(count, 1)
    centred = jnp.where(real, x - mean, 0)
    variance = jnp.square(centred).sum() / jnp.maximum(count - int(bessel), 1)
    whitened = centred * jax.lax.rsqrt(variance + epsilon)
    return whitened if shift_mean else jnp.where(real, whitened + mean, 0)


def reinforce_plus_plus(
    scores: Array, groups: Array, kl: Array, mask: Array, *, kl_coef: Array | float = 0.0, gamma: float = 1.0
) -> jax.Array:
    """Discounted returns of the token rewards, whitened over all tokens of the rollout: REINFORCE++.

    Arguments and result as `ADVANTAGES`; the groups are not used. Source: Hu et al., arXiv 2501.03262.
    """
    del groups
    mask = _scored(scores, mask)
    rewards = token_rewards(jnp.nan_to_num(_constant(scores)), kl, mask, kl_coef=kl_coef)
    return whiten(discounted_returns(rewards, mask, gamma=gamma), mask)


def reinforce_plus_plus_baseline(
    scores: Array, groups: Array, kl: Array, mask: Array, *, kl_coef: Array | float = 0.0, gamma: float = 1.0
) -> jax.Array:
    """The score less its group's mean, whitened over all tokens of the rollout: REINFORCE++-baseline.

    Arguments and result as `ADVANTAGES`; the paper puts its KL (k2) in the loss. Source: Hu et al., arXiv 2501.03262.
    """
    advantages = _spread(unscaled_advantages, scores, groups, kl, mask, kl_coef=kl_coef, gamma=gamma)
    return whiten(advantages, _scored(scores, mask))


def _spread(
    rule: Callable[[Array, Array], jax.Array],
    scores: Array,
    groups: Array,
    kl: Array,
    mask: Array,
    *,
    kl_coef: Array | float = 0.0,
    gamma: float = 1.0,
) -> jax.Array:
    """One advantage for all tokens of a completion, of its score less `kl_coef` times its summed KL."""
    if gamma != 1:
        raise ValueError(f"gamma={gamma} has no meaning where a completion has one advantage: set gamma to 1")
    kl, real = _constant(kl), jnp.asarray(mask) > 0
    chex.assert_equal_shape([kl, real])
    outcomes = _constant(scores) - kl_coef * jnp.where(real, kl, 0).sum(1)
    return jnp.where(real, rule(outcomes, groups)[:, None], 0)


def _scored(scores: Array, mask: Array) -> jax.Array:
    return (jnp.asarray(mask) > 0) & ~jnp.isnan(jnp.asarray(scores))[:, None]


def _constant(x: Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.asarray(x))


def _known(scores: Array) -> tuple[jax.Array, jax.Array]:
    scores = _constant(scores)
    known = ~jnp.isnan(scores)
    return jnp.where(known, scores, 0), known


def _per_group(x: Array, groups: Array) -> jax.Array:
    return jnp.zeros_like(x).at[groups].add(x)[groups]


def _extreme(x: Array, groups: Array, sign: int) -> jax.Array:
    """The least (sign 1) or largest (sign -1) of each group, for every member."""
    return sign * jnp.full_like(x, jnp.inf).at[groups].min(sign * x)[groups]


def _centre(scores: Array, groups: Array) -> tuple[jax.Array, jax.Array]:
    """Scores less their group's mean, 0 where there is none, and the group's number of scores; `[n]` each."""
    scores, known = _known(scores)
    chex.assert_equal_shape([scores, groups])
    counts = _per_group(known.astype(scores.dtype), groups)
    # Less the group's least score first: equal scores then give exactly 0, whatever their mean rounds to.
    least = _extreme(jnp.where(known, scores, jnp.inf), groups, 1)
    above = jnp.where(known, scores - least, 0)
    means = _per_group(above, groups) / jnp.maximum(counts, 1)
    return jnp.where(known, above - means, 0), counts


def _moments(scores: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, standard deviation (Bessel) and number of the scores that exist."""
    scores, known = _known(scores)
    count = known.sum()
    mean = scores.sum() / jnp.maximum(count, 1)
    squares = jnp.where(known, jnp.square(scores - mean), 0)
    return mean, jnp.sqrt(squares.sum() / jnp.maximum(count - 1, 1)), count


# `(scores [n], groups [n], kl [n, steps], mask [n, steps], *, kl_coef, gamma) -> [n, steps]`, 0 where the mask is 0 or
# the score is NaN. The KL is taken off the rewards here; with the KL in the loss, or none, `kl_coef` is 0.
Advantage = Callable[..., jax.Array]
ADVANTAGES: dict[str, Advantage] = {
    "group": partial(_spread, group_advantages),
    "batch": partial(_spread, batch_advantages),
    "none": partial(_spread, unscaled_advantages),
    "leave_one_out": partial(_spread, leave_one_out_advantages),
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}
