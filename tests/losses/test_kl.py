"""KL estimators: values by hand, expectations over a whole distribution, extremes; the adaptive coefficient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import KL_ESTIMATORS, bias_corrected, prob_ratios, update_kl_coef

# log p - log q is 0.5 for the first token and -1 for the second.
LOGPS, REF_LOGPS = jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0])
HAND = {
    "k1": [0.5, -1.0],
    "k2": [0.125, 0.5],
    "k3": [math.exp(-0.5) + 0.5 - 1, math.exp(1) - 1 - 1],
}
# Derivatives by log p: 1; log p - log q; 1 - q/p.
SLOPES = {"k1": [1.0, 1.0], "k2": [0.5, -1.0], "k3": [1 - math.exp(-0.5), 1 - math.exp(1)]}

POLICY = jnp.array([0.3, -1.0, 1.2, 0.1, -0.4])
REFERENCE = jnp.array([-0.2, 0.5, 0.9, 0.4, -1.1])
OLD = jnp.array([-0.8, 1.3, -0.7, 0.5, 0.2])


def exact_kl(logits):
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
    return (jnp.exp(log_p) * (log_p - log_q)).sum()


def mean_under(draw_logits, kl, logits):
    """The expectation of a token's estimate when tokens come from `draw_logits`; those do not move with `logits`."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
    return (jax.nn.softmax(draw_logits) * kl(log_p, log_q)).sum()


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", HAND)
def test_values_and_gradients(name, wrap):
    estimator = wrap(KL_ESTIMATORS[name])
    np.testing.assert_allclose(estimator(LOGPS, REF_LOGPS), HAND[name], rtol=1e-6)
    by_policy, by_reference = jax.grad(lambda p, q: estimator(p, q).sum(), argnums=(0, 1))(LOGPS, REF_LOGPS)
    np.testing.assert_allclose(by_policy, SLOPES[name], rtol=1e-6)
    np.testing.assert_array_equal(by_reference, 0)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    means = {name: float(mean_under(POLICY, kl, POLICY)) for name, kl in KL_ESTIMATORS.items()}
    wanted = float(exact_kl(POLICY))
    assert means["k1"] == pytest.approx(wanted, rel=1e-5)
    assert means["k3"] == pytest.approx(wanted, rel=1e-5)
    assert abs(means["k2"] - wanted) > 0.01


def test_gradients_in_expectation():
    """As a loss k1 does nothing, k2 pulls as the KL does, and k3 as the KL of the other direction."""
    grads = {name: jax.grad(lambda x, kl=kl: mean_under(POLICY, kl, x))(POLICY) for name, kl in KL_ESTIMATORS.items()}
    np.testing.assert_allclose(grads["k1"], 0, atol=1e-6)
    np.testing.assert_allclose(grads["k2"], jax.grad(exact_kl)(POLICY), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["k3"], jax.nn.softmax(POLICY) - jax.nn.softmax(REFERENCE), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_bias_correction(name):
    """Tokens of an old policy: value and gradient of the corrected estimate are those of the KL."""

    def corrected(log_p, log_q):
        return bias_corrected(KL_ESTIMATORS[name](log_p, log_q), log_p - jax.nn.log_softmax(OLD))

    value, grads = jax.value_and_grad(lambda x: mean_under(OLD, corrected, x))(POLICY)
    assert float(value) == pytest.approx(float(exact_kl(POLICY)), rel=1e-5)
    np.testing.assert_allclose(grads, jax.grad(exact_kl)(POLICY), rtol=1e-4, atol=1e-6)
    assert abs(float(mean_under(OLD, KL_ESTIMATORS[name], POLICY)) - float(value)) > 0.01


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_log_ratios_of_a_hundred_stay_finite(name):
    far = jnp.array([100.0, -100.0, 0.0])

    def total(logps):
        return bias_corrected(KL_ESTIMATORS[name](logps, jnp.zeros(3)), logps).sum()

    value, grads = jax.value_and_grad(total)(far)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()
    if name != "k1":
        assert (KL_ESTIMATORS[name](far, jnp.zeros(3)) >= 0).all()


def test_ratios_stop_at_twenty():
    ratios, slopes = jax.vmap(jax.value_and_grad(prob_ratios))(jnp.array([-100.0, 19.0, 100.0]))
    np.testing.assert_allclose(ratios, [math.exp(-20), math.exp(19), math.exp(20)], rtol=1e-5)
    np.testing.assert_allclose(slopes, [0, math.exp(19), 0], rtol=1e-5)


def test_float64_stays():
    with jax.enable_x64(True):
        logps = np.array([-1.0, -2.0])
        for name, kl in KL_ESTIMATORS.items():
            np.testing.assert_allclose(kl(logps, np.array([-1.5, -1.0])), HAND[name], rtol=1e-14)


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (12.0, 0.151536),  # FORMULAS: error clipped to 0.2, 0.15 (1 + 0.2 * 512 / 10000)
        (6.6, 0.15 * (1 + 0.1 * 512 / 10000)),  # 6.6 / 6 - 1 = 0.1, within the bounds
        (6.0, 0.15),
        (0.0, 0.15 * (1 - 0.2 * 512 / 10000)),
        (-3.0, 0.15 * (1 - 0.2 * 512 / 10000)),  # an estimate may be negative
    ],
)
def test_adaptive_coefficient(kl, wanted):
    for update in (update_kl_coef, jax.jit(update_kl_coef, static_argnames=("target", "horizon", "num_samples"))):
        assert float(update(0.15, kl, target=6.0, horizon=10000, num_samples=512)) == pytest.approx(wanted, rel=1e-6)
