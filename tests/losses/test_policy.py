"""Policy losses token by token, ratio levels packed and padded, extremes, and what is a constant to the gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    AGGREGATIONS,
    CISPO_BOUNDS,
    POLICY_LOSSES,
    RATIO_LEVELS,
    PolicyTerms,
    aggregate,
    clip_metrics,
    policy_options,
)

RATIOS = np.array([1.5, 0.5, 1.5, 0.5, 1.1, 1.25])
ADVANTAGES = np.array([2.0, 2.0, -1.0, -1.0, 1.0, 0.0])
LOGPS = np.array([-1.0, -0.5, -2.0, -0.1, -3.0, -1.5])
ASYMMETRIC = {"epsilon_low": 0.2, "epsilon_high": 0.28}
# -min(w A, clip(w) A): -min(3, 2.56), -min(1, 1.6), -min(-1.5, -1.28), -min(-0.5, -0.8), -1.1, 0.
CLIPPED = [-2.56, -1.0, 1.5, 0.8, -1.1, 0.0]
CLIPPED_SLOPES = [0.0, -1.0, 1.5, 0.0, -1.1, 0.0]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# name: options, loss, its derivative by the log-ratio, its derivative by log p, clipped low, high, capped.
ZERO, LOW, HIGH = [0.0] * 6, [0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]
HAND = {
    "clip": (ASYMMETRIC, CLIPPED, CLIPPED_SLOPES, ZERO, LOW, HIGH, None),
    "clip, symmetric": (
        # The sixth ratio, 1.25, would be clipped, but its advantage is 0.
        {"epsilon_low": 0.2, "epsilon_high": 0.2},
        [-2.4, -1.0, 1.5, 0.8, -1.1, 0.0],
        CLIPPED_SLOPES,
        ZERO,
        LOW,
        HIGH,
        None,
    ),
    "clip, two-sided": (
        # δ = 1.4 holds the third: -min(1.4 * -1, 1.28 * -1).
        {**ASYMMETRIC, "delta": 1.4},
        [-2.56, -1.0, 1.4, 0.8, -1.1, 0.0],
        [0.0, -1.0, 0.0, 0.0, -1.1, 0.0],
        ZERO,
        LOW,
        HIGH,
        [0, 0, 1, 0, 0, 0],
    ),
    "dual": (
        {**ASYMMETRIC, "dual_clip": 1.4},
        [-2.56, -1.0, 1.4, 0.8, -1.1, 0.0],
        [0.0, -1.0, 0.0, 0.0, -1.1, 0.0],
        ZERO,
        LOW,
        HIGH,
        [0, 0, 1, 0, 0, 0],
    ),
    "cispo": (
        # w ≤ 1.2, the sixth included: 1.2 * 2, 0.5 * 2, 1.2 * -1, 0.5 * -1, 1.1, 0; times -log p.
        {"epsilon_low": 0.2, "epsilon_high": 1.2},
        [2.4, 0.5, -2.4, -0.05, 3.3, 0.0],
        ZERO,
        [-2.4, -1.0, 1.2, 0.5, -1.1, 0.0],
        None,
        HIGH,
        None,
    ),
    "cispo, relative": (
        {**ASYMMETRIC, "cispo_bounds": "relative"},
        [2.56, 0.5, -2.56, -0.05, 3.3, 0.0],
        ZERO,
        [-2.56, -1.0, 1.28, 0.5, -1.1, 0.0],
        None,
        HIGH,
        None,
    ),
    "cispo, two-sided": (
        {**ASYMMETRIC, "cispo_bounds": "two_sided"},
        [2.56, 0.8, -2.56, -0.08, 3.3, 0.0],
        ZERO,
        [-2.56, -1.6, 1.28, 0.8, -1.1, 0.0],
        LOW,
        HIGH,
        None,
    ),
    "sapo": (
        # -(4 / τ) σ(τ (w - 1)) A, and its derivative -4 σ (1 - σ) w A; τ is 2 for A > 0 and 4 else.
        {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 4.0},
        [-4 * sigmoid(1.0), -4 * sigmoid(-1.0), sigmoid(2.0), sigmoid(-2.0), -2 * sigmoid(0.2), 0.0],
        [
            -12 * sigmoid(1.0) * sigmoid(-1.0),
            -4 * sigmoid(-1.0) * sigmoid(1.0),
            6 * sigmoid(2.0) * sigmoid(-2.0),
            2 * sigmoid(-2.0) * sigmoid(2.0),
            -4.4 * sigmoid(0.2) * sigmoid(-0.2),
            0.0,
        ],
        ZERO,
        None,
        None,
        None,
    ),
    "vespo": (
        # The weight w^k e^(λ (1 - w)) is w^2 e^(3 (1 - w)) for A ≥ 0 and w^3 e^(2 (1 - w)) else.
        {},
        [
            2.25 * math.exp(-1.5) * 2,
            0.25 * math.exp(1.5) * 2 * 0.5,
            3.375 * math.exp(-1.0) * -1 * 2,
            0.125 * math.exp(1.0) * -1 * 0.1,
            1.21 * math.exp(-0.3) * 3,
            0.0,
        ],
        ZERO,
        [
            -2.25 * math.exp(-1.5) * 2,
            -0.25 * math.exp(1.5) * 2,
            3.375 * math.exp(-1.0),
            0.125 * math.exp(1.0),
            -1.21 * math.exp(-0.3),
            0.0,
        ],
        None,
        None,
        None,
    ),
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", HAND)
def test_values_and_gradients(name, wrap):
    options, loss, by_log_ratio, by_logp, *bounds = HAND[name]
    policy_loss = POLICY_LOSSES[name.split(",")[0]]
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (np.log(RATIOS), ADVANTAGES, LOGPS)]
        terms = wrap(lambda *arrays: policy_loss(*arrays, **options))(*arrays)
        grads = jax.grad(lambda *arrays: policy_loss(*arrays, **options).loss.sum(), argnums=(0, 1, 2))(*arrays)
        assert terms.loss.dtype == jnp.float64
    np.testing.assert_allclose(terms.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(grads[0], by_log_ratio, rtol=1e-12)
    np.testing.assert_array_equal(grads[1], 0)
    np.testing.assert_allclose(grads[2], by_logp, rtol=1e-12)
    for got, wanted in zip(terms[1:], bounds, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(got, wanted)


def options_of(name):
    """Some value for every option that has no default, by its declared name."""
    return {option: 0.2 for option in policy_options(name) if option.startswith("epsilon")}


def test_options_by_name():
    assert set(POLICY_LOSSES) == {name.split(",")[0] for name in HAND}
    assert policy_options("clip") == ("epsilon_low", "epsilon_high", "delta")
    assert policy_options("dual") == ("epsilon_low", "epsilon_high", "dual_clip")
    assert policy_options("sapo") == ("sapo_temperature_pos", "sapo_temperature_neg")
    for bounds in CISPO_BOUNDS:
        terms = POLICY_LOSSES["cispo"](*[jnp.zeros(1)] * 3, epsilon_low=0.2, epsilon_high=0.2, cispo_bounds=bounds)
        assert terms.clipped_high is not None


def test_the_second_bounds_are_one():
    """Dual clip is two-sided clipping with δ = c: the paper's equation, the other paper's, and their gradients."""
    draw = np.random.default_rng(0)
    log_ratios, advantages = jnp.asarray(draw.normal(0, 2, 500)), jnp.asarray(draw.normal(0, 1, 500))

    def total(name, **bound):
        return lambda x: POLICY_LOSSES[name](x, advantages, x, **ASYMMETRIC, **bound).loss.sum()

    two_sided = jax.value_and_grad(total("clip", delta=3.0))(log_ratios)
    dual = jax.value_and_grad(total("dual", dual_clip=3.0))(log_ratios)
    plain = jax.value_and_grad(total("clip"))(log_ratios)
    np.testing.assert_allclose(two_sided[0], dual[0], rtol=1e-6)
    np.testing.assert_allclose(two_sided[1], dual[1], rtol=1e-6)
    assert plain[0] > dual[0] + 10


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_ratio_one_every_loss_is_the_policy_gradient(name):
    """The first update of a fresh buffer: -A by log p, in all, and nothing clipped."""
    bounds = options_of(name) | ({"epsilon_high": 5.0} if name == "cispo" else {})

    def total(logps):
        return POLICY_LOSSES[name](logps - LOGPS, ADVANTAGES, logps, **bounds).loss.sum()

    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(total)(jnp.asarray(LOGPS)), -ADVANTAGES, rtol=1e-12)
        terms = POLICY_LOSSES[name](jnp.zeros(6), jnp.asarray(ADVANTAGES), jnp.asarray(LOGPS), **bounds)
        assert not any(np.any(fraction) for fraction in terms[1:] if fraction is not None)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_log_ratios_of_a_hundred_stay_finite(name):
    far = jnp.array([100.0, -100.0, 100.0, -100.0, 100.0, -100.0], jnp.float32)
    advantages = jnp.array([1e3, 1e3, -1e3, -1e3, 0.0, 0.0], jnp.float32)

    def total(x):
        return POLICY_LOSSES[name](x, advantages, x, **options_of(name)).loss.sum()

    value, grads = jax.value_and_grad(total)(far)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


# Lengths 3, 0, 1, 5: `[n, steps]`, and the same packed into two rows with padding between.
LENGTHS = np.array([3, 0, 1, 5])
PADDED = np.where(np.arange(5) < LENGTHS[:, None], np.arange(4)[:, None], -1)
PACKED = np.array([[3, 3, 3, 3, 3, -1, -1], [2, 0, 0, 0, -1, -1, -1]])
STEPS = np.array([[0, 1, 2, 3, 4, 0, 0], [0, 0, 1, 2, 0, 0, 0]])


def packed(x):
    """`[n, steps]` in the packed places, garbage at padding."""
    return np.where(PACKED >= 0, x[np.maximum(PACKED, 0), STEPS], 1e4)


def token_case():
    draw = np.random.default_rng(1)
    logps = -draw.gamma(2.0, 1.0, (4, 5))
    return logps, logps + draw.normal(0, 0.3, (4, 5)), draw.normal(0, 1, (4, 5))


def test_ratio_levels_by_hand():
    """Log-ratios 0.1, 0.2, 0.6 of completion 0, mean 0.3, sum 0.9; 0.5 of completion 2; 0.1 five times of 3."""
    log_ratios = np.array([[0.1, 0.2, 0.6, 9, 9], [9] * 5, [0.5, 9, 9, 9, 9], [0.1] * 5])
    wanted = {
        "token": [[0.1] * 5 + [0, 0], [0.5, 0.1, 0.2, 0.6, 0, 0, 0]],
        "sequence": [[0.1] * 5 + [0, 0], [0.5, 0.3, 0.3, 0.3, 0, 0, 0]],
        "sequence_token": [[0.1] * 5 + [0, 0], [0.5, 0.3, 0.3, 0.3, 0, 0, 0]],
        "sequence_sum": [[0.5] * 5 + [0, 0], [0.5, 0.9, 0.9, 0.9, 0, 0, 0]],
    }
    # Of the sum over tokens of (step + 1) * log-ratio, by each log-prob; old log-probs get nothing.
    slopes = {
        "token": [[1, 2, 3, 4, 5, 0, 0], [1, 1, 2, 3, 0, 0, 0]],
        "sequence": [[3] * 5 + [0, 0], [1, 2, 2, 2, 0, 0, 0]],
        "sequence_token": [[1, 2, 3, 4, 5, 0, 0], [1, 1, 2, 3, 0, 0, 0]],
        "sequence_sum": [[15] * 5 + [0, 0], [1, 6, 6, 6, 0, 0, 0]],
    }
    assert set(wanted) == set(RATIO_LEVELS)
    old = packed(np.zeros((4, 5)))
    for name, level in RATIO_LEVELS.items():
        value, pull = jax.vjp(lambda p, q, level=level: level(p, q, PACKED, 4), packed(log_ratios) + old, old)
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
        by_policy, by_old = pull(jnp.asarray(STEPS + 1, value.dtype))
        np.testing.assert_allclose(by_policy, slopes[name], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(by_old, 0)


@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_packed_and_padded_agree(name, level):
    """The loss and its gradient, for every loss at every level, in float64."""
    logps, old_logps, advantages = token_case()

    def loss(logps, old_logps, advantages, completions):
        log_ratios = RATIO_LEVELS[level](logps, old_logps, completions, 4)
        terms = POLICY_LOSSES[name](log_ratios, advantages, logps, **options_of(name))
        return aggregate(AGGREGATIONS["grpo"], terms.loss, completions, 4, total=4.0)

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss))
        padded = run(logps, old_logps, advantages, PADDED)
        other = run(packed(logps), packed(old_logps), packed(advantages), PACKED)
    assert abs(float(padded[0])) > 1e-3
    np.testing.assert_allclose(other[0], padded[0], rtol=1e-12)
    there = np.where(PACKED >= 0, np.asarray(padded[1])[np.maximum(PACKED, 0), STEPS], 0)
    np.testing.assert_allclose(other[1], there, rtol=1e-11, atol=1e-15)
    assert np.asarray(padded[1])[PADDED < 0].any() == 0


def test_gspo_token_has_gspo_gradient_where_advantages_are_shared():
    logps, old_logps, advantages = token_case()

    def total(level, advantages):
        def loss(logps):
            log_ratios = RATIO_LEVELS[level](logps, old_logps, PADDED, 4)
            terms = POLICY_LOSSES["clip"](log_ratios, advantages, logps, **ASYMMETRIC)
            return aggregate(AGGREGATIONS["grpo"], terms.loss, PADDED, 4, total=4.0)

        return jax.value_and_grad(loss)(logps)

    shared = np.broadcast_to(advantages[:, :1], (4, 5))
    with jax.enable_x64(True):
        for one, other in zip(total("sequence", shared), total("sequence_token", shared), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)
        apart = total("sequence", advantages)[1] - total("sequence_token", advantages)[1]
    assert np.abs(apart).max() > 1e-2


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_fresh_buffers_have_ratio_one(level):
    logps = jnp.asarray(packed(token_case()[0]), jnp.float32)
    np.testing.assert_array_equal(RATIO_LEVELS[level](logps, logps, PACKED, 4), 0)


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_nothing_in_the_loss_is_zero(level):
    nowhere = np.full((2, 7), -1)

    def loss(logps):
        log_ratios = RATIO_LEVELS[level](logps, jnp.zeros((2, 7)), nowhere, 4)
        terms = POLICY_LOSSES["clip"](log_ratios, jnp.ones((2, 7)), logps, **ASYMMETRIC)
        return aggregate(AGGREGATIONS["grpo"], terms.loss, nowhere, 4, total=0.0)

    value, grads = jax.value_and_grad(loss)(jnp.full((2, 7), -1e30))
    assert value == 0
    np.testing.assert_array_equal(grads, 0)


def test_clip_metrics():
    """Completion 3: 2 of 5 low, 1 high; 0: 2 of 3 high; 2: its only token low; 1 is empty and counts nowhere."""
    low = jnp.array([[1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1]], jnp.float32)
    high = jnp.array([[0, 0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1, 1]], jnp.float32)
    terms = PolicyTerms(jnp.zeros((2, 7)), low, high)
    got = {name: metric.value() for name, metric in clip_metrics(terms, PACKED, 4).items()}
    assert got == pytest.approx(
        {
            "clip_ratio/low_mean": 3 / 9,
            "clip_ratio/low_min": 0.0,
            "clip_ratio/high_mean": 3 / 9,
            "clip_ratio/high_max": 2 / 3,
            "clip_ratio/region_mean": 6 / 9,
        }
    )
    by_completion = clip_metrics(terms, PACKED, 4, per_completion=True)
    assert by_completion["clip_ratio/low_mean"].value() == pytest.approx((2 / 5 + 0 + 1) / 3)
    assert clip_metrics(PolicyTerms(low), PACKED, 4) == {}
    capped = clip_metrics(PolicyTerms(low, capped=low), PACKED, 4)
    assert {name: metric.value() for name, metric in capped.items()} == pytest.approx({"clip_ratio/capped_mean": 3 / 9})
    nothing = clip_metrics(terms, np.full((2, 7), -1), 4)
    assert [metric.value() for metric in nothing.values()] == [None] * 5


def test_shapes_must_agree():
    for name in POLICY_LOSSES:
        with pytest.raises(AssertionError):
            POLICY_LOSSES[name](jnp.zeros(3), jnp.zeros(4), jnp.zeros(3), **options_of(name))
