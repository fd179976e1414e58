"""Losses of single completions against values derived here by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import UNPAIRED_LOSSES, UnpairedLogps, kto_baseline, running_mean

# Log-ratios a of a desirable, an undesirable, and an empty undesirable completion.
LOGPS = UnpairedLogps(jnp.array([2.0, -1.0, 0.0]), jnp.array([1.0, 0.0, 0.0]), 0.5)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# With beta = 0.2 and a baseline of 0.5:
HAND = {
    # desirable 1 - s(0.2 * (2 - 0.5)), undesirable 1 - s(0.2 * (0.5 + 1)) and 1 - s(0.2 * 0.5)
    "kto": [1 - sigmoid(0.3), 1 - sigmoid(0.3), 1 - sigmoid(0.1)],
    # rewards 0.4, -0.2, 0 less 0.5: -log s(-0.1), -log s(0.7), -log s(0.5)
    "bco": [-math.log(sigmoid(-0.1)), -math.log(sigmoid(0.7)), -math.log(sigmoid(0.5))],
    # no baseline: 1 - s(0.4), s(-0.2), s(0)
    "apo_zero_unpaired": [1 - sigmoid(0.4), sigmoid(-0.2), 0.5],
}
# Derivatives by the log-ratios, s' = s (1 - s): KTO -+0.2 s', BCO -+0.2 (1 - s), APO -+0.2 s'.
SLOPES = {
    "kto": [
        -0.2 * sigmoid(0.3) * sigmoid(-0.3),
        0.2 * sigmoid(0.3) * sigmoid(-0.3),
        0.2 * sigmoid(0.1) * sigmoid(-0.1),
    ],
    "bco": [-0.2 * sigmoid(0.1), 0.2 * sigmoid(-0.7), 0.2 * sigmoid(-0.5)],
    "apo_zero_unpaired": [-0.2 * sigmoid(0.4) * sigmoid(-0.4), 0.2 * sigmoid(0.2) * sigmoid(-0.2), 0.05],
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda loss: loss], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_values_and_gradients(name, wrap):
    loss = wrap(lambda ratios: UNPAIRED_LOSSES[name](LOGPS._replace(log_ratios=ratios), beta=0.2))
    np.testing.assert_allclose(loss(LOGPS.log_ratios), HAND[name], rtol=1e-6)
    slopes = wrap(jax.grad(lambda ratios: loss(ratios).sum()))(LOGPS.log_ratios)
    np.testing.assert_allclose(slopes, SLOPES[name], rtol=1e-5)


# At a = +-100, beta 1, baseline 0: what is right costs e^-100, what is wrong 1 (KTO, APO) or 100 (BCO).
@pytest.mark.parametrize(("name", "worst"), [("kto", 1.0), ("bco", 100.0), ("apo_zero_unpaired", 1.0)])
def test_extremes(name, worst):
    logps = UnpairedLogps(jnp.array([100.0, -100.0, 100.0, -100.0]), jnp.array([1.0, 0.0, 0.0, 1.0]), 0.0)
    value, slopes = jax.value_and_grad(
        lambda ratios: UNPAIRED_LOSSES[name](logps._replace(log_ratios=ratios), beta=1.0).sum()
    )(logps.log_ratios)
    assert float(value) == pytest.approx(2 * worst, rel=1e-6)
    wanted = [0.0, 0.0, 1.0, -1.0] if name == "bco" else [0.0] * 4
    np.testing.assert_allclose(slopes, wanted, atol=1e-30)


def test_the_baseline_of_kto():
    """Mean of 3, -1 and 4 is 2; of -3 and -1 it is negative, so 0; of nothing it is 0. No gradient."""
    ratios, there = jnp.array([3.0, -1.0, 9.0, 4.0]), jnp.array([1.0, 1.0, 0.0, 1.0])
    assert float(kto_baseline(ratios, there)) == 2.0
    assert float(kto_baseline(jnp.array([-3.0, -1.0]), jnp.ones(2))) == 0.0
    assert float(kto_baseline(ratios, jnp.zeros(4))) == 0.0
    assert not jax.grad(lambda x: kto_baseline(x, there))(ratios).any()


def test_running_means():
    """After 1, 2 and then 6, 0, 1 (7 is not there): 3 / 2 = 1.5, then (3 + 7) / 5 = 2; nothing changes nothing."""
    mean, count = running_mean(jnp.zeros(()), jnp.zeros(()), jnp.array([[1.0, 2.0]]), jnp.ones((1, 2)))
    assert (float(mean), float(count)) == (1.5, 2.0)
    mean, count = running_mean(mean, count, jnp.array([6.0, 0.0, 7.0, 1.0]), jnp.array([1.0, 1.0, 0.0, 1.0]))
    assert (float(mean), float(count)) == (2.0, 5.0)
    same = running_mean(mean, count, jnp.array([3.0]), jnp.zeros(1))
    assert (float(same[0]), float(same[1])) == (2.0, 5.0)
    empty = running_mean(jnp.zeros(()), jnp.zeros(()), jnp.array([3.0]), jnp.zeros(1))
    assert (float(empty[0]), float(empty[1])) == (0.0, 0.0)


def test_shapes_must_agree():
    for name in UNPAIRED_LOSSES:
        with pytest.raises(AssertionError):
            UNPAIRED_LOSSES[name](LOGPS._replace(labels=jnp.ones(2)), beta=0.2)
