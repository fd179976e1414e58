"""Preference losses without a reference against values and derivatives derived here by hand."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import REFERENCE_FREE_LOSSES, alpha_reward, log1mexp, reference_free_options

# Log-probs of two pairs; d = 0.75 and -1.5. beta d = 1.5 and -3 with beta = 2, 1 / (2 beta) = 0.25.
CHOSEN, REJECTED, BETA = jnp.array([-0.25, -2.0]), jnp.array([-1.0, -0.5]), 2.0


def s(x):
    return 1 / (1 + math.exp(-x))


def ls(x):
    return math.log(s(x))


def log_odds(x):
    return x - math.log(1 - math.exp(x))


# ORPO's log odds: -0.25 - log(1 - e^-0.25) is 1.2586; against -1 - log(1 - e^-1), -0.5413: 1.7999. Likewise -2.2891.
ODDS = [log_odds(-0.25) - log_odds(-1), log_odds(-2) - log_odds(-0.5)]
VALUES = {
    "sigmoid": ({}, [-ls(1.5), -ls(-3)]),
    "sigmoid, smoothed": ({"label_smoothing": 0.1}, [-0.9 * ls(m) - 0.1 * ls(-m) for m in (1.5, -3)]),
    "hinge": ({}, [0, 4]),
    "ipo": ({}, [0.5**2, 1.75**2]),
    "simpo": ({"simpo_gamma": 0.7}, [-ls(0.8), -ls(-3.7)]),
    "simpo, smoothed": (
        {"simpo_gamma": 0.7, "label_smoothing": 0.1},
        [-0.9 * ls(m) - 0.1 * ls(-m) for m in (0.8, -3.7)],
    ),
    "orpo": ({}, [-2 * ls(odds) for odds in ODDS]),
}
# Derivatives of the second pair's loss, at -2 and -0.5. d log_odds / dx = 1 / (1 - e^x).
ORPO = [-2 * s(-ODDS[1]) / (1 - math.exp(-2)), 2 * s(-ODDS[1]) / (1 - math.exp(-0.5))]
DERIVATIVES = {
    "sigmoid": [-2 * s(3), 2 * s(3)],
    "sigmoid, smoothed": [2 * (-0.9 * s(3) + 0.1 * s(-3)), -2 * (-0.9 * s(3) + 0.1 * s(-3))],
    "hinge": [-2, 2],
    "ipo": [-3.5, 3.5],
    "simpo": [-2 * s(3.7), 2 * s(3.7)],
    "simpo, smoothed": [2 * (-0.9 * s(3.7) + 0.1 * s(-3.7)), -2 * (-0.9 * s(3.7) + 0.1 * s(-3.7))],
    "orpo": ORPO,
}


def bound(name):
    return partial(REFERENCE_FREE_LOSSES[name.split(",")[0]], beta=BETA, **VALUES[name][0])


def test_every_loss_is_in_the_tables():
    assert {name.split(",")[0] for name in VALUES} == REFERENCE_FREE_LOSSES.keys()
    assert VALUES.keys() == DERIVATIVES.keys()


@pytest.mark.parametrize("wrap", [jax.jit, lambda loss: loss], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", VALUES)
def test_values(name, wrap):
    np.testing.assert_allclose(wrap(bound(name))(CHOSEN, REJECTED), VALUES[name][1], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name):
    grads = jax.grad(lambda *logps: bound(name)(*logps)[1], (0, 1))(CHOSEN, REJECTED)
    np.testing.assert_allclose([grad[1] for grad in grads], DERIVATIVES[name], rtol=5e-6)
    assert all(grad[0] == 0 for grad in grads)


# 0 is an empty completion, or one that the policy knows by heart.
FAR = jnp.array([0.0, -1e-9, -1e-4, -1.0, -100.0, -1e4])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 2.0, -0.5])
@pytest.mark.parametrize("name", REFERENCE_FREE_LOSSES)
def test_extreme_log_probs_stay_finite(name, alpha):
    alpha = 0.0 if name == "orpo" else alpha

    def total(chosen, rejected):
        rewards = (alpha_reward(x, alpha) for x in (chosen, rejected))
        return REFERENCE_FREE_LOSSES[name](*rewards, beta=0.1).sum()

    value, grads = jax.value_and_grad(total, (0, 1))(*(grid.ravel() for grid in jnp.meshgrid(FAR, FAR)))
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert np.isfinite(np.float32(sum(jnp.square(grad).sum() for grad in grads)))


def test_log1mexp_has_no_cancellation():
    # Both sides of the branch at -log 2, where both forms give log(1/2). Far below, log(1 - e^x) is -e^x.
    x = jnp.array([-40.0, -5.0, -0.6932, -0.6931, -0.1, -1e-3, -1e-6])
    exact = np.log(-np.expm1(np.asarray(x, np.float64)))
    exact[0] = -np.exp(-40.0)
    np.testing.assert_allclose(log1mexp(x), exact, rtol=1e-6)
    # Its derivative is -e^x / (1 - e^x).
    np.testing.assert_allclose(jax.vmap(jax.grad(log1mexp))(x), -1 / np.expm1(-np.asarray(x, np.float64)), rtol=1e-5)
    naive = jnp.log(1 - jnp.exp(x[-1]))
    assert abs(naive - exact[-1]) > 1e-2
    # p = 1: as far from 1 as the dtype can say.
    assert log1mexp(jnp.float32(0)) == pytest.approx(math.log(2**-23), rel=1e-5)
    assert jax.grad(log1mexp)(0.0) == 0


def test_alpha_reward():
    # (1 - e^(0.5 * 2)) / 0.5, and its derivative p^-alpha = e; negative orders flatten the reward instead.
    assert alpha_reward(jnp.float32(-2), 0.5) == pytest.approx((1 - math.e) / 0.5, rel=1e-6)
    assert jax.grad(alpha_reward)(-2.0, 0.5) == pytest.approx(math.e, rel=1e-6)
    assert alpha_reward(jnp.float32(-2), -0.5) == pytest.approx((1 - math.exp(-1)) / -0.5, rel=1e-6)
    assert alpha_reward(jnp.float32(-2), 0.0) == -2


def test_options_and_shapes():
    assert set(reference_free_options("simpo")) == {"beta", "simpo_gamma", "label_smoothing"}
    for loss in REFERENCE_FREE_LOSSES.values():
        with pytest.raises(AssertionError):
            loss(CHOSEN, REJECTED[:1], beta=0.1)
