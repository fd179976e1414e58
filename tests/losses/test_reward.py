"""Reward-model losses by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import bradley_terry, ranking


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


CHOSEN, REJECTED, MARGINS = jnp.array([1.0, -0.5]), jnp.array([0.2, 0.5]), jnp.array([0.3, 1.0])


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
def test_bradley_terry(wrap):
    """Differences 0.8 and -1, less the margins 0.5 and -2; sums 1.2 and 0."""
    np.testing.assert_allclose(
        wrap(bradley_terry)(CHOSEN, REJECTED), [-log_sigmoid(0.8), -log_sigmoid(-1.0)], rtol=1e-6
    )
    loss = wrap(lambda *arrays: bradley_terry(*arrays[:2], margins=arrays[2], center_rewards_coefficient=0.01))
    np.testing.assert_allclose(
        loss(CHOSEN, REJECTED, MARGINS), [-log_sigmoid(0.5) + 0.01 * 1.44, -log_sigmoid(-2.0)], rtol=1e-6
    )


def test_gradients():
    """By the chosen score: sigmoid(d) - 1 + 2 c (s + s'); by the rejected: 1 - sigmoid(d) + 2 c (s + s')."""
    chosen, rejected = jax.grad(
        lambda c, r: bradley_terry(c, r, center_rewards_coefficient=0.01).sum(), argnums=(0, 1)
    )(CHOSEN, REJECTED)
    push = 1 - 1 / (1 + np.exp(-np.array([0.8, -1.0])))
    np.testing.assert_allclose(chosen, -push + 0.02 * np.array([1.2, 0.0]), rtol=1e-5)
    np.testing.assert_allclose(rejected, push + 0.02 * np.array([1.2, 0.0]), rtol=1e-5)


def test_equals_logexp():
    """`log(1 + e^(r' - r))` is the same loss written otherwise."""
    d = jnp.linspace(-8, 8, 33)
    np.testing.assert_allclose(bradley_terry(d, jnp.zeros(33)), jnp.log1p(jnp.exp(-d)), rtol=1e-5)


def test_ranking_pairs():
    """Prompt 0 ranks b > a = c; prompt 1 has two answers, a > b; prompt 2 has one; its third place is garbage."""
    scores = jnp.array([[0.1, 0.9, -0.4], [2.0, 1.0, 1e9], [0.5, 1e9, 1e9]])
    ranks = jnp.array([[1, 0, 1], [0, 1, 0], [0, 1, 2]])
    present = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    terms = ranking(scores, ranks, present)
    wanted = np.zeros((3, 3, 3))
    wanted[0, 1, 0], wanted[0, 1, 2], wanted[1, 0, 1] = -log_sigmoid(0.8), -log_sigmoid(1.3), -log_sigmoid(1.0)
    np.testing.assert_allclose(terms.loss, wanted, rtol=1e-6)
    np.testing.assert_array_equal(terms.pairs, wanted > 0)
    grads = jax.grad(lambda s: ranking(s, ranks, present, center_rewards_coefficient=0.1).loss.sum())(scores)
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(np.asarray(grads)[present == 0], 0)
    assert grads[2, 0] == 0


def test_a_ranking_of_two_is_a_pair():
    scores = jnp.stack([CHOSEN, REJECTED], 1)
    margins = jnp.zeros((2, 2, 2)).at[:, 0, 1].set(MARGINS)
    terms = ranking(
        scores, jnp.tile(jnp.arange(2), (2, 1)), jnp.ones((2, 2)), margins=margins, center_rewards_coefficient=0.2
    )
    wanted = bradley_terry(CHOSEN, REJECTED, margins=MARGINS, center_rewards_coefficient=0.2)
    np.testing.assert_allclose(terms.loss[:, 0, 1], wanted, rtol=1e-6)
    assert float(terms.loss.sum()) == pytest.approx(float(wanted.sum()))


def test_extremes_and_float64():
    far = jnp.array([100.0, -100.0])
    value, grads = jax.value_and_grad(lambda s: bradley_terry(s, -s, center_rewards_coefficient=0.01).sum())(far)
    assert float(value) == pytest.approx(200)
    assert np.isfinite(grads).all()
    with jax.enable_x64(True):
        assert bradley_terry(np.array([0.8]), np.zeros(1)).dtype == jnp.float64
    with pytest.raises(AssertionError):
        bradley_terry(CHOSEN, jnp.zeros(3))
