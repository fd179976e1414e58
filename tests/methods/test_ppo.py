"""PPO: rewards to returns by hand, what the critic sees, and that no layout, split or resume changes an update."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.methods import common, ppo, sft
from jaxalign.methods.mixing import Order, Supervised
from jaxalign.methods.offline import Layout
from jaxalign.methods.online import OnlineSource, Parts
from jaxalign.methods.ppo_estimate import shape_scores
from jaxalign.methods.rollout import pack_prompts, run_passes
from jaxalign.sharding import MeshConfig, data_shards, make_mesh, param_shardings, place_batch
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.step import accumulate
from jaxalign.types import Experience, Mean, Samples
from tests.layouts import VOCAB, ragged_pairs, ragged_texts, relative, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KEY = jax.random.key(0)
SMALL: dict[str, Any] = {"num_layers": 2, "windows": (9, 9)}
WIDTH, STEPS, PROMPTS = 40, 12, 7
WHOLE = Layout(batch_size=8, micro_batch_size=8, length=64)
LAYOUTS = {
    "uneven split, long rows": (Layout(batch_size=8, micro_batch_size=3, length=256), True),
    "empty micro-batches, unshared": (Layout(batch_size=20, micro_batch_size=4, length=64), False),
}


def by_hand(**fields) -> Experience:
    """Two prompts with a completion each: 3 tokens that end, and 1 token that was cut off; junk beyond."""
    known = {
        "sampler_logps": [[-1.0, -2.0, -3.0], [-4.0, 7.0, 7.0]],
        "ref_logps": [[-1.1, -1.8, -3.3], [-4.4, 7.0, -7.0]],
        "values": [[0.5, 0.4, 0.3], [0.2, 7.0, 7.0]],
        **fields,
    }
    return Experience(
        prompts=np.ones((2, 4), np.int32),
        prompt_lengths=np.array([4, 2], np.int32),
        examples=np.arange(2),
        tokens=np.ones((2, 3), np.int32),
        lengths=np.array([3, 1], np.int32),
        finish=np.array([1, 0], np.int32),
        scores=np.array([[1.0], [2.0]]),
        fields={name: np.asarray(values, np.float32) for name, values in known.items()},
    )


def estimate(experience, carry=None, **settings):
    config = ppo.Config(**settings)
    found, metrics, after = ppo.estimate(config, experience, carry or ppo.start_carry(config))
    return found.fields, {name: metric.value() for name, metric in metrics.items()}, after


def test_rewards_to_returns_by_hand():
    """KL per token (k1) 0.1, -0.2, 0.3 and 0.4; kl_coef 0.5; γ 1, λ 0.95; the cut-off one loses 1 of its score of 2.

    Rewards -0.05, 0.1, 1 - 0.15 = 0.85 and 1 - 0.2 = 0.8. With V = 0.5, 0.4, 0.3: δ = -0.05 + 0.4 - 0.5 = -0.15,
    0.1 + 0.3 - 0.4 = 0 and 0.85 - 0.3 = 0.55, so A = 0.55, 0.95 × 0.55 = 0.5225 and -0.15 + 0.95 × 0.5225 = 0.346375.
    The other one has A = 0.8 - 0.2 = 0.6. Returns are A + V.
    """
    settings: dict[str, Any] = {"kl_coef": 0.5, "missing_eos_penalty": 1.0}
    fields, metrics, after = estimate(by_hand(), **settings, whiten_advantages="none")
    np.testing.assert_allclose(fields["advantages"], [[0.346375, 0.5225, 0.55], [0.6, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(fields["returns"], [[0.846375, 0.9225, 0.85], [0.8, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(fields["loss_mask"], [[1, 1, 1], [1, 0, 0]])
    assert after == {"kl_coef": 0.5}
    wanted = {
        "objective/kl": (0.2 + 0.4) / 2,
        "objective/non_score_reward": -0.15,
        "objective/scores": (1 + 1) / 2,
        "objective/rlhf_reward": 0.85,
        "objective/entropy": (6 + 4) / 2,
        "objective/kl_coef": 0.5,
        "reward": 1.5,
        "reward_std": np.sqrt(0.5),
        "val/num_eos_tokens": 1,
        "critic/returns/max": 0.9225,
        "critic/values/mean": 0.35,
        "critic/rewards/min": 0.8,
        "critic/vf_explained_var": 1 - 0.0365178 / 0.0076803,  # squared deviations of A over those of R
    }
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    # Mean 0.504719; squared deviations 0.0250727, 0.0003162, 0.0020504, 0.0090785: over 3 or 4, deviation 0.110330 or
    # 0.095548. Returns are those of before.
    for bessel, white in ((True, [-1.43519, 0.16116, 0.41042, 0.86361]), (False, [-1.65721, 0.1861, 0.47391, 0.99721])):
        again, _, _ = estimate(by_hand(), **settings, whiten_bessel=bessel)
        np.testing.assert_allclose(again["advantages"], [white[:3], [white[3], 0, 0]], atol=1e-4)
        np.testing.assert_array_equal(again["returns"], fields["returns"])


def test_whitened_rewards_keep_their_mean():
    """Rewards -0.05, 0.1, 0.85, 0.8: mean 0.425, deviation 0.466369; r / 0.466369 - 0.425 / 0.466369 + 0.425.

    With V = 0 and γ = 0 returns are the rewards.
    """
    fields, _, _ = estimate(
        by_hand(values=np.zeros((2, 3))), kl_coef=0.5, missing_eos_penalty=1.0, whiten_rewards=True, gamma=0.0
    )
    np.testing.assert_allclose(fields["returns"], [[-0.59351, -0.27187, 1.3363], [1.22908, 0, 0]], atol=1e-4)


def test_without_reference_the_score_is_all():
    """γ = λ = 1 and no KL: every return is the score, whatever the values and the length."""
    experience = by_hand()
    del experience.fields["ref_logps"]
    fields, metrics, _ = estimate(experience, kl_coef=0.0, gae_lambda=1.0)
    np.testing.assert_allclose(fields["returns"], [[1, 1, 1], [2, 0, 0]], rtol=1e-6)
    assert not {"objective/kl", "objective/kl_coef", "objective/non_score_reward"} & metrics.keys()
    assert metrics["objective/rlhf_reward"] == metrics["objective/scores"] == 1.5


def test_a_completion_without_a_score_is_left_out():
    """The other's advantages are whitened alone and come out as if it were the only one; its KL is still measured."""
    experience = replace(by_hand(), scores=np.array([[1.0], [np.nan]]))
    fields, metrics, _ = estimate(experience, kl_coef=0.5, score_without_eos=-1.0)
    assert all(np.isfinite(values).all() for values in fields.values())
    np.testing.assert_array_equal(fields["loss_mask"], [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(fields["advantages"][1], 0)
    alone = np.array([0.346375, 0.5225, 0.55])
    np.testing.assert_allclose(fields["advantages"][0], (alone - alone.mean()) / alone.std(ddof=1), rtol=1e-4)
    assert metrics["objective/scores"] == metrics["reward"] == 1
    assert metrics["objective/kl"] == pytest.approx(0.3) and "reward_std" not in metrics
    nothing = replace(experience, scores=np.full((2, 1), np.nan))
    fields, metrics, _ = estimate(nothing, kl_coef=0.5, whiten_rewards=True)
    assert not any(fields[name].any() for name in ("advantages", "returns", "loss_mask"))
    assert not {"reward", "objective/scores", "objective/rlhf_reward", "critic/returns/mean"} & metrics.keys()


def test_rules_for_scores():
    """Normalised, then clipped, then the rule for what did not end: a stop sequence (2) is an end."""
    scores, finish = np.array([1.0, 2.0, 6.0, np.nan]), np.array([0, 1, 2, 0])
    mean, std = 3.0, np.sqrt((4 + 1 + 9) / 2)
    carry = ppo.start_carry(ppo.Config())

    def shaped(**settings):
        return shape_scores(ppo.Config(**settings), scores, finish, carry)[0]

    np.testing.assert_allclose(shaped(normalize_scores="rollout"), (scores - mean) / std)
    clipped = [-0.5, -0.37796, 0.5, np.nan]
    np.testing.assert_allclose(shaped(normalize_scores="rollout", score_clip=0.5), clipped, atol=1e-5)
    penalised = [-1.5, -0.37796, 0.5, np.nan]
    rules: dict[str, Any] = {"normalize_scores": "rollout", "score_clip": 0.5}
    np.testing.assert_allclose(shaped(**rules, missing_eos_penalty=1.0), penalised, atol=1e-5)
    np.testing.assert_array_equal(shaped(score_without_eos=-1.0), [-1, 2, 6, np.nan])
    flat = shape_scores(ppo.Config(normalize_scores="rollout"), np.full(3, 0.1), finish[:3], carry)[0]
    np.testing.assert_allclose(flat, 0, atol=1e-6)


def test_running_moments_are_those_of_all_scores_so_far():
    config = ppo.Config(normalize_scores="running")
    draw, carry, seen = np.random.default_rng(0), ppo.start_carry(config), []
    for count in (1, 5, 0, 64):
        scores = np.append(draw.normal(40, 3, count), np.nan)
        seen += scores[:-1].tolist()
        found, moments = shape_scores(config, scores, np.ones(count + 1), carry)
        std = np.std(seen, ddof=1) if len(seen) > 1 else 0.0
        np.testing.assert_allclose(found[:-1], (scores[:-1] - np.mean(seen)) / (std + 1e-8), rtol=1e-9, atol=1e-9)
        carry = {**carry, **moments}
    assert carry["score_count"] == 70


def test_adaptive_kl_by_hand():
    """512 completions of 2 tokens, each 6 nats from the reference: KL 12, target 6, so the error is held at 0.2.

    0.15 × (1 + 0.2 × 512 / 10000) = 0.151536 for the next rollout; this one's rewards use 0.15. At KL 12 and target 13
    the error is 12 / 13 - 1 = -0.0769: 0.15 × (1 - 0.0769 × 0.0512) = 0.149409.
    """
    n, ones = 512, np.ones((512, 2), np.float32)
    experience = replace(
        by_hand(),
        prompts=np.ones((n, 4), np.int32),
        tokens=np.ones((n, 2), np.int32),
        lengths=np.full(n, 2, np.int32),
        finish=np.ones(n, np.int32),
        scores=np.zeros((n, 1)),
        fields={"sampler_logps": -ones, "ref_logps": -7 * ones, "values": 0 * ones},
    )
    settings: dict[str, Any] = {"kl_coef": 0.15, "kl_target": 6.0}
    _, metrics, after = estimate(experience, **settings)
    assert after["kl_coef"] == pytest.approx(0.151536, abs=1e-6)
    assert metrics["objective/kl"] == 12 and metrics["objective/kl_coef"] == 0.15
    assert metrics["objective/rlhf_reward"] == pytest.approx(-0.15 * 12)
    _, metrics, after = estimate(experience, carry=after, **settings)
    assert metrics["objective/rlhf_reward"] == pytest.approx(-0.151536 * 12)
    assert after["kl_coef"] == pytest.approx(0.151536 * 1.01024, abs=1e-6)
    _, _, after = estimate(experience, kl_coef=0.15, kl_target=13.0, kl_horizon=5000.0)
    assert after["kl_coef"] == pytest.approx(0.15 * (1 - 0.0769231 * 512 / 5000), abs=1e-6)


def test_each_epoch_has_an_order_of_its_own():
    config = ppo.Config(num_ppo_epochs=3, num_mini_batches=4)
    updates = ppo.schedule(config, 20, 5, np.random.default_rng(0))
    assert len(updates) == ppo.num_updates(config) == 12 and ppo.rollout_prompts(config, 5) == 20
    orders = [np.concatenate(updates[i : i + 4]) for i in (0, 4, 8)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(20))
    assert not any((orders[i] == orders[j]).all() for i, j in ((0, 1), (0, 2), (1, 2)))
    again = ppo.schedule(config, 20, 5, np.random.default_rng(0))
    np.testing.assert_array_equal(again, updates)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_ppo_epochs": 0}, "num_ppo_epochs"),
        ({"kl_estimator": "k4"}, "k1, k2, k3"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"),
        ({"missing_eos_penalty": 1.0, "score_without_eos": -1.0}, "score_without_eos"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target"),
        ({"gae_lambda": 1.5}, "gae_lambda"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"epsilon_value": 0.0}, "epsilon_value"),
        ({"target_kl": float("nan")}, "target_kl"),
        ({"kl_horizon": 50.0}, "kl_horizon=50.0 is not read here, only with kl_target"),
        ({"kl_coef": 0.0, "kl_estimator": "k3"}, "kl_estimator='k3' is not read here, only with kl_coef above 0"),
        ({"ptx_per_prompt": 2}, "ptx_per_prompt=2 is not read here, only with ptx_coef above 0"),
        ({"whiten_advantages": "none", "whiten_bessel": False}, "whiten_bessel=False is not read here"),
        ({"num_ppo_epochs": 1, "kl_coef": 0.0, "old_logps": "trainer"}, "old_logps='trainer' is not read here"),
        ({"num_ppo_epochs": 1, "target_kl": 0.1}, "target_kl=0.1 is not read here"),
        ({"logits_chunk": 0}, "logits_chunk=0 must be at least 1"),
        ({"reward_weights": ()}, "reward_weights"),
    ],
)
def test_settings_without_meaning(settings, named):
    with pytest.raises(ValueError, match=named):
        ppo.Config(**settings)


@cache
def make_models(critic: Any = "separate", dtype: Any = "float32"):
    """A policy and a critic whose head is not 0: of its own blocks (a reward model), or on the policy's."""
    config, policy = ppo.Config(critic=critic), tiny_model(dtype=dtype, **SMALL)
    scorer = tiny_model(5, dtype=dtype, lm_head=False, score_head=True, **SMALL)
    models, variables = ppo.add_critic(config, *policy, KEY, start=scorer if critic == "separate" else None)
    if critic == "shared":
        variables["policy"]["params"]["score"] = scorer[1]["params"]["score"]
    state, frozen = ppo.init(config, models, variables, optax.adam(1e-3), KEY)
    return models, state, frozen


def draw_rollout(seed=0, generations=2) -> Experience:
    """Ragged prompts and completions, a single token and the longest possible among them, and one without a score."""
    rng, n = np.random.default_rng(seed), PROMPTS * generations
    lengths = rng.integers(1, STEPS + 1, n).astype(np.int32)
    lengths[:2] = 1, STEPS
    prompt_lengths = rng.integers(1, WIDTH + 1, PROMPTS).astype(np.int32)
    scores = rng.normal(0, 1, (n, 1))
    scores[5] = np.nan
    tokens = rng.integers(1, VOCAB, (n, STEPS)) * (np.arange(STEPS) < lengths[:, None])
    prompts = rng.integers(1, VOCAB, (PROMPTS, WIDTH)) * (np.arange(WIDTH) < prompt_lengths[:, None])
    zeros = np.zeros((n, STEPS), np.float32)
    return Experience(
        prompts=prompts.astype(np.int32),
        prompt_lengths=prompt_lengths,
        examples=np.arange(PROMPTS),
        tokens=tokens.astype(np.int32),
        lengths=lengths,
        finish=(lengths < STEPS).astype(np.int32),
        scores=scores,
        fields={"sampler_logps": zeros, "log_mass": zeros},
    )


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def make_passes(config, models, frozen):
    """All passes there are; the reference is the policy with other numbers."""
    logps, values = compiled_passes(config.temperature, config.logits_chunk, models)
    away = partial(jax.tree.map, lambda x: x * 0.98)
    return {
        "values": lambda p, b: values(ppo.value_of(p, frozen), b),
        "old_logps": lambda p, b: logps(ppo.policy_of(p, frozen), b),
        "ref_logps": lambda p, b: logps(away(ppo.policy_of(p, frozen)), b),
    }


@cache
def compiled_passes(temperature, logits_chunk, models):
    """They depend on no other setting."""
    config = ppo.Config(temperature=temperature, logits_chunk=logits_chunk)
    return jax.jit(ppo.make_logps(config, models.policy)), jax.jit(ppo.make_values(config, models.value))


def scored_rollout(config, models, state, frozen, seed=0) -> Experience:
    passes = make_passes(config, models, frozen)
    experience = run_passes(draw_rollout(seed), passes, state.params, WHOLE, one_device())
    experience.fields["sampler_logps"] = experience.fields["old_logps"]
    return ppo.estimate(config, experience, ppo.start_carry(config))[0]


def pack(config, experience, layout=WHOLE, share_prompt=True, update=0):
    """As the source does."""
    members, names = np.arange(len(experience.prompts)), ppo.fields(config)
    batch = pack_prompts(experience, members, layout, share_prompt=share_prompt, fields=names)
    numbers = ppo.batch_fields(config, experience, len(batch.present), update)
    return replace(batch, fields={**batch.fields, **numbers})


def test_a_value_is_of_the_state_before_its_token():
    """Another token t: no value up to and including t moves, the next one does; the prompt's last token moves all."""
    models, state, frozen = make_models()
    values = make_passes(ppo.Config(), models, frozen)["values"]

    def read(experience):
        return run_passes(experience, {"values": values}, state.params, WHOLE, one_device()).fields["values"]

    experience = draw_rollout()
    before, c, t = read(experience), 1, 4
    assert experience.lengths[c] == STEPS and np.ptp(before[c]) > 0.1
    tokens = experience.tokens.copy()
    tokens[c, t] = 1 + tokens[c, t] % (VOCAB - 1)
    after = read(replace(experience, tokens=tokens))
    np.testing.assert_array_equal(after[c, : t + 1], before[c, : t + 1])
    assert (np.abs(after[c, t + 1 :] - before[c, t + 1 :]) > 1e-4).all()
    np.testing.assert_array_equal(np.delete(after, c, 0), np.delete(before, c, 0))
    prompts, last = experience.prompts.copy(), experience.prompt_lengths[0] - 1
    prompts[0, last] = 1 + prompts[0, last] % (VOCAB - 1)
    moved = np.abs(read(replace(experience, prompts=prompts)) - before) > 1e-4
    np.testing.assert_array_equal(moved, experience.mask & (experience.groups == 0)[:, None])


def test_the_first_update_of_a_rollout():
    """Ratio 1, nothing clipped, and the loss is put together as its metrics say."""
    config = ppo.Config(entropy_coef=0.01, vf_coef=0.3, whiten_advantages="minibatch")
    models, state, frozen = make_models()
    experience = scored_rollout(config, models, state, frozen)
    step = jax.jit(ppo.make_step(config, models, optax.sgd(0.1)))
    after, metrics = step(replace(state, opt_state=optax.sgd(0.1).init(state.params)), frozen, pack(config, experience))
    found = {name: metric.value() for name, metric in metrics.items()}
    assert found["policy/clipfrac_avg"] == found["val/clipfrac_avg"] == 0
    assert found["val/ratio"] == pytest.approx(1, abs=1e-5) and found["val/ratio_var"] < 1e-8
    assert found["policy/approxkl_avg"] < 1e-8
    assert metrics["val/ratio"].weight == experience.lengths.sum() - experience.lengths[5]
    terms = {"loss/policy_avg": 1.0, "loss/value_avg": 0.3, "policy/entropy_avg": -0.01}
    assert found["loss"] == pytest.approx(sum(weight * found[name] for name, weight in terms.items()), rel=1e-5)
    # Whitened advantages have mean 0, and with them the loss of the first update.
    assert abs(found["loss/policy_avg"]) < 1e-5
    errors = (experience.fields["values"] - experience.fields["returns"])[experience.fields["loss_mask"] > 0]
    assert found["loss/value_avg"] == pytest.approx(np.square(errors).mean() / 2, rel=1e-4)
    assert min(relative(after.params[role], state.params[role]) for role in ("policy", "value")) > 1e-5


def gradient(config, models, state, frozen, experience, layout=WHOLE, share_prompt=True, mesh=None):
    batch = pack(config, experience, layout, share_prompt)
    wide, params = jax.tree.leaves(state.params)[0].dtype, state.params
    batch = replace(batch, fields={name: np.asarray(values, wide) for name, values in batch.fields.items()})
    if mesh is not None:
        batch, params = place_batch(mesh, batch), jax.device_put(params, param_shardings(mesh, params))
    return compiled_gradient(config, models)(params, frozen, batch)


@cache
def compiled_gradient(config, models):
    def compute(params, frozen, batch):
        batch = ppo.whiten_batch(config, batch)
        return accumulate(ppo.make_loss(config, models), ppo.totals(batch), params, frozen, batch, KEY)

    return jax.jit(compute)


def moved(experience, seed=1) -> Experience:
    """Log-probs and values as after some updates: every bound is passed by some tokens."""
    rng = np.random.default_rng(seed)
    fields = {
        name: experience.fields[name] + (scale * rng.normal(size=experience.mask.shape)).astype(np.float32)
        for name, scale in (("old_logps", 0.4), ("values", 0.4))
    }
    return replace(experience, fields={**experience.fields, **fields})


CHOICES: dict[str, dict[str, Any]] = {
    "separate": {"dual_clip": 1.5, "whiten_advantages": "minibatch", "entropy_coef": 0.02},
    "shared": {"critic": "shared", "epsilon_high": 0.3, "epsilon_value": 0.5, "vf_coef": 0.5},
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_gradients_do_not_depend_on_the_layout(choice):
    config = ppo.Config(**choice)
    with jax.enable_x64(True):
        models, state, frozen = make_models(config.critic, "float64")
        experience = moved(scored_rollout(config, models, state, frozen))
        grads, metrics = gradient(config, models, state, frozen, experience)
        wanted = {name: metric.value() for name, metric in metrics.items()}
        assert min(wanted[name] for name in ("policy/clipfrac_avg", "val/clipfrac_avg")) > 0.02
        assert wanted.get("actor/pg_clipfrac_lower", 1) > 0
        for layout, share_prompt in LAYOUTS.values():
            other, metrics = gradient(config, models, state, frozen, experience, layout, share_prompt)
            assert relative(other, grads) <= 1e-10
            assert {name: metric.value() for name, metric in metrics.items()} == pytest.approx(wanted, rel=1e-5)
        if config.entropy_coef:
            without = gradient(replace(config, entropy_coef=0.0), models, state, frozen, experience)[0]
            assert (
                relative(without["policy"], grads["policy"]) > 1e-3
                and relative(without["value"], grads["value"]) < 1e-12
            )


def test_gradients_do_not_depend_on_the_mesh():
    config, mesh = ppo.Config(whiten_advantages="minibatch"), make_mesh(MeshConfig(2, 2, 2))
    models, state, frozen = make_models()
    experience = moved(scored_rollout(config, models, state, frozen))
    layout = replace(WHOLE, micro_batch_size=4, shards=data_shards(mesh))
    grads, metrics = gradient(config, models, state, frozen, experience, layout, mesh=mesh)
    wanted, plain = gradient(config, models, state, frozen, experience)
    assert relative(grads, wanted) <= 1e-5
    for name, metric in plain.items():
        assert metrics[name].value() == pytest.approx(metric.value(), rel=2e-5, abs=2e-5), name


def test_what_has_no_score_has_no_gradient():
    """Other tokens in that completion: the same gradient. In another one: another."""
    config = ppo.Config()
    models, state, frozen = make_models()
    experience = moved(scored_rollout(config, models, state, frozen))

    def changed(c):
        tokens, n = experience.tokens.copy(), experience.lengths[c]
        tokens[c, :n] = 1 + tokens[c, :n] % (VOCAB - 1)
        return gradient(config, models, state, frozen, replace(experience, tokens=tokens))[0]

    grads = gradient(config, models, state, frozen, experience)[0]
    assert relative(changed(5), grads) <= 1e-6
    assert relative(changed(6), grads) > 1e-3


def test_an_update_too_far_away_is_not_applied():
    """Old log-probs 0.4 apart in the mean square: approximate KL 0.08 a token. Nothing moves by a bit but the step."""
    models, state, frozen = make_models()
    config, optimizer = ppo.Config(), optax.adam(1e-3)
    batch = pack(config, moved(scored_rollout(config, models, state, frozen)))

    def update(target_kl):
        step = ppo.make_step(replace(config, target_kl=target_kl), models, optimizer)
        after, metrics = jax.jit(step)(state if target_kl is None else stoppable(state), frozen, batch)
        if target_kl is not None:
            assert after.opt_state.stopped == (target_kl == 0.02)
            after = replace(after, opt_state=after.opt_state.optimizer)
        return after, {name: metric.value() for name, metric in metrics.items()}

    plain, free = update(None)
    assert free["policy/approxkl_avg"] == pytest.approx(0.08, rel=0.3)
    near, applied = update(0.2)
    far, stopped = update(0.02)
    assert "policy/stopped" not in free and applied["policy/stopped"] == 0 and stopped["policy/stopped"] == 1
    same = jax.tree.map(np.array_equal, (far.params, far.opt_state), (state.params, state.opt_state))
    assert all(jax.tree.leaves(same)) and far.step == near.step == 1
    assert relative(near.params, plain.params) <= 1e-6 and relative(near.opt_state, plain.opt_state) <= 1e-6
    assert relative(near.params, state.params) > 1e-5
    assert {**stopped, "policy/stopped": 0} == pytest.approx({**free, "policy/stopped": 0})


def stoppable(state):
    """The state as `ppo.init` makes it where there is a `target_kl`."""
    return replace(state, opt_state=ppo.Stoppable(jnp.zeros((), bool), state.opt_state))


def test_a_stop_holds_until_the_epoch_ends(tmp_path):
    """Updates 0 to 5 are two epochs of three. Far, near, near: nothing is applied. Near, far, near: the first alone.

    What a checkpoint brings back between a far update and a near one is stopped like what it was made of.
    """
    models, state, frozen = make_models()
    config, optimizer = ppo.Config(num_mini_batches=3, num_ppo_epochs=2, target_kl=0.02), optax.adam(1e-4)
    near = scored_rollout(config, models, state, frozen)
    experiences = {"near": near, "far": moved(near)}
    made, other = ppo.init(
        config,
        models,
        {role: common.join_variables(state.params[role], frozen[role]) for role in frozen},
        optimizer,
        KEY,
    )
    assert jax.tree.structure(made) == jax.tree.structure(stoppable(state)) and not made.opt_state.stopped
    assert jax.tree.structure(other) == jax.tree.structure(frozen)
    state, step = stoppable(state), jax.jit(ppo.make_step(config, models, optimizer))
    stopped, applied, states = [], [], []
    for update, kind in enumerate(("far", "near", "near", "near", "far", "near")):
        after, metrics = step(state, frozen, pack(config, experiences[kind], update=update))
        stopped.append(metrics["policy/stopped"].value())
        applied.append(relative(after.params, state.params) > 0)
        if update == 3:  # the optimiser counts what is applied, the state all
            assert after.opt_state.optimizer[0].count == 1 and after.step == 4
        state = after
        states.append(state)
    assert stopped == [1, 1, 1, 0, 1, 1] and applied == [False, False, False, True, False, False]
    with Checkpoints(tmp_path / "saved") as checkpoints:
        checkpoints.save(5, states[4], {}, {})
        restored = checkpoints.restore(states[4], 5)
    assert restored is not None
    again, _ = step(restored.state, frozen, pack(config, near, update=5))
    assert all(
        jax.tree.leaves(jax.tree.map(np.array_equal, (again.params, again.opt_state), (state.params, state.opt_state)))
    )


def test_the_sampler_is_compared_at_a_rollout_s_first_update():
    """Several updates per rollout, in float32: the policy has moved at all but the first. Nothing is said of ratios."""
    config = ppo.Config()
    models, state, frozen = make_models()
    experience = scored_rollout(config, models, state, frozen)
    loss = jax.jit(lambda batch: ppo.make_loss(config, models)(state.params, frozen, batch, ppo.totals(batch), KEY)[1])
    for update in range(3):
        batch = jax.tree.map(lambda x: x[0], pack(config, experience, update=update))
        found = loss(batch)
        for name in ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max", "gen_kl_error"):
            value = found[name].value()
            assert (value is None) == (update > 0) and (value or 0) <= 1e-4


def test_one_update_per_rollout_needs_no_old_logps():
    """The ratio is exactly 1, and the gradient that of the log-probs of a pass."""
    config = ppo.Config(num_ppo_epochs=1)
    assert "old_logps" not in ppo.fields(config) and "old_logps" in ppo.fields(ppo.Config())
    models, state, frozen = make_models()
    experience = scored_rollout(config, models, state, frozen)
    grads, metrics = gradient(config, models, state, frozen, experience)
    assert metrics["val/ratio"].value() == 1 and metrics["policy/approxkl_avg"].value() == 0
    assert metrics["sampling/sampling_logp_difference/max"].value() < 1e-4
    assert relative(gradient(ppo.Config(), models, state, frozen, experience)[0], grads) < 1e-4


def test_supervised_examples_add_the_gradient_of_sft():
    """At temperature 1, over their own targets, in any split; the rollout's means do not see them."""
    config = ppo.Config(ptx_coef=0.7, share_prompt=False, num_ppo_epochs=1)
    texts, rng = ragged_texts(4), np.random.default_rng(0)
    groups = [
        {
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": [pair["chosen_ids"]],
            **{name: [rng.normal(size=len(pair["chosen_ids"]))] for name in ("advantages", "returns", "values")},
        }
        for pair in ragged_pairs(5)
    ]
    with jax.enable_x64(True):
        models, state, frozen = make_models(dtype="float64")

        def compute(config, loss, totals, params, frozen, batch):
            run = lambda params, batch: accumulate(loss, totals(batch), params, frozen, batch, KEY)  # noqa: E731
            return jax.jit(run)(params, batch)

        loss = ppo.make_loss(config, models)
        mixed = ppo.make_batch(config, groups, texts, micro_batch_size=2)
        grads, metrics = compute(config, loss, ppo.totals, state.params, frozen, mixed)
        alone = ppo.make_loss(replace(config, ptx_coef=0.0), models)
        batch = ppo.make_batch(config, groups)
        rollout, plain = compute(config, alone, ppo.totals, state.params, frozen, batch)
        supervised, nll = compute(
            config,
            sft.make_loss(sft.Config(), models.policy),
            sft.totals,
            state.params["policy"],
            frozen["policy"],
            sft.make_batch(sft.Config(), texts),
        )
        rollout["policy"] = jax.tree.map(lambda a, b: a + 0.7 * b, rollout["policy"], supervised)
        assert relative(grads, rollout) <= 1e-10
        assert metrics["loss/ptx_avg"].value() == pytest.approx(nll["loss"].value())
        assert metrics["val/ratio"].weight == plain["val/ratio"].weight
        with pytest.raises(ValueError, match="no supervised examples"):
            compute(config, loss, ppo.totals, state.params, frozen, batch)


def test_where_a_critic_comes_from():
    policy = tiny_model(**SMALL)
    scorer = tiny_model(5, lm_head=False, score_head=True, **SMALL)
    experience, config = draw_rollout(), ppo.Config()
    batch = pack_prompts(experience, np.arange(PROMPTS), WHOLE)

    def values(models, variables):
        state, frozen = ppo.init(config, models, variables, optax.sgd(0.1), KEY)
        return np.asarray(ppo.make_values(config, models.value)(ppo.value_of(state.params, frozen), batch))

    models, variables = ppo.add_critic(config, *policy, KEY)
    assert not values(models, variables).any() and "head" not in variables["value"]["params"]
    other = tiny_model(7, **SMALL)
    models, variables = ppo.add_critic(config, *policy, KEY, start=other)
    assert not values(models, variables).any()
    assert variables["value"]["params"]["embed"] is other[1]["params"]["embed"]
    models, variables = ppo.add_critic(config, *policy, KEY, start=scorer)
    assert np.ptp(values(models, variables)) > 0.1 and variables["value"] is scorer[1]
    shared = ppo.Config(critic="shared")
    models, variables = ppo.add_critic(shared, *policy, KEY)
    assert not values(models, variables).any() and list(variables) == ["policy"]
    logps = [
        np.asarray(ppo.make_logps(config, model)(each, batch))
        for model, each in (policy, (models.policy, variables["policy"]))
    ]
    np.testing.assert_array_equal(logps[0], logps[1])
    with pytest.raises(ValueError, match="separate"):
        ppo.add_critic(shared, *policy, KEY, start=scorer)
    with pytest.raises(ValueError, match="vocabularies have 33 and 97"):
        ppo.add_critic(config, *policy, KEY, start=tiny_model(5, vocab_size=33, **SMALL))


def make_source(config, models, frozen, texts=()):
    """A source whose completions are drawn from the key alone and scored by their length; perhaps with texts."""

    def draw(variables, prompts, key):
        seed = int(jax.random.randint(key, (), 0, 2**30))
        drawn = draw_rollout(seed, 1)
        n = len(prompts)
        logps = np.full((n, STEPS), -3.0, np.float32)
        return Samples(drawn.tokens[:n], drawn.lengths[:n], drawn.finish[:n], logps, 0 * logps)

    def score(experience):
        return lambda: experience.lengths[:, None].astype(np.float64)

    passes = {name: run for name, run in make_passes(config, models, frozen).items() if name != "old_logps"}
    assert passes.keys() == ppo.passes(config, narrow=False).keys()
    prompts = [{"prompt_ids": pair["prompt_ids"]} for pair in ragged_pairs(5, prompt=WIDTH)]
    parts = Parts(prompts, draw, partial(ppo.policy_of, frozen=frozen), score, ("length",), passes, WIDTH)
    if texts:
        parts = replace(parts, supervised=Supervised(texts, Order(len(texts), seed=3), config.ptx_per_prompt))
    layout = Layout(batch_size=3, micro_batch_size=2, length=64)
    return OnlineSource(ppo, config, parts, layout, one_device(), key=KEY)


@pytest.mark.slow
def test_a_source_mixes_texts_into_its_batches():
    """Loss and gradient are those of the rollout alone plus `ptx_coef` times those of SFT on the texts that are due.

    5 texts, 2 per prompt: each batch of 3 prompts in 2 micro-batches takes 6 of them, so that the second begins in the
    second pass, in another order.
    """
    config = ppo.Config(ptx_coef=0.7, ptx_per_prompt=2, num_mini_batches=2, num_ppo_epochs=1)
    models, state, frozen = make_models()
    texts = ragged_texts(5, longest=50)
    source, plain = (make_source(config, models, frozen, given) for given in (texts, ()))
    passes = [np.random.default_rng([3, epoch]).permutation(5) for epoch in range(3)]
    due = np.concatenate(passes)[:12].reshape(2, 6)
    assert sorted(passes[1]) == list(range(5)) and not np.array_equal(passes[0], passes[1])

    def compute(loss, totals, params, frozen, batch):
        return jax.jit(lambda params: accumulate(loss, totals(batch), params, frozen, batch, KEY))(params)

    tokens = 0
    for numbers in due:
        (mixed, metrics), (alone, others) = source.next(state), plain.next(state)
        own = [texts[i] for i in numbers]
        tokens += sum(len(text["input_ids"]) for text in own)
        before = others["num_tokens"]
        assert isinstance(before, int)
        assert metrics["num_tokens"] == before + tokens and metrics["epoch"] == others["epoch"]
        grads, found = compute(ppo.make_loss(config, models), ppo.totals, state.params, frozen, mixed)
        without = ppo.make_loss(replace(config, ptx_coef=0.0, ptx_per_prompt=1), models)
        wanted, base = compute(without, ppo.totals, state.params, frozen, alone)
        batch = sft.make_batch(sft.Config(), own)
        loss = sft.make_loss(sft.Config(), models.policy)
        supervised, nll = compute(loss, sft.totals, state.params["policy"], frozen["policy"], batch)
        wanted["policy"] = jax.tree.map(lambda a, b: a + 0.7 * b, wanted["policy"], supervised)
        assert relative(grads, wanted) <= 1e-5
        assert found["loss/ptx_avg"].value() == pytest.approx(nll["loss"].value(), rel=1e-5)
        assert found["loss"].value() == pytest.approx(base["loss"].value() + 0.7 * nll["loss"].value(), rel=1e-5)


def test_a_resumed_source_goes_on_bit_for_bit():
    """Stopped in the middle of the second rollout's second epoch, with a moving KL coefficient and running moments.

    And with texts, of which 3 are in every batch: after 7 batches the fourth pass over 6 of them is half done.
    """
    config = ppo.Config(
        num_mini_batches=2, num_ppo_epochs=2, kl_target=3.0, kl_horizon=50.0, normalize_scores="running", ptx_coef=0.5
    )
    models, state, frozen = make_models()
    texts = ragged_texts(6)
    source = make_source(config, models, frozen, texts)
    coefs, wanted = [], []
    for update in range(14):
        if update == 7:
            saved = source.state()
        batch, metrics = source.next(state)
        wanted.append((batch, metrics))
        coef = metrics.get("objective/kl_coef")
        coefs += [coef.value()] if isinstance(coef, Mean) else []
    assert len(set(coefs)) == len(coefs) == 4
    resumed = make_source(config, models, frozen, texts)
    resumed.restore(saved)
    assert saved["progress"]["supervised"] == 21
    for batch, metrics in wanted[7:]:
        other, values = resumed.next(state)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), other, batch)))
        timeless = lambda found: {name: found[name] for name in found if not name.startswith("timing")}  # noqa: E731
        assert jax.tree.map(float, timeless(values)) == jax.tree.map(float, timeless(metrics))
