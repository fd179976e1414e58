"""Truncation against values derived by hand, and draws against the distribution that they claim."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.sampling.logits import min_p_mask, perturb, scale, top_k_mask, top_p_mask, truncate

# Out of order, so that sorting matters. From the top: 0.4 (id 1), 0.3 (4), 0.15 (0), 0.1 (3), 0.05 (2).
PROBS = np.array([0.15, 0.4, 0.05, 0.1, 0.3], np.float32)


def kept_ids(**options):
    kept, log_mass = jax.jit(lambda x: truncate(x, **options))(jnp.log(PROBS)[None])
    return set(np.flatnonzero(kept[0])), float(jnp.exp(log_mass[0]))


@pytest.mark.parametrize(
    ("options", "ids", "mass"),
    [
        ({}, {0, 1, 2, 3, 4}, 1.0),
        ({"top_k": 2}, {1, 4}, 0.7),
        ({"top_k": 9}, {0, 1, 2, 3, 4}, 1.0),
        # 0.4 + 0.3 = 0.7 < 0.8, so the third is needed.
        ({"top_p": 0.8}, {1, 4, 0}, 0.85),
        # 0.4 alone reaches 0.39.
        ({"top_p": 0.39}, {1}, 0.4),
        ({"top_p": 1e-9}, {1}, 0.4),
        # At least 0.3 * 0.4 = 0.12.
        ({"min_p": 0.3}, {1, 4, 0}, 0.85),
        ({"min_p": 1.0}, {1}, 0.4),
        # Of the three that top-k left, renormalised by 0.85, two hold 0.82 of the mass: without that, 0.8 needs three.
        ({"top_k": 3, "top_p": 0.8}, {1, 4}, 0.7),
        ({"top_k": 4, "top_p": 0.99, "min_p": 0.3}, {1, 4, 0}, 0.85),
    ],
)
def test_truncate_by_hand(options, ids, mass):
    kept, kept_mass = kept_ids(**options)
    assert kept == ids
    assert kept_mass == pytest.approx(mass, abs=1e-6)


def test_without_truncation_the_mass_is_exactly_one():
    _, log_mass = truncate(jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (4, 1000))))
    assert (log_mass == 0).all()


@pytest.mark.parametrize(
    ("options", "ids"),
    [({"top_k": 2}, {1, 2}), ({"top_p": 0.5}, {1, 2, 3}), ({"top_p": 0.3}, {1, 2}), ({"min_p": 0.6}, {1, 2, 3, 4, 5})],
)
def test_ties_keep_lower_ids(options, ids):
    # Five equal tokens of 0.18 behind one of 0.1: two make 0.36, three 0.54; min-p has no boundary inside a tie.
    log_probs = jnp.log(jnp.array([[0.1, 0.18, 0.18, 0.18, 0.18, 0.18]]))
    kept, _ = truncate(log_probs, **options)
    assert set(np.flatnonzero(kept[0])) == ids


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_set(p):
    logits = jax.random.normal(jax.random.key(3), (6, 5000)) * jnp.array([0.1, 0.5, 1, 2, 4, 8])[:, None]
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    kept = np.asarray(top_p_mask(jnp.asarray(probs, jnp.float32), p))
    for row, mask in zip(probs, kept, strict=True):
        assert mask.any()
        assert row[mask].min() > row[~mask].max()
        assert row[mask].sum() > p - 1e-5
        assert row[mask].sum() - row[mask].min() < p + 1e-5


def test_extremes_stay_finite():
    # One token has everything: the others underflow to probability 0.
    log_probs = scale(jnp.zeros((1, 50)).at[0, 7].set(1e4), 1.0)
    cases: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.9}, {"top_p": 1 - 1e-7}, {"min_p": 0.1}]
    for options in cases:
        kept, log_mass = truncate(log_probs, **options)
        assert kept[0, 7]
        assert float(log_mass[0]) == pytest.approx(0, abs=1e-6)
    uniform = scale(jnp.zeros((1, 64)), 0.1)
    assert int(top_p_mask(jnp.exp(uniform), 0.5).sum()) == 32
    assert int(top_k_mask(uniform, 3).sum()) == 3
    assert int(min_p_mask(uniform, 1.0).sum()) == 64


def test_scale_is_float32_and_zero_means_one():
    logits = jnp.array([[1.0, 2.0, 4.0]], jnp.bfloat16)
    assert scale(logits, 0.5).dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(scale(logits, 0.5)), jax.nn.softmax(jnp.array([[2.0, 4.0, 8.0]])), rtol=1e-6)
    np.testing.assert_array_equal(scale(logits, 0.0), scale(logits, 1.0))


def test_draws_follow_the_claimed_distribution():
    # 40,000 draws: a share's standard deviation is below 0.0025.
    kept, log_mass = truncate(jnp.log(PROBS)[None], top_p=0.8)
    keys = jax.random.split(jax.random.key(5), 40_000)
    rows = (len(keys), len(PROBS))
    drawn = perturb(jnp.broadcast_to(jnp.log(PROBS)[None], rows), jnp.broadcast_to(kept, rows), keys).argmax(-1)
    shares = np.bincount(drawn, minlength=5) / len(keys)
    np.testing.assert_allclose(shares, np.where(kept[0], PROBS / np.exp(log_mass[0]), 0), atol=0.01)
    assert shares[2] == shares[3] == 0


@pytest.mark.parametrize(
    "options",
    [{"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.2}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.7, "min_p": 0.1}],
)
def test_nothing_sorts_the_vocabulary(options):
    compiled = jax.jit(lambda x: truncate(x, **options)).lower(jnp.zeros((2, 4096))).compile()
    assert not re.search(r"\bsort\(", str(compiled.as_text()))


@pytest.mark.parity
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(
    "options",
    [{"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.2}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.7, "min_p": 0.1}],
)
def test_transformers_keeps_the_same_tokens(options, temperature):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    warpers = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    logits = 3 * np.random.default_rng(0).normal(size=(16, 1000)).astype(np.float32)
    scores = logits_process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    for name, value in options.items():
        scores = warpers[name](value)(None, scores)
    log_probs = scale(logits, temperature)
    kept, log_mass = truncate(log_probs, **options)
    np.testing.assert_array_equal(kept, np.isfinite(scores.numpy()))
    expected = torch.log_softmax(scores, -1).numpy()
    np.testing.assert_allclose((log_probs - log_mass[:, None])[kept], expected[kept], atol=1e-5)
