"""Aggregations against sums written out, and against a split of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import AGGREGATIONS, aggregate, count_batch, spread_by_completion

# Completion 0 has the losses 1, 2, 6, completion 1 has 4 (both packed into the first row), completion 2 is present but
# has no token in the loss, completion 3 has 5, 7; place 4 of the batch is empty.
LOSSES = np.array([[1.0, 2.0, 6.0, 4.0, 99.0], [5.0, 7.0, np.inf, np.nan, -99.0]], np.float32)
COMPLETIONS = np.array([[0, 0, 0, 1, -1], [3, 3, -1, -1, -1]], np.int32)
PRESENT = np.array([1, 1, 1, 1, 0], np.float32)
MAX_STEPS, WINDOW_TOKENS = 10, 7.5
WANTED = {
    "grpo": (9 / 3 + 4 + 0 + 12 / 2) / 4,
    "bnpo": (9 + 4 + 12) / 6,
    "dapo": (9 + 4 + 12) / 7.5,
    "dr_grpo": (9 + 4 + 12) / (4 * 10),
    "luspo": (9 + 4 + 0 + 12) / 4,
}
# Of the loss by that of each real token, in the order 1, 2, 6, 4, 5, 7.
WEIGHTS = {
    "grpo": np.array([1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2]) / 4,
    "bnpo": np.full(6, 1 / 6),
    "dapo": np.full(6, 1 / 7.5),
    "dr_grpo": np.full(6, 1 / 40),
    "luspo": np.full(6, 1 / 4),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
def test_values_and_gradients(name, wrap):
    aggregation = AGGREGATIONS[name]
    counts = count_batch(PRESENT, COMPLETIONS, max_steps=MAX_STEPS, window_tokens=WINDOW_TOKENS)
    total = aggregation.total(counts)
    value, grads = wrap(jax.value_and_grad(lambda losses: aggregate(aggregation, losses, COMPLETIONS, 5, total=total)))(
        LOSSES
    )
    assert float(value) == pytest.approx(WANTED[name], rel=1e-6)
    np.testing.assert_allclose(np.asarray(grads)[COMPLETIONS >= 0], WEIGHTS[name], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(grads)[COMPLETIONS < 0], 0)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_micro_batches_add_up(name):
    """Eleven completions of 0 to 9 tokens, whole and in micro-batches of four, the last of them partly empty."""
    draw = np.random.default_rng(0)
    lengths = np.array([3, 0, 9, 1, 5, 2, 8, 0, 1, 6, 4])
    losses = draw.normal(size=(11, 9))
    numbers = np.where(np.arange(9) < lengths[:, None], np.arange(11)[:, None], -1)
    split = np.full((3, 4, 9), -1)
    split.reshape(12, 9)[:11] = np.where(numbers >= 0, numbers % 4, -1)
    parts = np.zeros((3, 4, 9))
    parts.reshape(12, 9)[:11] = losses
    present = np.arange(12).reshape(3, 4) < 11
    with jax.enable_x64(True):
        counts = count_batch(present, split, max_steps=MAX_STEPS)
        total = AGGREGATIONS[name].total(counts)
        whole = aggregate(AGGREGATIONS[name], jnp.asarray(losses), numbers, 11, total=total)
        shares = [
            aggregate(AGGREGATIONS[name], jnp.asarray(x), c, 4, total=total) for x, c in zip(parts, split, strict=True)
        ]
        assert whole.dtype == jnp.float64
        np.testing.assert_allclose(sum(shares), whole, rtol=1e-13)
    assert (int(counts.completions), int(counts.tokens), int(counts.window_tokens)) == (11, 39, 39)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_nothing_in_the_loss_is_zero(name):
    completions = np.full((2, 5), -1)
    total = AGGREGATIONS[name].total(count_batch(np.zeros(5), completions, max_steps=MAX_STEPS))
    value, grads = jax.value_and_grad(lambda x: aggregate(AGGREGATIONS[name], x, completions, 5, total=total))(LOSSES)
    assert float(total) == 0
    assert float(value) == 0
    np.testing.assert_array_equal(grads, 0)


def test_spreading_and_its_gradient():
    spread, pull = jax.vjp(lambda x: spread_by_completion(x, COMPLETIONS), jnp.arange(1.0, 6.0))
    np.testing.assert_array_equal(spread, [[1, 1, 1, 2, 0], [4, 4, 0, 0, 0]])
    np.testing.assert_array_equal(pull(jnp.ones((2, 5)))[0], [3, 1, 0, 2, 0])
