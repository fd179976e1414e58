"""LD-DPO's weights of tokens and WPO's weights of pairs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import length_weights, policy_weights

# Two pairs, in one row and in two: completions of 3 and 1 tokens, and of 0 and 2. -1 = padding.
COMPLETIONS = jnp.array([[0, 0, 0, 1, -1], [3, 3, -1, -1, -1]])
STEPS = jnp.array([[0, 1, 2, 0, 0], [0, 1, 0, 0, 0]])
LENGTHS = jnp.array([3.0, 1.0, 0.0, 2.0])


def test_tokens_that_both_reach_count_fully():
    weights = np.asarray(length_weights(COMPLETIONS, STEPS, LENGTHS, 0.3))
    np.testing.assert_allclose(weights[0, :4], [1, 0.3, 0.3, 1], rtol=1e-6)
    np.testing.assert_allclose(weights[1, :2], [0.3, 0.3], rtol=1e-6)
    real = np.asarray(COMPLETIONS) >= 0
    assert (np.asarray(length_weights(COMPLETIONS, STEPS, LENGTHS, 1.0))[real] == 1).all()


def test_policy_weights():
    logps = jnp.array([[-1.0, -2.0, -0.5, -3.0, -9.0], [-0.25, -1.0, 7.0, 7.0, 7.0]])
    squares = jnp.array([[-0.5, -1.0, -0.7, -1.5, 3.0], [-0.25, -2.0, 0.0, 0.0, 0.0]])
    # Means of logp - log sum p^2: (-0.5 - 1 + 0.2) / 3 = -1.3/3 and -1.5; nothing (weight 1) and (0 + 1) / 2 = 0.5.
    wanted = [math.exp(-1.3 / 3 - 1.5), math.exp(0.5)]
    assert policy_weights(logps, squares, COMPLETIONS, 4) == pytest.approx(wanted, rel=1e-6)
    grads = jax.grad(lambda x: policy_weights(x, squares, COMPLETIONS, 4).sum())(logps)
    assert (np.asarray(grads) == 0).all()
