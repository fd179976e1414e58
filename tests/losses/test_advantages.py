"""Advantages, GAE and whitening against golden numbers and sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    ADVANTAGES,
    batch_advantages,
    discounted_returns,
    gae,
    group_advantages,
    leave_one_out_advantages,
    length_mask,
    normalize_then_sum,
    overlong_penalty,
    sum_scores,
    token_rewards,
    unscaled_advantages,
    whiten,
    without_signal,
)

NAN = float("nan")
# Group 2 has 1, 2, 6 (and one None), group 0 has 0.1 three times, group 1 one score, group 3 none; members are mixed.
SCORES = np.array([1.0, 0.1, 2.0, NAN, 0.1, 5.0, 6.0, NAN, 0.1])
GROUPS = np.array([2, 0, 2, 2, 0, 1, 2, 3, 0])
CENTRED = np.array([-2.0, 0, -1.0, 0, 0, 0, 3.0, 0, 0])
# Of 1, 2, 6 with Bessel's correction: sqrt((4 + 1 + 9) / 2); of all seven scores.
GROUP_STD = 7**0.5
ALL_STD = np.std(SCORES[~np.isnan(SCORES)], ddof=1)
OUTCOMES = {
    "group": (group_advantages, CENTRED / (GROUP_STD + 1e-4)),
    "batch": (batch_advantages, CENTRED / (ALL_STD + 1e-4)),
    "none": (unscaled_advantages, CENTRED),
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; one alone has nothing to be compared with.
    "leave_one_out": (leave_one_out_advantages, np.array([-3.0, 0, -1.5, 0, 0, 0, 4.5, 0, 0])),
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", OUTCOMES)
def test_one_advantage_per_completion(name, wrap):
    rule, wanted = OUTCOMES[name]
    got = np.asarray(wrap(rule)(SCORES, GROUPS))
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    # Not even the rounding of three times 0.1 may be left, to be divided by a tiny deviation.
    np.testing.assert_array_equal(got[wanted == 0], 0)


@pytest.mark.parametrize("name", OUTCOMES)
def test_large_scores_and_shuffled_members(name):
    """In float32 at 1e4, in any order of members and any numbering of groups."""
    draw = np.random.default_rng(0)
    scores = np.concatenate([draw.normal(1e4, 1, 12), [NAN]]).astype(np.float32)
    groups = np.concatenate([draw.integers(0, 4, 12), [0]])
    order, numbers = draw.permutation(13), np.array([3, 1, 7, 0])
    rule = OUTCOMES[name][0]
    got = np.asarray(rule(scores, groups))
    np.testing.assert_allclose(rule(scores[order], numbers[groups[order]]), got[order], rtol=1e-4, atol=1e-5)
    with jax.enable_x64(True):
        exact = rule(scores.astype(np.float64), groups)
        assert exact.dtype == jnp.float64
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)
    assert np.abs(got).max() > 0.5


@pytest.mark.parametrize("name", OUTCOMES)
def test_nothing_scored(name):
    np.testing.assert_array_equal(OUTCOMES[name][0](np.full(3, NAN), np.array([0, 0, 1])), 0)


def test_groups_without_signal():
    """Group 2 differs; 0.1 three times, one score, and no score have nothing to say."""
    np.testing.assert_array_equal(without_signal(SCORES, GROUPS), GROUPS != 2)
    assert not np.any(without_signal(np.array([1.0, 1.0 + 1e-6], np.float32), np.array([0, 0])))


def test_several_rewards():
    scores = np.array([[1.0, 2.0], [NAN, 3.0], [NAN, NAN], [4.0, NAN]])
    np.testing.assert_allclose(sum_scores(scores, np.array([1.0, 0.5])), [2.0, 1.5, NAN, 4.0], rtol=1e-6)


def test_normalize_then_sum():
    """Two groups of three; reward 0 is 0, 1, 2 and 5, 5, 5; reward 1 is 10, 30, None and None, 7, None.

    By group: -1, 0, 1 over (1 + 1e-4), and 0, 0, 0; -10, 10 over (sqrt(200) + 1e-4), and 0 for one alone. The last
    completion has no score at all, so it counts nowhere.
    """
    scores = np.array([[0.0, 10.0], [1.0, 30.0], [2.0, NAN], [5.0, NAN], [5.0, 7.0], [NAN, NAN]])
    z, y = 1 / (1 + 1e-4), 10 / (200**0.5 + 1e-4)
    sums = np.array([-z - 0.5 * y, 0.5 * y, z, 0.0, 0.0])
    wanted = (sums - sums.mean()) / (sums.std(ddof=1) + 1e-4)
    got = normalize_then_sum(scores, np.array([0, 0, 0, 1, 1, 1]), np.array([1.0, 0.5]))
    np.testing.assert_allclose(got, [*wanted, 0.0], rtol=1e-5, atol=1e-7)


def test_overlong_penalty():
    """L_max 20, L_cache 4: free up to 16, then a quarter more each token."""
    got = overlong_penalty(np.array([0, 15, 16, 17, 19, 20, 21, 400]), max_length=20, cache=4)
    np.testing.assert_allclose(got, [0, 0, 0, -0.25, -0.75, -1, -1, -1])
    for cache in (0, 21):
        with pytest.raises(ValueError, match=f"cache={cache} must lie in"):
            overlong_penalty(np.array([1]), max_length=20, cache=cache)


# Ragged: three tokens, none, one, four.
LENGTHS = np.array([3, 0, 1, 4])
MASK = np.asarray(length_mask(LENGTHS, 4))
TOKEN_SCORES = np.array([1.0, 7.0, -2.0, 0.5])
KL = np.where(MASK > 0, [[0.1, 0.2, 0.3, 0], [0] * 4, [0.4, 0, 0, 0], [0.1, -0.1, 0.2, 0.0]], NAN)
# -0.5 KL, and the score at the last token.
REWARDS = np.array([[-0.05, -0.1, 0.85, 0], [0] * 4, [-2.2, 0, 0, 0], [-0.05, 0.05, -0.1, 0.5]])


def test_token_rewards():
    np.testing.assert_array_equal(MASK, [[1, 1, 1, 0], [0] * 4, [1, 0, 0, 0], [1] * 4])
    np.testing.assert_allclose(token_rewards(TOKEN_SCORES, KL, MASK, kl_coef=0.5), REWARDS, rtol=1e-6, atol=1e-7)
    # A tool's tokens inside the completion get nothing, and the score waits for the last one that counts.
    got = token_rewards(np.array([1.0]), np.zeros((1, 5)), np.array([[1, 0, 0, 1, 0]]), kl_coef=0.5)
    np.testing.assert_array_equal(got, [[0, 0, 0, 1, 0]])


def test_gae_golden():
    """FORMULAS: r = [0, 0, 1], V = [.5, .4, .3], γ = 1, λ = .95."""
    rewards, values = np.array([[0.0, 0.0, 1.0]]), np.array([[0.5, 0.4, 0.3]])
    advantages, returns = gae(rewards, values, np.ones((1, 3)), gamma=1.0, gae_lambda=0.95)
    np.testing.assert_allclose(advantages, [[0.43675, 0.565, 0.7]], rtol=1e-5)
    np.testing.assert_allclose(returns, [[0.93675, 0.965, 1.0]], rtol=1e-5)


def by_definition(rewards, values, gamma, gae_lambda):
    """One completion: A_t = sum over l of (γ λ)^l δ_{t+l}."""
    after = np.append(values[1:], 0)
    deltas = rewards + gamma * after - values
    rest = [(gamma * gae_lambda) ** np.arange(len(deltas) - t) @ deltas[t:] for t in range(len(deltas))]
    return np.array(rest)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
def test_gae_on_ragged_completions(wrap, carry):
    """NaN stands at every padded place: nothing is read there."""
    draw = np.random.default_rng(0)
    lengths, steps = np.array([5, 0, 1, 8, 3]), 8
    mask = np.arange(steps) < lengths[:, None]
    rewards, values = (np.where(mask, draw.normal(size=mask.shape), NAN) for _ in range(2))
    run = wrap(lambda *arrays: gae(*arrays, gamma=0.9, gae_lambda=0.8, carry=carry))
    with jax.enable_x64(True):
        advantages, returns = run(rewards, values, mask)
        assert advantages.dtype == returns.dtype == jnp.float64
    for i, n in enumerate(lengths):
        wanted = by_definition(rewards[i, :n], values[i, :n], 0.9, 0.8)
        np.testing.assert_allclose(advantages[i], np.append(wanted, np.zeros(steps - n)), rtol=1e-12)
        np.testing.assert_allclose(
            returns[i], np.append(wanted + values[i, :n], np.zeros(steps - n)), rtol=1e-12, atol=1e-15
        )


def test_gae_around_a_tool():
    """Tokens 0, 1, 4, 5 count. An end inside: two completions of two tokens; carried: one of four."""
    draw = np.random.default_rng(0)
    mask = np.array([1, 1, 0, 0, 1, 1, 0]) > 0
    rewards, values = draw.normal(size=7), draw.normal(size=7)
    both = {
        carry: gae(rewards[None], values[None], mask[None], gamma=0.9, gae_lambda=0.8, carry=carry)[0][0]
        for carry in (False, True)
    }
    joined = by_definition(rewards[mask], values[mask], 0.9, 0.8)
    np.testing.assert_allclose(np.asarray(both[True])[mask], joined, rtol=1e-5)
    ended = np.concatenate([by_definition(rewards[i : i + 2], values[i : i + 2], 0.9, 0.8) for i in (0, 4)])
    np.testing.assert_allclose(np.asarray(both[False])[mask], ended, rtol=1e-5)
    assert np.abs(joined - ended)[:2].min() > 0.05


def test_discounted_returns():
    """γ = 0.5: 0.85; -0.1 + 0.425; -0.05 + 0.1625."""
    got = discounted_returns(REWARDS, MASK, gamma=0.5)
    np.testing.assert_allclose(got[0], [0.1125, 0.325, 0.85, 0], rtol=1e-5)
    np.testing.assert_allclose(discounted_returns(REWARDS, MASK, gamma=1.0)[3], [0.4, 0.45, 0.4, 0.5], rtol=1e-5)


GRID = np.arange(1.2, 2.05, 0.1).reshape(3, 3)


def test_whitening_golden():
    """FORMULAS: the first row, mean kept, for both variances; eps is inside the root."""
    bessel = whiten(GRID, np.ones((3, 3)), shift_mean=False)
    population = whiten(GRID, np.ones((3, 3)), shift_mean=False, bessel=False)
    np.testing.assert_allclose(bessel[0], [0.1394, 0.5046, 0.8697], atol=5e-5)
    np.testing.assert_allclose(population[0], [0.0508, 0.4381, 0.8254], atol=5e-5)
    # Shifted, the same less the mean, 1.6.
    np.testing.assert_allclose(whiten(GRID, np.ones((3, 3)))[0], bessel[0] - 1.6, atol=1e-5)
    wide = whiten(GRID, np.ones((3, 3)), epsilon=0.3)
    np.testing.assert_allclose(wide, (GRID - 1.6) / (GRID.var(ddof=1) + 0.3) ** 0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_reads_only_what_counts(shift_mean):
    mask = np.array([[1, 1, 1, 0, 0], [0] * 5, [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    x = np.where(mask, np.random.default_rng(0).normal(50, 3, mask.shape), NAN)
    got = jax.jit(lambda x: whiten(x, mask, shift_mean=shift_mean))(x)
    real = x[mask > 0]
    wanted = (real - real.mean()) / real.std(ddof=1) + (0 if shift_mean else real.mean())
    np.testing.assert_allclose(np.asarray(got)[mask > 0], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(got)[mask == 0], 0)


def test_whitening_of_none_of_one_and_of_equals():
    np.testing.assert_array_equal(whiten(np.full((2, 3), NAN), np.zeros((2, 3))), 0)
    one = np.array([[0, 1, 0]])
    for bessel in (True, False):
        np.testing.assert_array_equal(whiten(np.full((1, 3), 4.0), one, bessel=bessel), 0)
        np.testing.assert_array_equal(whiten(np.full((1, 3), 4.0), one, bessel=bessel, shift_mean=False), 4 * one)
        np.testing.assert_allclose(whiten(np.full((2, 3), 2.5), np.ones((2, 3)), bessel=bessel), 0)


def test_reinforce_plus_plus():
    """Returns of the token rewards, γ = 0.5, whitened over all eight tokens together; a None leaves with its tokens."""
    # Of completion 3, from its end: 0.5; -0.1 + 0.25; 0.05 + 0.075; -0.05 + 0.0625.
    returns = np.array([0.1125, 0.325, 0.85, -2.2, 0.0125, 0.125, 0.15, 0.5])
    wanted = np.zeros((4, 4))
    wanted[MASK > 0] = (returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8)
    advantages = ADVANTAGES["reinforce_plus_plus"]
    got = advantages(TOKEN_SCORES, np.zeros(4, int), KL, MASK, kl_coef=0.5, gamma=0.5)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    got = advantages(np.array([1.0, 7.0, NAN, 0.5]), np.zeros(4, int), KL, MASK, kl_coef=0.5, gamma=0.5)
    left = np.delete(returns, 3)
    np.testing.assert_allclose(got[0, :3], (left[:3] - left.mean()) / left.std(ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(got[2], 0)


def test_reinforce_plus_plus_baseline():
    """Scores 1, 7, -2 are a group of mean 2, and 0.5 is one alone; whitened over 3 + 0 + 1 + 4 tokens."""
    got = ADVANTAGES["reinforce_plus_plus_baseline"](TOKEN_SCORES, np.array([0, 0, 0, 3]), KL, MASK)
    tokens = np.array([-1, -1, -1, -4, 0, 0, 0, 0.0])
    wanted = (tokens - tokens.mean()) / tokens.std(ddof=1)
    np.testing.assert_allclose(np.asarray(got)[MASK > 0], wanted, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(got)[MASK == 0], 0)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_registry(name):
    """One signature: the KL comes off the score, padding is 0, and nothing is differentiated."""
    scores, groups = np.array([1.0, 7.0, -2.0, 0.5]), np.array([0, 0, 0, 0])
    wide = [np.pad(x, [(0, 0), (0, 3)], constant_values=value) for x, value in ((KL, NAN), (MASK, 0))]

    def run(scores, kl, mask):
        return ADVANTAGES[name](scores, groups, kl, mask, kl_coef=0.5)

    got = jax.jit(run)(scores, KL, MASK)
    np.testing.assert_allclose(jax.jit(run)(scores, *wide), np.pad(got, [(0, 0), (0, 3)]), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(got)[MASK == 0], 0)
    np.testing.assert_array_equal(jax.grad(lambda s: run(s, KL, MASK).sum())(scores), 0)
    np.testing.assert_array_equal(run(np.full(4, NAN), KL, MASK), 0)
    if name in OUTCOMES:
        rule = OUTCOMES[name][0]
        after = scores - 0.5 * np.nansum(KL, 1)
        np.testing.assert_allclose(got, np.where(MASK > 0, rule(after, groups)[:, None], 0), rtol=1e-5)
        with pytest.raises(ValueError, match=r"gamma=0\.9 has no meaning"):
            ADVANTAGES[name](scores, groups, KL, MASK, gamma=0.9)
