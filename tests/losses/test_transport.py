"""AOT against values derived here by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import COUPLED_LOSSES, PREFERENCE_LOSSES, PreferenceLogps


def cost(x, e=0.0):
    return (1 - e) * math.log1p(math.exp(-x)) + e * math.log1p(math.exp(x))


# Policy log-probs -3, -9, -4 and -8, -7, -6: margins 5, -2, 2. Log-ratios a = 2, -1, 4 and b = 1, -3, 0: margins of the
# reference are 5 - (2 - 1) = 4, -2 - (-1 + 3) = -4, 2 - (4 - 0) = -2.
LOGPS = PreferenceLogps(
    jnp.array([2.0, -1.0, 4.0]),
    jnp.array([1.0, -3.0, 0.0]),
    jnp.array([3.0, 5.0, 2.0]),
    jnp.array([4.0, 1.0, 2.0]),
    jnp.array([-3.0, -9.0, -4.0]),
    jnp.array([-8.0, -7.0, -6.0]),
)
# sorted: (-2, 2, 5) - (-4, -2, 4) = 2, 4, 1; sorted a - sorted b: (-1, 2, 4) - (-3, 0, 1) = 2, 2, 3
HAND = {"aot": [2.0, 4.0, 1.0], "aot_unpaired": [2.0, 2.0, 3.0]}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", HAND)
def test_values(name, smoothing):
    found = jax.jit(lambda logps: PREFERENCE_LOSSES[name](logps, beta=0.5, label_smoothing=smoothing))(LOGPS)
    np.testing.assert_allclose(found, [cost(0.5 * d, smoothing) for d in HAND[name]], rtol=1e-6)


# -0.5 s(-0.5 d) at each quantile, where the policy's number stands in the order: margins 5, -2, 2 are third, first and
# second; a = 2, -1, 4 are second, first and third.
SLOPES = {"aot": [1.0, 2.0, 4.0], "aot_unpaired": [2.0, 2.0, 3.0]}


@pytest.mark.parametrize("name", SLOPES)
def test_gradients(name):
    """By the policy's log-probs of the chosen: each pair gets its quantile's slope; the reference's order has none."""

    def loss(moved):
        changed = LOGPS._replace(
            chosen_logps=LOGPS.chosen_logps + moved, chosen_log_ratios=LOGPS.chosen_log_ratios + moved
        )
        return PREFERENCE_LOSSES[name](changed, beta=0.5).sum()

    wanted = [-0.5 / (1 + math.exp(0.5 * d)) for d in SLOPES[name]]
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(3)), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(COUPLED_LOSSES))
def test_what_is_not_there_has_no_quantile(name):
    """Places among the pairs, with any numbers in them: the same losses, then 0; no gradient there, nor NaN."""
    order = jnp.array([0, 1, 1, 2, 0])
    where = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    wider = PreferenceLogps(*(jnp.where(where > 0, x[order], 1e4 * (x[order] - 3)) for x in LOGPS if x is not None))
    value, slopes = jax.value_and_grad(lambda x: PREFERENCE_LOSSES[name](x, beta=0.5, where=where).sum())(wider)
    np.testing.assert_allclose(
        PREFERENCE_LOSSES[name](wider, beta=0.5, where=where), [*PREFERENCE_LOSSES[name](LOGPS, beta=0.5), 0, 0]
    )
    assert float(value) == pytest.approx(sum(cost(0.5 * d) for d in HAND[name]), rel=1e-6)
    for each in slopes:
        assert np.isfinite(each).all() and not np.asarray(each)[[1, 4]].any()
    nothing = jax.value_and_grad(lambda x: PREFERENCE_LOSSES[name](x, beta=0.5, where=jnp.zeros(5)).sum())(wider)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(nothing))


def test_a_policy_that_is_better_everywhere_loses_nothing():
    """Log-ratios of +-100: costs of about 0, or of beta times the distance where it is worse; finite gradients."""
    far = jnp.array([100.0, 101.0])
    logps = PreferenceLogps(far, -far, jnp.ones(2), jnp.ones(2), far, -far)
    for name in COUPLED_LOSSES:
        better, worse = (PREFERENCE_LOSSES[name](each, beta=1.0) for each in (logps, jax.tree.map(lambda x: -x, logps)))
        np.testing.assert_allclose(better, 0, atol=1e-30)
        np.testing.assert_allclose(worse[:2].sum(), 402, rtol=1e-6)


def test_margins_need_the_policys_log_probs():
    with pytest.raises(ValueError, match="give chosen_logps and rejected_logps"):
        PREFERENCE_LOSSES["aot"](LOGPS._replace(chosen_logps=None, rejected_logps=None), beta=0.1)
