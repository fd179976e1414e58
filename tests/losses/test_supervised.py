"""The losses of supervised fine-tuning against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import SFT_LOSSES, token_statistics
from jaxalign.types import Predictions

# One target, number 0, of four tokens with logits [2, 0, 0, 0]: Z = e^2 + 3 = 10.3891, log Z = 2.34075, so
# log p = 2 - 2.34075 = -0.34075, p = 0.71123, and the mean of log p over the vocabulary is 0.5 - 2.34075 = -1.84075.
LOGITS = jnp.array([[[2.0, 0.0, 0.0, 0.0]]])
P = np.array([0.711235, 0.096255, 0.096255, 0.096255])


def statistics(logits, target=0):
    zero = jnp.zeros((1, 1), jnp.int32)
    return token_statistics(lambda x: x, logits, Predictions(zero, zero + target, zero, zero))


def value_and_gradient(name, logits, target=0, **options):
    def total(logits):
        return SFT_LOSSES[name](statistics(logits, target), **options).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(logits)
    return float(value), np.asarray(gradient)[0, 0]


@pytest.mark.parametrize(
    ("name", "options", "value", "gradient"),
    [
        ("nll", {}, 0.340753, P - [1, 0, 0, 0]),
        # 0.8 * 0.34075 + 0.2 * 1.84075; the gradient is p less the smoothed target.
        ("nll", {"label_smoothing": 0.2}, 0.640753, P - [0.85, 0.05, 0.05, 0.05]),
        # p log p = 0.71123 * 0.34075; p is a constant, so the gradient is p times that of the log-likelihood.
        ("dft", {}, 0.242355, P[0] * (P - [1, 0, 0, 0])),
    ],
)
def test_by_hand(name, options, value, gradient):
    found = value_and_gradient(name, LOGITS, **options)
    assert found[0] == pytest.approx(value, abs=2e-6)
    np.testing.assert_allclose(found[1], gradient, atol=2e-6)


@pytest.mark.parametrize("name", SFT_LOSSES)
def test_extremes_are_finite(name):
    """A target 100 nats above or below all else: p is 1, or so small that float32 has no number for it."""
    sure = value_and_gradient(name, LOGITS * 50)
    assert sure[0] == 0 and not sure[1].any()
    hopeless = value_and_gradient(name, LOGITS * 50, target=1)
    assert hopeless[0] == pytest.approx(100.0 if name == "nll" else 0.0, abs=1e-4)
    np.testing.assert_allclose(hopeless[1], [1, -1, 0, 0] if name == "nll" else [0] * 4, atol=1e-6)


def test_dft_has_no_label_smoothing():
    with pytest.raises(ValueError, match="no label smoothing"):
        SFT_LOSSES["dft"](statistics(LOGITS), label_smoothing=0.1)
