"""The chunked head against the whole `[rows, length, vocab]` array, and the sums by completion."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import by_step, count_by_completion, mean_by_completion, ratio, sum_by_completion, token_statistics
from jaxalign.types import Predictions

ROWS, LENGTH, EMBED, VOCAB, ASKED = 3, 11, 8, 50, 13


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, EMBED)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(EMBED, VOCAB)), jnp.float32)
    completions = rng.integers(-1, 5, (ROWS, ASKED)).astype(np.int32)
    predictions = Predictions(
        sources=rng.integers(0, LENGTH, (ROWS, ASKED)).astype(np.int32),
        targets=rng.integers(0, VOCAB, (ROWS, ASKED)).astype(np.int32),
        completions=completions,
        steps=np.tile(np.arange(ASKED, dtype=np.int32), (ROWS, 1)),
    )
    return hidden, head, predictions


def direct(hidden, head, predictions, temperature):
    raw = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    raw = np.take_along_axis(raw, predictions.sources[..., None], axis=1)
    scaled = raw / temperature
    log_probs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    targets = predictions.targets[..., None]
    return {
        "logps": np.take_along_axis(log_probs, targets, axis=-1)[..., 0],
        "entropy": -(np.exp(log_probs) * log_probs).sum(-1),
        "hits": raw.argmax(-1) == predictions.targets,
        "mean_logits": raw.mean(-1),
        "mean_logps": log_probs.mean(-1),
        "log_square_sums": np.log(np.exp(2 * log_probs).sum(-1)),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_statistics(case, chunk, temperature):
    hidden, head, predictions = case
    ask = partial(token_statistics, lambda h: h @ head, hidden, predictions, temperature=temperature, chunk=chunk)
    got = ask(square_sums=True)
    assert ask().log_square_sums is None
    for name, wanted in direct(hidden, head, predictions, temperature).items():
        np.testing.assert_allclose(getattr(got, name), wanted, atol=2e-5, err_msg=name)


def test_the_gradient_is_that_of_the_whole_array(case):
    hidden, head, predictions = case

    def chunked(hidden, head):
        return jnp.sin(token_statistics(lambda h: h @ head, hidden, predictions, chunk=4).logps).sum()

    def whole(hidden, head):
        log_probs = jax.nn.log_softmax(hidden @ head)
        picked = jnp.take_along_axis(log_probs, predictions.sources[..., None], axis=1)
        return jnp.sin(jnp.take_along_axis(picked, predictions.targets[..., None], axis=-1)).sum()

    for got, wanted in zip(jax.grad(chunked, (0, 1))(hidden, head), jax.grad(whole, (0, 1))(hidden, head), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_only_logps_carry_a_gradient(case):
    hidden, head, predictions = case
    for name in ("entropy", "hits", "mean_logits", "log_square_sums"):

        def total(h, name=name):
            return getattr(token_statistics(lambda x: x @ head, h, predictions, square_sums=True), name).sum()

        grad = jax.grad(total)(hidden)
        assert not np.asarray(grad).any(), name


def test_the_entropy_carries_a_gradient_on_request(case):
    """That of the whole array, at a temperature; its value stays, and so do the log-probs' gradients."""
    hidden, head, predictions = case

    def chunked(hidden, wanted):
        ask = partial(token_statistics, lambda h: h @ head, hidden, predictions, temperature=0.7, chunk=4)
        got = ask(entropy_gradient=wanted)
        return jnp.sin(got.entropy).sum() + got.logps.sum(), got.entropy

    def whole(hidden):
        log_probs = jax.nn.log_softmax(hidden @ head / 0.7)
        picked = jnp.take_along_axis(log_probs, predictions.sources[..., None], axis=1)
        entropy = -(jnp.exp(picked) * picked).sum(-1)
        return jnp.sin(entropy).sum() + jnp.take_along_axis(picked, predictions.targets[..., None], axis=-1).sum()

    grads = {wanted: jax.grad(chunked, has_aux=True)(hidden, wanted) for wanted in (True, False)}
    np.testing.assert_allclose(grads[True][0], jax.grad(whole)(hidden), atol=1e-4)
    assert np.abs(grads[True][0] - grads[False][0]).max() > 0.1
    np.testing.assert_array_equal(grads[True][1], grads[False][1])


def test_huge_logits_stay_finite(case):
    hidden, head, predictions = case
    function = partial(token_statistics, lambda h: h @ head * 1e4, predictions=predictions, square_sums=True)
    got = function(hidden)
    assert all(np.isfinite(np.asarray(value)).all() for value in jax.tree.leaves(got))
    assert np.isfinite(jax.grad(lambda h: function(h).logps.sum())(hidden)).all()


def test_sums_by_completion():
    x = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, np.nan]])
    completions = jnp.array([[0, 2, 0], [2, 3, -1]])
    np.testing.assert_array_equal(sum_by_completion(x, completions, 3), [5, 0, 10])  # 3 is out of range, -1 padding
    np.testing.assert_array_equal(count_by_completion(completions, 4), [2, 0, 2, 1])
    np.testing.assert_array_equal(mean_by_completion(x, completions, 4), [2.5, 0, 5, 16])
    steps = jnp.array([[0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(by_step(x, completions, steps, 4, 2), [[1, 4], [0, 0], [8, 2], [16, 0]])


def test_nothing_over_nothing_is_nothing():
    value, grad = jax.value_and_grad(lambda x: ratio(x, jnp.zeros(())))(jnp.zeros(()))
    assert value == 0
    assert grad == 0
