"""Preference losses against values derived here by hand."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import PREFERENCE_LOSSES, PreferenceLogps

# Two pairs: log-ratios a, b and lengths. d = a - b is 1.5 for the first and -0.5 for the second.
LOGPS = PreferenceLogps(jnp.array([1.0, -2.0]), jnp.array([-0.5, -1.5]), jnp.array([4.0, 2.0]), jnp.array([5.0, 3.0]))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


# With beta = 0.2: beta d = 0.3 and -0.1.
HAND = {
    "sigmoid": ({}, [-log_sigmoid(0.3), -log_sigmoid(-0.1)]),
    "sigmoid, smoothed": (
        {"label_smoothing": 0.1},
        [-0.9 * log_sigmoid(0.3) - 0.1 * log_sigmoid(-0.3), -0.9 * log_sigmoid(-0.1) - 0.1 * log_sigmoid(0.1)],
    ),
    # means 1/4 + 0.5/5 = 0.35 and -2/2 + 1.5/3 = -0.5; 1 / (2 beta) = 2.5
    "ipo": ({}, [(0.35 - 2.5) ** 2, (-0.5 - 2.5) ** 2]),
    "hinge": ({}, [1 - 0.3, 1 + 0.1]),
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda loss: loss], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", HAND)
def test_values(name, wrap):
    options, wanted = HAND[name]
    loss = partial(PREFERENCE_LOSSES[name.split(",")[0]], beta=0.2, **options)
    np.testing.assert_allclose(wrap(loss)(LOGPS), wanted, rtol=1e-6)


# Derivatives by the chosen log-ratio of the first pair, beta = 0.2.
GRADIENTS = {
    "sigmoid": -0.2 * (1 - 1 / (1 + math.exp(-0.3))),
    "ipo": 2 * (0.35 - 2.5) / 4,
    "hinge": -0.2,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    def first(a):
        logps = LOGPS._replace(chosen_log_ratios=jnp.asarray(LOGPS.chosen_log_ratios).at[0].set(a))
        return PREFERENCE_LOSSES[name](logps, beta=0.2)[0]

    assert jax.grad(first)(1.0) == pytest.approx(GRADIENTS[name], rel=1e-6)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_log_ratios_of_a_thousand_stay_finite(name):
    far = jnp.array([1000.0, -1000.0])
    logps = PreferenceLogps(far, -far, jnp.ones(2), jnp.ones(2), far, -far)
    value, grads = jax.value_and_grad(lambda logps: PREFERENCE_LOSSES[name](logps, beta=0.1).sum())(logps)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_an_empty_pair_stays_finite(name):
    zeros = jnp.zeros(3)
    value, grads = jax.value_and_grad(lambda logps: PREFERENCE_LOSSES[name](logps, beta=0.1).sum())(
        PreferenceLogps(*[zeros] * 6)
    )
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_a_better_margin_never_costs_more():
    margins = jnp.linspace(-20, 4.9, 50)
    zeros, ones = jnp.zeros(50), jnp.ones(50)
    for name, loss in PREFERENCE_LOSSES.items():
        assert (np.diff(loss(PreferenceLogps(margins, zeros, ones, ones, margins, zeros), beta=0.1)) <= 0).all(), name


def test_smoothing_where_there_is_none():
    for name in ("ipo", "hinge"):
        with pytest.raises(ValueError, match=f"loss_type '{name}' has no label smoothing"):
            PREFERENCE_LOSSES[name](LOGPS, beta=0.1, label_smoothing=0.1)


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        PREFERENCE_LOSSES["sigmoid"](LOGPS._replace(chosen_log_ratios=jnp.zeros(3)), beta=0.1)
