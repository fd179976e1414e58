"""Preference losses against values and derivatives derived here by hand."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    COUPLED_LOSSES,
    DIVERGENCES,
    MARGIN_LOSSES,
    PREFERENCE_LOSSES,
    PreferenceLogps,
    preference_options,
)

# Two pairs: log-ratios a, b, lengths, and the chosen completions' log-probs. d = a - b is 1.5 and -0.5.
LOGPS = PreferenceLogps(
    jnp.array([1.0, -2.0]),
    jnp.array([-0.5, -1.5]),
    jnp.array([4.0, 2.0]),
    jnp.array([5.0, 3.0]),
    jnp.array([-6.0, -5.0]),
)
BETA = 0.2


def s(x):
    return 1 / (1 + math.exp(-x))


def ls(x):
    return math.log(s(x))


def slope(x):
    return s(x) * s(-x)


# With beta = 0.2: beta a = 0.2 and -0.4, beta b = -0.1 and -0.3, beta d = 0.3 and -0.1; 1 / (2 beta) = 2.5.
# Means per token: a / |chosen| - b / |rejected| = 1/4 + 0.5/5 = 0.35 and -2/2 + 1.5/3 = -0.5.
# exo at m = beta d: p (log p - log 0.9) + q (log q - log 0.1).
# discopop with tau = 0.05: m = sigmoid(0.3 / 0.05) = sigmoid(6), and sigmoid(-2).
VALUES = {
    "sigmoid": ({}, [-ls(0.3), -ls(-0.1)]),
    "sigmoid, smoothed": (
        {"label_smoothing": 0.1},
        [-0.9 * ls(0.3) - 0.1 * ls(-0.3), -0.9 * ls(-0.1) - 0.1 * ls(0.1)],
    ),
    "robust": (
        {"label_smoothing": 0.1},
        [(-0.9 * ls(0.3) + 0.1 * ls(-0.3)) / 0.8, (-0.9 * ls(-0.1) + 0.1 * ls(0.1)) / 0.8],
    ),
    "hinge": ({}, [1 - 0.3, 1 + 0.1]),
    "ipo": ({}, [(0.35 - 2.5) ** 2, (-0.5 - 2.5) ** 2]),
    "ipo_sum": ({}, [(1.5 - 2.5) ** 2, (-0.5 - 2.5) ** 2]),
    "exo_pair": (
        {"label_smoothing": 0.1},
        [s(m) * (ls(m) - math.log(0.9)) + s(-m) * (ls(-m) - math.log(0.1)) for m in (0.3, -0.1)],
    ),
    "nca_pair": (
        {},
        [-ls(0.2) - (ls(-0.2) + ls(0.1)) / 2, -ls(-0.4) - (ls(0.4) + ls(0.3)) / 2],
    ),
    "bco_pair": ({}, [-ls(0.2) - ls(0.1), -ls(-0.4) - ls(0.3)]),
    "sppo_hard": ({}, [(1 - 2.5) ** 2 + (-0.5 + 2.5) ** 2, (-2 - 2.5) ** 2 + (-1.5 + 2.5) ** 2]),
    "apo_zero": ({}, [1 - s(0.2) + s(-0.1), 1 - s(-0.4) + s(-0.3)]),
    "apo_down": ({}, [s(0.2) + 1 - s(0.3), s(-0.4) + 1 - s(-0.1)]),
    "discopop": (
        {},
        [
            -ls(0.3) * (1 - s(6)) + math.exp(-0.3) * s(6),
            -ls(-0.1) * (1 - s(-2)) + math.exp(0.1) * s(-2),
        ],
    ),
    "sft": ({}, [6.0, 5.0]),
    "sigmoid_norm": ({}, [-ls(0.07), -ls(-0.1)]),
}

# Derivatives of the first pair's loss by its chosen and its rejected log-ratio.
# exo: p' = p q, and p' + q' = 0, so that only the logarithms are left: p q (m - log(0.9 / 0.1)).
# discopop: m' = m (1 - m) / tau, z' = 1: m' (log sigmoid(z) + exp(-z)) - (1 - m) sigmoid(-z) - m exp(-z).
EXO = slope(0.3) * (0.3 - math.log(9))
DISCO = slope(6) / 0.05 * (ls(0.3) + math.exp(-0.3)) - s(-6) * s(-0.3) - s(6) * math.exp(-0.3)
ROBUST = (-0.9 * s(-0.3) - 0.1 * s(0.3)) / 0.8
SMOOTHED = -0.9 * s(-0.3) + 0.1 * s(0.3)
DERIVATIVES = {
    "sigmoid": (-BETA * s(-0.3), BETA * s(-0.3)),
    "sigmoid, smoothed": (BETA * SMOOTHED, -BETA * SMOOTHED),
    "robust": (BETA * ROBUST, -BETA * ROBUST),
    "hinge": (-BETA, BETA),
    "ipo": (2 * (0.35 - 2.5) / 4, -2 * (0.35 - 2.5) / 5),
    "ipo_sum": (2 * (1.5 - 2.5), -2 * (1.5 - 2.5)),
    "exo_pair": (BETA * EXO, -BETA * EXO),
    "nca_pair": (BETA * (-s(-0.2) + s(0.2) / 2), BETA * s(-0.1) / 2),
    "bco_pair": (-BETA * s(-0.2), BETA * s(-0.1)),
    "sppo_hard": (2 * (1 - 2.5), 2 * (-0.5 + 2.5)),
    "apo_zero": (-BETA * slope(0.2), BETA * slope(-0.1)),
    "apo_down": (BETA * (slope(0.2) - slope(0.3)), BETA * slope(0.3)),
    "discopop": (BETA * DISCO, -BETA * DISCO),
    "sft": (0.0, 0.0),
    "sigmoid_norm": (-BETA * s(-0.07) / 4, BETA * s(-0.07) / 5),
}


def bound(name: str):
    return partial(PREFERENCE_LOSSES[name.split(",")[0]], beta=BETA, **VALUES[name][0])


def noisy(name: str) -> dict[str, float]:
    return {"label_smoothing": 0.1} if "label_smoothing" in preference_options(name) else {}


def test_every_loss_is_in_the_tables():
    assert {name.split(",")[0] for name in VALUES} == {name.split(",")[0] for name in DERIVATIVES}
    # Those that sort the batch have tables of their own, in test_transport.py.
    assert {name.split(",")[0] for name in VALUES} == PREFERENCE_LOSSES.keys() - COUPLED_LOSSES


@pytest.mark.parametrize("wrap", [jax.jit, lambda loss: loss], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", VALUES)
def test_values(name, wrap):
    np.testing.assert_allclose(wrap(bound(name))(LOGPS), VALUES[name][1], rtol=2e-6)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name):
    def first(a, b):
        chosen, rejected = (jnp.stack([x, jnp.float32(-1)]) for x in (a, b))
        return bound(name)(LOGPS._replace(chosen_log_ratios=chosen, rejected_log_ratios=rejected))[0]

    np.testing.assert_allclose(jax.grad(first, (0, 1))(1.0, -0.5), DERIVATIVES[name], rtol=5e-6, atol=1e-8)


FAR = jnp.array([1.0, 100.0, 1e4])
# All signs and sizes of two log-ratios; completions of 3 tokens, and empty ones.
GRID = [grid.ravel() for grid in jnp.meshgrid(*[jnp.concatenate([-FAR, FAR])] * 2)]
CASES = [(name, "reverse_kl") for name in PREFERENCE_LOSSES]
CASES += [(name, kind) for name in sorted(MARGIN_LOSSES) for kind in DIVERGENCES if kind != "reverse_kl"]


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("length", [0.0, 3.0])
def test_extreme_log_ratios_stay_finite(name, kind, length):
    lengths = jnp.full(GRID[0].shape, length)
    options = noisy(name) | ({"discopop_tau": 2.0} if name == "discopop" else {})

    def total(a, b, logps):
        chosen, rejected = (DIVERGENCES[kind](x, alpha=0.5) for x in (a, b))
        pairs = PreferenceLogps(chosen, rejected, lengths, lengths, logps, -logps)
        return PREFERENCE_LOSSES[name](pairs, beta=0.1, **options).sum()

    value, grads = jax.value_and_grad(total, (0, 1, 2))(*GRID, GRID[0])
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)
    # Not even the norm of the gradient overflows.
    assert np.isfinite(np.float32(sum(jnp.square(grad).sum() for grad in grads)))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_no_pairs_cost_nothing(name):
    assert PREFERENCE_LOSSES[name](PreferenceLogps(*(jnp.zeros((6, 0)))), beta=0.1, **noisy(name)).shape == (0,)


# What grows with the margin alone never costs more; the squares' target and discopop's bump near 0 lie elsewhere.
@pytest.mark.parametrize("name", sorted(MARGIN_LOSSES - {"sft", "exo_pair", "discopop"}))
def test_a_better_margin_never_costs_more(name):
    margins = jnp.linspace(-20, 4.9, 50)
    zeros, ones = jnp.zeros(50), jnp.ones(50)
    values = PREFERENCE_LOSSES[name](PreferenceLogps(margins, zeros, ones, ones), beta=0.1)
    assert (np.diff(values) < 0).all()


def test_label_smoothing_that_is_not_there():
    smoothed = {"sigmoid", "robust", "exo_pair", *COUPLED_LOSSES}
    assert {name for name in PREFERENCE_LOSSES if noisy(name)} == smoothed
    with pytest.raises(TypeError):
        PREFERENCE_LOSSES["ipo"](LOGPS, beta=0.1, label_smoothing=0.1)


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        PREFERENCE_LOSSES["sigmoid"](LOGPS._replace(chosen_log_ratios=jnp.zeros(3)), beta=0.1)
    with pytest.raises(ValueError, match="'sft' needs chosen_logps"):
        PREFERENCE_LOSSES["sft"](LOGPS._replace(chosen_logps=None), beta=0.1)


# f'(exp a) at a = 1 and -2, and its derivative by a there, which is exp(a) f''(exp a).
DIVERGED = {
    "reverse_kl": ([1, -2], [1, 1]),
    "forward_kl": ([1 - math.exp(-1), 1 - math.exp(2)], [math.exp(-1), math.exp(2)]),
    "js_divergence": ([math.log(2) + ls(1), math.log(2) + ls(-2)], [s(-1), s(2)]),
    # (exp(-0.7 a) - 1) / -0.7
    "alpha_divergence": ([(1 - math.exp(-0.7)) / 0.7, (1 - math.exp(1.4)) / 0.7], [math.exp(-0.7), math.exp(1.4)]),
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences(kind):
    diverge = partial(DIVERGENCES[kind], alpha=0.3)
    values, slopes = DIVERGED[kind]
    np.testing.assert_allclose(diverge(jnp.array([1.0, -2.0])), values, rtol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(diverge))(jnp.array([1.0, -2.0])), slopes, rtol=2e-6)
    assert diverge(jnp.zeros(1))[0] == pytest.approx(0, abs=1e-7)


def test_alpha_divergence_of_order_1_is_the_reverse_kl():
    log_ratios = jnp.array([-3.0, 0.5])
    np.testing.assert_array_equal(DIVERGENCES["alpha_divergence"](log_ratios, alpha=1.0), log_ratios)
    np.testing.assert_allclose(DIVERGENCES["alpha_divergence"](log_ratios, alpha=1.001), log_ratios, rtol=2e-3)
