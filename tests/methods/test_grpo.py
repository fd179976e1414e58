"""The group family: losses by hand, the estimators of the presets, and that no layout or mask leaks into a gradient."""

import re
import textwrap
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import losses
from jaxalign.config import parse_config
from jaxalign.methods import grpo
from jaxalign.methods.grpo import PRESETS, Config
from jaxalign.methods.offline import Layout
from jaxalign.methods.rollout import pack_prompts, run_passes
from jaxalign.packing import Document, pack
from jaxalign.sharding import MeshConfig, data_shards, make_mesh, param_shardings, place_batch
from jaxalign.training.step import accumulate
from jaxalign.types import Experience
from tests.layouts import VOCAB, relative, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KEY = jax.random.key(0)
SMALL: dict[str, Any] = {"num_layers": 2, "windows": (9, 9)}
WIDTH, STEPS, PROMPTS, GENERATIONS = 40, 10, 7, 3
WHOLE = Layout(batch_size=8, micro_batch_size=8, length=96)
LAYOUTS = {
    "uneven split, long rows": (replace(WHOLE, micro_batch_size=3, length=256), True),
    "empty micro-batches, unshared": (replace(WHOLE, batch_size=20, micro_batch_size=4), False),
}
NAN = float("nan")
# Under a model without weights every token has this log-prob.
CHANCE = -np.log(VOCAB)


def experience_of(lengths: Any, scores: Any, finish: Any = None, prompts: int = 2, **fields: Any) -> Experience:
    """A rollout of made-up tokens; `fields` per completion, one number for all tokens or a list of them."""
    rng, n = np.random.default_rng(0), len(lengths)
    mask = np.arange(STEPS) < np.asarray(lengths)[:, None]
    prompt_lengths = rng.integers(1, WIDTH + 1, prompts).astype(np.int32)
    known = {"sampler_logps": [CHANCE] * n, "log_mass": [0.0] * n, **fields}
    table = {}
    for name, values in known.items():
        table[name] = np.zeros((n, STEPS), np.float32)
        for row, value, length in zip(table[name], values, lengths, strict=True):
            row[:length] = value
    return Experience(
        prompts=rng.integers(1, VOCAB, (prompts, WIDTH)) * (np.arange(WIDTH) < prompt_lengths[:, None]),
        prompt_lengths=prompt_lengths,
        examples=np.arange(prompts),
        tokens=(rng.integers(1, VOCAB, (n, STEPS)) * mask).astype(np.int32),
        lengths=np.asarray(lengths, np.int32),
        finish=np.ones(n, np.int32) if finish is None else np.asarray(finish, np.int32),
        scores=np.asarray(scores, np.float64).reshape(n, -1),
        fields=table,
    )


def pack_all(config, experience, layout=WHOLE, share_prompt=True):
    """As the source does."""
    members = np.arange(len(experience.prompts))
    batch = pack_prompts(experience, members, layout, share_prompt=share_prompt, fields=grpo.fields(config))
    extra = grpo.batch_fields(config, experience, len(batch.present))
    return replace(batch, fields={**batch.fields, **extra})


@cache
def gradient(config, model):
    def run(params, batch):
        return accumulate(grpo.make_loss(config, model), grpo.totals(config, batch), params, {}, batch, KEY)

    return jax.jit(run)


def compute(config, model, variables, batch):
    """Gradients and metrics of a batch, in the model's own precision."""
    wide = jax.tree.leaves(variables)[0].dtype
    if not isinstance(batch.present, jax.Array):
        batch = replace(batch, fields={name: np.asarray(values, wide) for name, values in batch.fields.items()})
    return gradient(config, model)({"params": variables["params"]}, batch)


def judge(config, model, variables, batch):
    """Loss and metrics of a batch in one micro-batch, without gradients."""
    micro = jax.tree.map(lambda x: x[0], batch)
    return grpo.make_loss(config, model)({"params": variables["params"]}, {}, micro, grpo.totals(config, batch), KEY)


def judged(config, model, variables, batch) -> dict[str, float | None]:
    value, metrics = jax.jit(partial(judge, config, model))(variables, batch)
    return {"loss": float(value), **values_of(metrics)}


def values_of(metrics):
    return {name: metric.value() for name, metric in metrics.items()}


def hand_made(**changes) -> Experience:
    """Two prompts, three completions each, of 3, 1, 2 and 2, 4, 1 tokens, and probability ratios per token."""
    ratios = [[1, 1.5, 0.5], [1.5], [1, 1], [0.5, 1], [1, 1, 1.1, 1], [1.5]]
    given = {
        "lengths": [3, 1, 2, 2, 4, 1],
        "scores": [3, 1, 2, 0, 4, 5],
        "old_logps": [CHANCE - np.log(each) for each in ratios],
        # exp(0.5) - 0.5 - 1 = 0.148721 on the four tokens of completion 4, 0 elsewhere.
        "ref_logps": [CHANCE, CHANCE, CHANCE, CHANCE, CHANCE + 0.5, CHANCE],
    }
    return experience_of(**{**given, **changes})


@pytest.fixture(scope="module")
def chance():
    """A model that holds all tokens equally probable."""
    model, variables = tiny_model(num_layers=1, windows=(None,))
    return model, jax.tree.map(jnp.zeros_like, variables)


def loss_by_hand(chance, experience=None, **settings):
    config = Config(**{"num_iterations": 2, "num_generations": 3, "max_completion_length": 8, **settings})
    found, _, _ = grpo.estimate(config, experience or hand_made(), {})
    model, variables = chance
    return judged(config, model, variables, pack_all(config, found))


# With ε 0.2, a term is A min(w, 1.2) for A > 0 and A max(w, 0.8) for A < 0. Per completion the terms over A are
#   0: 1 + 1.2 + 0.5 = 2.7   1: 1.5   3: 0.8 + 1 = 1.8   4: 1 + 1 + 1.1 + 1 = 4.1   5: 1.2
# and their means 0.9, 1.5, 0.9, 1.025, 1.2. Less the group's mean (2 and 3) the scores are 1, -1, 0, -3, 1, 2.
PLAIN = [1, -1, 0, -3, 1, 2]
# Over the group's deviation, 1 and √7 = 2.645751, plus 1e-4.
GROUPED = [1 / 1.0001, -1 / 1.0001, 0, -3 / 2.645851, 1 / 2.645851, 2 / 2.645851]
# Less the mean of the other two: 3/2 of the first.
OTHERS = [1.5, -1.5, 0, -4.5, 1.5, 3]
SUMS, MEANS = [2.7, 1.5, 2, 1.8, 4.1, 1.2], [0.9, 1.5, 1, 0.9, 1.025, 1.2]
# One ratio per completion: the geometric means of its tokens' or their products, bounded as above.
GEOMETRIC = [0.75 ** (1 / 3), 1.5, 1, 0.8, 1.1 ** (1 / 4), 1.2]
PRODUCTS = [0.75, 1.5, 1, 0.8, 1.1, 1.2]
K3 = np.exp(0.5) - 1.5


def total(advantages, terms):
    return -float(np.dot(advantages, terms))


BY_HAND: dict[str, tuple[dict[str, Any], float]] = {
    "grpo, group": ({"loss_type": "grpo", "advantage": "group"}, total(GROUPED, MEANS) / 6),
    "grpo, none": ({"loss_type": "grpo", "advantage": "none"}, -0.125 / 6),
    "grpo, leave one out": ({"loss_type": "grpo", "advantage": "leave_one_out"}, total(OTHERS, MEANS) / 6),
    "dapo, group": ({"loss_type": "dapo", "advantage": "group"}, total(GROUPED, SUMS) / 13),
    "dapo, none": ({"loss_type": "dapo", "advantage": "none"}, -2.3 / 13),
    "dapo, leave one out": ({"loss_type": "dapo", "advantage": "leave_one_out"}, total(OTHERS, SUMS) / 13),
    "dr_grpo, group": ({"loss_type": "dr_grpo", "advantage": "group"}, total(GROUPED, SUMS) / (6 * 8)),
    "dr_grpo, none": ({"loss_type": "dr_grpo", "advantage": "none"}, -2.3 / (6 * 8)),
    "dr_grpo, leave one out": ({"loss_type": "dr_grpo", "advantage": "leave_one_out"}, total(OTHERS, SUMS) / (6 * 8)),
    # The KL term is multiplied by the ratio, 1, 1, 1.1, 1, unless that is turned off.
    "k3": ({"loss_type": "dapo", "advantage": "none", "beta": 0.1}, (-2.3 + 0.1 * 4.1 * K3) / 13),
    "k3, biased": (
        {"loss_type": "dapo", "advantage": "none", "beta": 0.1, "use_bias_correction_kl": False},
        (-2.3 + 0.1 * 4 * K3) / 13,
    ),
    "sequence": (
        {"loss_type": "grpo", "advantage": "none", "importance_sampling_level": "sequence"},
        total(PLAIN, GEOMETRIC) / 6,
    ),
    "sequence sum": (
        {"loss_type": "grpo", "advantage": "none", "importance_sampling_level": "sequence_sum"},
        total(PLAIN, PRODUCTS) / 6,
    ),
    # Tokens of negative advantage: w = 1.5 is held at δ = 1.3, so that completion 1 counts 1.3.
    "delta": ({"loss_type": "dapo", "advantage": "none", "delta": 1.3}, (-2.3 - 0.2) / 13),
    # Capped at 1.2 and never dropped: -min(w, 1.2) A log p; log p is the same everywhere.
    "cispo": (
        {"loss_type": "dapo", "advantage": "none", "policy_loss": "cispo", "epsilon_high": 1.2},
        CHANCE * total(PLAIN, [2.7, 1.2, 2, 1.5, 4.1, 1.2]) / 13,
    ),
}


@pytest.mark.parametrize(("settings", "wanted"), BY_HAND.values(), ids=BY_HAND.keys())
def test_losses_by_hand(settings, wanted, chance):
    assert loss_by_hand(chance, **settings)["loss"] == pytest.approx(wanted, rel=2e-5)


def test_metrics_by_hand(chance):
    """Bounds stop 2 of 13 tokens above (completions 0 and 5) and 1 below (completion 3)."""
    found = loss_by_hand(chance, loss_type="dapo", advantage="none", beta=0.1)
    wanted = {
        "entropy": np.log(VOCAB),
        "kl": 4 * K3 / 13,
        "clip_ratio/high_mean": 2 / 13,
        "clip_ratio/high_max": 1,
        "clip_ratio/low_mean": 1 / 13,
        "clip_ratio/low_min": 0,
        "clip_ratio/region_mean": 3 / 13,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_sampler_and_trainer_side_by_side_by_hand(chance):
    """The sampler held two of 13 tokens for twice and for half as probable; one log-prob is not known.

    |d| is log 2 twice, exp|d| is 2 twice and 1 elsewhere. k3(-log 2) = 1/2 + log 2 - 1 and k3(log 2) = 2 - log 2 - 1.
    Both probabilities together are 3/2 of the smaller one: k3(log 2/3) + k3(log 4/3) for each token, halved.
    """
    twice = np.log(2)
    sampler = [[CHANCE + twice, CHANCE, CHANCE], CHANCE, [CHANCE, NAN], CHANCE, [CHANCE - twice, *[CHANCE] * 3], CHANCE]
    found = loss_by_hand(chance, hand_made(sampler_logps=sampler))
    k3 = lambda x: np.exp(x) - x - 1  # noqa: E731
    wanted = {
        "sampling/sampling_logp_difference/mean": 2 * twice / 12,
        "sampling/sampling_logp_difference/max": twice,
        "token_mult_prob_error": (10 + 2 * 2) / 12,
        "gen_kl_error": (k3(-twice) + k3(twice)) / 12,
        "js_divergence_error": (k3(np.log(2 / 3)) + k3(np.log(4 / 3))) / 12,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_what_is_left_out_of_the_loss_by_hand(chance):
    """Completion 4 was cut off, and 5 has no score: the second group's mean is 2, its advantages are -2 and 2.

    Of 13 tokens 8 are left: -(2.7 - 1.5 - 2 × 1.8) / 8. A mean over completions goes on dividing by 6, as TRL's does.
    """
    experience = hand_made(scores=[3, 1, 2, 0, 4, NAN], finish=[1, 1, 1, 2, 0, 1])
    settings: dict[str, Any] = {"advantage": "none", "mask_truncated_completions": True}
    assert loss_by_hand(chance, experience, **settings)["loss"] == pytest.approx(2.4 / 8, rel=2e-5)
    wanted = -(0.9 - 1.5 - 2 * 0.9) / 6
    assert loss_by_hand(chance, experience, **settings, loss_type="grpo")["loss"] == pytest.approx(wanted, rel=2e-5)
    found = loss_by_hand(chance, experience, advantage="none")
    assert found["loss"] == pytest.approx(-(2.7 - 1.5 - 2 * 1.8 + 2 * 4.1) / 12, rel=2e-5)


def test_dapo_counts_the_tokens_of_the_whole_rollout(chance):
    """Two updates per rollout, one prompt each, of 6 and 7 tokens: both divide by 6.5."""
    config = Config(num_generations=3, steps_per_generation=2, advantage="none")
    found, _, _ = grpo.estimate(config, hand_made(), {})
    layout, (model, variables) = replace(WHOLE, batch_size=1, micro_batch_size=1), chance
    values = []
    for prompt in (0, 1):
        batch = pack_prompts(found, [prompt], layout, fields=grpo.fields(config))
        batch = replace(batch, fields={**batch.fields, **grpo.batch_fields(config, found, 1)})
        values.append(judged(config, model, variables, batch)["loss"])
    assert values == pytest.approx([-(2.7 - 1.5) / 6.5, -(-3 * 1.8 + 4.1 + 2 * 1.2) / 6.5], rel=2e-5)


def test_a_rollout_s_metrics_by_hand():
    """Scores 1, 2, none / 0, 0, 0 with weight 2, and a second reward of 0.5 where there is one."""
    scores = [[1, 0.5], [2, NAN], [NAN, NAN], [0, NAN], [0, NAN], [0, NAN]]
    config = Config(num_generations=3, reward_weights=(2.0, 1.0), advantage="none")
    drawn = experience_of([3, 1, 2, 2, 4, 1], scores)
    found, _, _ = grpo.estimate(config, drawn, {})
    metrics = grpo.drawn_metrics(config, drawn)
    outcomes = [2.5, 4, 0, 0, 0]
    wanted = {"reward": np.mean(outcomes), "reward_std": np.std(outcomes, ddof=1), "frac_reward_zero_std": 3 / 6}
    assert values_of(metrics) == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_array_equal(found.fields["loss_mask"].sum(1), [3, 1, 0, 2, 4, 1])
    np.testing.assert_allclose(found.fields["advantages"][:, 0], [-0.75, 0.75, 0, 0, 0, 0])
    silent = grpo.drawn_metrics(config, replace(found, scores=np.full((6, 2), NAN)))
    assert "reward_std" not in silent and silent["reward"].value() is None


def test_the_kl_in_the_reward_by_hand():
    """k1 per token: 0.2 on both tokens of the first completion, 0 elsewhere; β 0.5 makes scores 1, 0 into 0.8, 0."""
    settings: dict[str, Any] = {"kl_in_reward": True, "beta": 0.5, "kl_estimator": "k1"}
    config = Config(num_generations=2, advantage="leave_one_out", **settings)
    experience = experience_of([2, 3], [1, 0], prompts=1, ref_logps=[CHANCE - 0.2, CHANCE])
    found, metrics, _ = grpo.estimate(config, experience, {})
    np.testing.assert_allclose(found.fields["advantages"], 0.8 * np.array([[1], [-1]]) * experience.mask, rtol=1e-5)
    assert metrics["kl"].value() == pytest.approx(0.4 / 5, rel=1e-5)
    assert "ref_logps" not in grpo.fields(config)
    # In lower precision than float32 the trainer's log-probs go in, even for a single update.
    assert grpo.passes(config, narrow=False) == {"ref_logps": "reference"}
    assert grpo.passes(config, narrow=True) == {"ref_logps": "reference", "old_logps": "policy"}
    again = replace(experience, fields={**experience.fields, "old_logps": experience.fields["ref_logps"] + 0.1})
    assert grpo.estimate(config, again, {})[1]["kl"].value() == pytest.approx(0.1, rel=1e-4)


def test_dynamic_sampling_goes_by_scores_alone():
    """All wrong, of different lengths: the punishment of length makes advantages, but no group worth keeping."""
    config = Config(num_generations=3, dynamic_sampling=True, overlong_cache=4, max_completion_length=8)
    experience = experience_of([3, 8, 6, 2, 4, 1], [0, 0, 0, 0, 1, NAN])
    np.testing.assert_array_equal(grpo.keep(config, experience), [False, True])
    found, _, _ = grpo.estimate(config, experience, {})
    assert np.ptp(found.fields["advantages"][:3, 0]) > 0.5
    assert grpo.keep(replace(config, dynamic_sampling=False), experience).all()


def drawn_rollout(model, variables, config) -> Experience:
    """Ragged completions with one that is cut off and one without a score, after some updates of the policy."""
    rng, n = np.random.default_rng(3), PROMPTS * GENERATIONS
    lengths = rng.integers(1, STEPS + 1, n)
    lengths[:2] = 1, STEPS
    scores = rng.normal(0, 1, n)
    scores[5] = NAN
    finish = np.where(np.arange(n) == 9, 0, 1)
    experience = experience_of(lengths, scores, finish, prompts=PROMPTS)
    logps = jax.jit(grpo.make_logps(config, model))
    passes = {
        "old_logps": logps,
        "ref_logps": lambda variables, batch: logps(jax.tree.map(lambda x: x * 0.98, variables), batch),
    }
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    known = run_passes(experience, passes, variables, WHOLE, mesh)
    moved = known.fields["old_logps"] + (0.3 * rng.normal(size=(n, STEPS)) * known.mask).astype(np.float32)
    return grpo.estimate(config, replace(known, fields={**known.fields, "old_logps": moved}), {})[0]


CHOICES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "beta": 0.1, "mask_truncated_completions": True, "temperature": 0.7, "delta": 1.5},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "advantage": "leave_one_out",
        "epsilon": 0.02,
    },
}


def config_of(choice):
    return Config(num_generations=3, num_iterations=2, max_completion_length=STEPS, logits_chunk=17, **choice)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_gradients_do_not_depend_on_the_layout(choice):
    config = config_of(choice)
    with jax.enable_x64(True):
        model = tiny_model(dtype="float64", **SMALL)
        experience = drawn_rollout(*model, config)
        grads, metrics = compute(config, *model, pack_all(config, experience))
        wanted = values_of(metrics)
        assert wanted["clip_ratio/low_mean"] > 0.02 and wanted["clip_ratio/high_mean"] > 0.02
        for layout, share_prompt in LAYOUTS.values():
            batch = pack_all(config, experience, layout, share_prompt)
            other, metrics = compute(config, *model, batch)
            assert relative(other, grads) <= 1e-10
            assert values_of(metrics) == pytest.approx(wanted, rel=1e-5)


def test_gradients_do_not_depend_on_the_mesh():
    config, mesh = config_of(CHOICES["dapo"]), make_mesh(MeshConfig(2, 2, 2))
    model, variables = tiny_model(**SMALL)
    experience = drawn_rollout(model, variables, config)
    wanted, plain = compute(config, model, variables, pack_all(config, experience))
    layout = replace(WHOLE, micro_batch_size=4, shards=data_shards(mesh))
    batch = place_batch(mesh, pack_all(config, experience, layout))
    placed = jax.device_put(variables, param_shardings(mesh, variables))
    grads, metrics = compute(config, model, placed, batch)
    assert relative(grads, wanted) <= 1e-5
    assert values_of(metrics) == pytest.approx(values_of(plain), rel=2e-5, abs=2e-5)


def test_what_is_left_out_has_no_gradient():
    """Other tokens in the completion without a score or in the truncated one: the same gradient. Elsewhere: another."""
    config = config_of(CHOICES["dapo"])
    model, variables = tiny_model(**SMALL)
    experience = drawn_rollout(model, variables, config)

    def changed(c):
        tokens, n = experience.tokens.copy(), experience.lengths[c]
        tokens[c, :n] = 1 + tokens[c, :n] % (VOCAB - 1)
        return compute(config, model, variables, pack_all(config, replace(experience, tokens=tokens)))[0]

    grads = compute(config, model, variables, pack_all(config, experience))[0]
    for left_out in (5, 9):
        assert not experience.fields["loss_mask"][left_out].any()
        assert relative(changed(left_out), grads) <= 1e-6
    assert relative(changed(1), grads) > 1e-3


@pytest.mark.parametrize(
    "choice",
    [
        {"loss_type": "dapo", "beta": 0.1, "advantage": "reinforce_plus_plus"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "policy_loss": "cispo", "epsilon_high": 5.0},
    ],
    ids=["tokens", "sequences"],
)
def test_a_rollout_without_any_score_has_loss_and_gradient_0(choice):
    config = config_of(choice)
    model, variables = tiny_model(**SMALL)
    scored = drawn_rollout(model, variables, config)
    experience = grpo.estimate(config, replace(scored, scores=np.full(scored.scores.shape, NAN)), {})[0]
    batch = pack_all(config, experience, replace(WHOLE, micro_batch_size=4))
    grads, metrics = compute(config, model, variables, batch)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
    assert metrics["loss"].value() == 0
    found = values_of(metrics)
    assert all(found[name] is None for name in found if name != "loss")


def test_the_example_of_the_docstring_runs():
    """Without old log-probs the ratio is 1: the loss is -Σ A / tokens, and an update of that raises what was better."""
    model, variables = tiny_model(**SMALL)
    rng = np.random.default_rng(0)
    drawn = [
        (rng.integers(1, VOCAB, 5), [rng.integers(1, VOCAB, n) for n in sizes]) for sizes in ((4, 1, 7), (2, 9, 3))
    ]
    scores = np.array([1.0, 0.0, 0.5, 0.0, 2.0, 1.0])
    code = textwrap.dedent(re.findall(r"\n((?:    .*\n)+)", str(grpo.__doc__))[-1])
    names = {"grpo": grpo, "jax": jax, "np": np, "losses": losses, "model": model, "variables": variables}
    names |= {"optimizer": optax.sgd(1e-3), "key": KEY, "drawn": drawn, "scores": scores}
    exec(code, names)
    metrics = values_of(names["metrics"])
    advantages = np.asarray(names["advantages"])
    sizes = np.array([[4, 1, 7], [2, 9, 3]])
    assert metrics["loss"] == pytest.approx(-(advantages * sizes).sum() / sizes.sum(), rel=1e-5)
    assert metrics["clip_ratio/region_mean"] == 0 and metrics["grad_norm"] > 0
    # Nothing was said of the sampler: that metric is absent, not NaN.
    assert metrics["sampling/sampling_logp_difference/mean"] is None
    assert metrics["sampling/sampling_logp_difference/max"] is None
    batch, logps = grpo.make_batch(names["config"], names["groups"]), grpo.make_logps(names["config"], model)
    moved = logps(names["state"].params, batch) - logps({"params": variables["params"]}, batch)
    weights = np.where(np.asarray(batch.predictions.completions) >= 0, batch.fields["advantages"], 0)
    assert float((np.asarray(moved) * weights).sum()) > 0
    with pytest.raises(ValueError, match="'old_logps'"):
        grpo.make_batch(replace(names["config"], num_iterations=2), names["groups"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_their_steps_trace(name):
    section = {"rewards": [{"name": "gsm8k"}]}
    raw = {"model": {"path": "m"}, "data": {"path": "d"}, "method": {"name": name}, "rollout": section}
    stage = parse_config(raw).stages[0]
    assert stage.method_name == "grpo" and stage.method == Config(**PRESETS[name])
    config = replace(stage.method, max_completion_length=STEPS)
    other = (
        parse_config({**raw, "method": {"name": name, "epsilon_high": 0.123, "num_generations": 5}}).stages[0].method
    )
    assert other == replace(stage.method, epsilon_high=0.123, num_generations=5)
    model, variables = tiny_model(**SMALL)
    n = config.num_generations
    experience = experience_of(1 + np.arange(2 * n) % STEPS, np.arange(2 * n))
    experience.fields.update({name: experience.fields["sampler_logps"] for name in ("old_logps", "ref_logps")})
    batch = pack_all(config, grpo.estimate(config, experience, {})[0], replace(WHOLE, length=256))

    def step(variables, batch):
        state, frozen = grpo.init(config, model, variables, optax.adam(1e-3), KEY)
        return grpo.make_step(config, model, optax.adam(1e-3))(state, frozen, batch)

    state, metrics = jax.eval_shape(step, variables, batch)
    assert jax.tree.structure(state.params) == jax.tree.structure({"params": variables["params"]})
    assert {"loss", "grad_norm", "entropy"} <= set(metrics)


def test_the_choices_that_trace():
    """Every key of every registry."""
    model, variables = tiny_model(**SMALL)
    experience = experience_of([3, 1, 2, 2, 4, 1], [3, 1, 2, 0, 4, 5], ref_logps=[0.0] * 6)
    fields = {
        "advantage": losses.ADVANTAGES,
        "importance_sampling_level": losses.RATIO_LEVELS,
        "policy_loss": losses.POLICY_LOSSES,
        "cispo_bounds": losses.CISPO_BOUNDS,
        "loss_type": losses.AGGREGATIONS,
        "kl_estimator": losses.KL_ESTIMATORS,
    }
    needed: dict[str, dict[str, Any]] = {
        "cispo": {"epsilon_high": 5.0},
        "vespo": {"importance_sampling_level": "sequence_sum"},
        **{bounds: {"policy_loss": "cispo", "epsilon_high": 5.0} for bounds in losses.CISPO_BOUNDS},
    }
    for field, registry in fields.items():
        for key in registry:
            config = config_of({field: key, "beta": 0.1, **needed.get(key, {})})
            batch = pack_all(config, grpo.estimate(config, experience, {})[0])
            value, metrics = jax.eval_shape(partial(judge, config, model), variables, batch)
            assert value.shape == () and "entropy" in metrics


def test_rloo_is_reinforce_with_the_others_as_baseline():
    """The first update has the gradient of -Σ_i (r_i - r_j) log p(y_i) / n, whatever the completions' lengths."""
    without = {"beta": 0.0, "kl_in_reward": False, "kl_estimator": "k3"}
    config = Config(**{**PRESETS["rloo"], **without, "max_completion_length": STEPS})
    experience = experience_of([1, STEPS, 7, 2], [1.0, 0.0, 2.0, 5.0])
    advantages = np.array([1.0, -1.0, -3.0, 3.0])
    model, variables = tiny_model(**SMALL)
    grads, _ = compute(config, model, variables, pack_all(config, grpo.estimate(config, experience, {})[0]))
    documents = [
        Document(
            experience.prompts[i, : experience.prompt_lengths[i]].astype(np.int32),
            tuple(experience.tokens[c, : experience.lengths[c]] for c in (2 * i, 2 * i + 1)),
        )
        for i in (0, 1)
    ]
    batch = pack(documents, completions=2)

    def reinforce(params):
        logps = grpo.make_logps(config, model)(params, batch)[0]
        sums = losses.sum_by_completion(logps, jnp.asarray(batch.predictions.completions[0]), 4)
        return -(sums * advantages).sum() / 4

    assert relative(grads, jax.jit(jax.grad(reinforce))({"params": variables["params"]})) <= 1e-5


def test_unknown_methods_name_the_presets():
    with pytest.raises(ValueError, match=r"'drgrpo' is not a method; known: .*grpo.*dapo, dr_grpo.*cispo"):
        parse_config({"model": {"path": "m"}, "data": {"path": "d"}, "method": {"name": "drgrpo"}})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_generations": 1}, "num_generations=1 must be at least 2"),
        ({"advantage": "groups"}, "advantage 'groups' is unknown; known: group, batch"),
        ({"gamma": 0.9}, "gamma=0.9 is not read here, only with advantage: reinforce_plus_plus"),
        ({"gamma": 1.1, "advantage": "reinforce_plus_plus"}, "gamma=1.1 must be in"),
        ({"delta": 1.1}, r"delta=1\.1 must be above 1 \+ epsilon_high"),
        ({"delta": 2.0, "policy_loss": "cispo", "epsilon_high": 5.0}, "delta=2.0 is not read here"),
        ({"overlong_cache": 300}, "overlong_cache=300"),
        ({"advantage": "reinforce_plus_plus", "num_generations": 1, "dynamic_sampling": True}, "dynamic_sampling=True"),
        ({"multi_objective_aggregation": "normalize_then_sum", "advantage": "batch"}, "multi_objective_aggregation"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"dual_clip": 2.0}, "dual_clip=2.0 is not read here, only with policy_loss: dual"),
        ({"cispo_bounds": "relative"}, "cispo_bounds='relative' is not read here, only with policy_loss: cispo"),
        ({"epsilon": 0.1, "policy_loss": "sapo"}, "epsilon=0.1 is not read here"),
        ({"epsilon": 0.1, "policy_loss": "cispo", "epsilon_high": 5.0}, "epsilon=0.1 is not read here"),
        ({"epsilon_high": 0.1, "policy_loss": "sapo"}, "epsilon_high=0.1 is not read here"),
        ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg=2.0 is not read here"),
        ({"vespo_k_neg": 2.0}, "vespo_k_neg=2.0 is not read here, only with policy_loss: vespo"),
        ({"kl_in_reward": True}, "kl_in_reward=True is not read here, only with beta above 0"),
        ({"kl_estimator": "k1"}, "kl_estimator='k1' is not read here, only with beta above 0"),
        ({"beta": 0.1, "kl_in_reward": True, "use_bias_correction_kl": False}, "use_bias_correction_kl=False is not"),
        ({"max_rollouts": 5}, "max_rollouts=5 is not read here, only with dynamic_sampling: true"),
        ({"old_logps": "trainer"}, "old_logps='trainer' is not read here, only where a rollout serves several"),
        ({"policy_loss": "cispo"}, "epsilon_high=None must be given with cispo_bounds absolute"),
        ({"policy_loss": "vespo"}, "importance_sampling_level='token' must be sequence_sum with policy_loss vespo"),
        ({"epsilon_high": -0.5}, "epsilon_high=-0.5 must be at least 0"),
        ({"sapo_temperature_pos": 0.0, "policy_loss": "sapo"}, "sapo_temperature_pos=0.0 must be above 0"),
        (
            {"policy_loss": "vespo", "importance_sampling_level": "sequence_sum", "vespo_k_pos": -1.0},
            "vespo_k_pos=-1.0 must be at least 0",
        ),
        ({"logits_chunk": 0}, "logits_chunk=0 must be at least 1"),
        ({"reward_weights": ()}, r"reward_weights=\(\) must be one number per reward"),
    ],
)
def test_settings_without_meaning(settings, named):
    with pytest.raises(ValueError, match=named):
        Config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_loss": "dual", "dual_clip": 2.0, "epsilon_high": 0.3, "epsilon": 0.1},
        {"policy_loss": "cispo", "cispo_bounds": "relative", "epsilon": 0.3},
        {"policy_loss": "cispo", "cispo_bounds": "two_sided", "epsilon": 0.1, "epsilon_high": 0.3},
        {"policy_loss": "sapo", "sapo_temperature_pos": 2.0},
        {"beta": 0.1, "kl_in_reward": True, "kl_estimator": "k2", "old_logps": "trainer"},
        {"num_iterations": 2, "old_logps": "sampler"},
        {"dynamic_sampling": True, "max_rollouts": 3},
        {"advantage": "reinforce_plus_plus", "gamma": 0.9, "num_generations": 1},
    ],
)
def test_what_is_read_may_be_set(settings):
    config = Config(**settings)
    assert {name: getattr(config, name) for name in settings} == settings
