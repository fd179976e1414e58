"""The clipped value loss by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import value_loss

# With epsilon 0.2 around V_old = 1: V is held to [0.8, 1.2].
VALUES = jnp.array([1.1, 1.5, 1.5, 0.5, 0.5])
OLD_VALUES = jnp.ones(5)
RETURNS = jnp.array([2.0, 2.0, 1.0, 2.0, 0.0])
# 0.9^2; max(0.5^2, 0.8^2): held; max(0.5^2, 0.2^2); max(1.5^2, 1.2^2); max(0.5^2, 0.8^2): held. All halved.
LOSS = [0.405, 0.32, 0.125, 1.125, 0.32]
SLOPES = [-0.9, 0.0, 0.5, -1.5, 0.0]
CLIPPED = [0, 1, 0, 0, 1]


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
def test_clipped(wrap):
    terms = wrap(lambda *arrays: value_loss(*arrays, epsilon=0.2))(VALUES, OLD_VALUES, RETURNS)
    np.testing.assert_allclose(terms.loss, LOSS, rtol=1e-5)
    np.testing.assert_array_equal(terms.clipped, CLIPPED)
    grads = jax.grad(lambda *arrays: value_loss(*arrays, epsilon=0.2).loss.sum(), argnums=(0, 1, 2))(
        VALUES, OLD_VALUES, RETURNS
    )
    np.testing.assert_allclose(grads[0], SLOPES, rtol=1e-5)
    np.testing.assert_array_equal(grads[1:], 0)


def test_unclipped():
    terms = value_loss(VALUES, OLD_VALUES, RETURNS)
    np.testing.assert_allclose(terms.loss, np.square(np.subtract(VALUES, RETURNS)) / 2, rtol=1e-6)
    np.testing.assert_array_equal(terms.clipped, 0)


def test_unmoved_values_are_not_clipped():
    """A fresh buffer: V = V_old exactly, at any size of the numbers."""
    draw = np.random.default_rng(0)
    values = jnp.asarray(draw.normal(0, 100, 1000), jnp.float32)
    terms = value_loss(values, values, jnp.asarray(draw.normal(0, 100, 1000), jnp.float32), epsilon=0.2)
    np.testing.assert_array_equal(terms.clipped, 0)


def test_extremes_and_float64():
    far = jnp.array([1e6, -1e6, 0.0])
    value, grads = jax.value_and_grad(lambda v: value_loss(v, jnp.zeros(3), -far, epsilon=0.2).loss.sum())(far)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()
    with jax.enable_x64(True):
        terms = value_loss(np.array([0.1]), np.zeros(1), np.ones(1), epsilon=0.2)
        assert terms.loss.dtype == jnp.float64
        np.testing.assert_allclose(terms.loss, 0.9**2 / 2, rtol=1e-14)
