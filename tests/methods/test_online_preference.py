"""Online DPO: which completions become a pair, and that its step is DPO's on exactly these pairs."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import sampling
from jaxalign.methods import online_preference, preference
from jaxalign.methods.offline import Layout
from jaxalign.methods.online import NoSignalError, OnlineSource, Parts
from jaxalign.methods.rollout import make_draw, row_length
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.training.coupled import CoupledLoss
from jaxalign.types import Experience, Mean
from tests.layouts import VOCAB, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

WIDTH, STEPS, GENERATIONS = 16, 10, 4
SIZES = (1, 16, 5, 9, 2, 12)
PROMPTS = [{"prompt_ids": np.random.default_rng(size).integers(1, VOCAB, size).astype(np.int32)} for size in SIZES]


def experience(scores, finish):
    """Two prompts with three completions each, of ragged lengths."""
    scores = np.asarray(scores, np.float64)
    lengths = np.array([3, 1, 2, 4, 2, 1], np.int32)
    mask = np.arange(4)[None] < lengths[:, None]
    tokens = np.arange(1, 25, dtype=np.int32).reshape(6, 4) * mask
    logps = -np.arange(24, dtype=np.float32).reshape(6, 4)
    fields = {"ref_logps": logps * mask, "sampler_logps": (logps + 0.5) * mask}
    ids = np.array([[5, 6], [7, 0]], np.int32), np.array([2, 1], np.int32)
    return Experience(*ids, np.arange(2), tokens, lengths, np.asarray(finish), scores[:, None], fields)


def test_the_best_and_the_worst_are_the_pair():
    # First prompt: 0.2, none, 0.9 -> completions 2 and 0. Second: 0.5, 0.5, -1 -> the first of the best, 3, and 5.
    drawn = experience([0.2, np.nan, 0.9, 0.5, 0.5, -1.0], [1] * 6)
    config = online_preference.Config(num_generations=3)
    pairs, metrics, carry = online_preference.estimate(config, drawn, {})
    np.testing.assert_array_equal(pairs.tokens, drawn.tokens[[2, 0, 3, 5]])
    np.testing.assert_array_equal(pairs.lengths, [2, 3, 4, 1])
    np.testing.assert_array_equal(pairs.fields["ref_logps"], drawn.fields["ref_logps"][[2, 0, 3, 5]])
    assert (pairs.num_generations, carry) == (2, {})
    # Margins 0.7 and 1.5; scores 0.2 + 0.9 + 0.5 + 0.5 - 1 = 1.1 over five that exist.
    assert metrics["objective/scores_margin"].value() == pytest.approx(1.1)
    drawn_metrics = online_preference.drawn_metrics(config, drawn)
    assert drawn_metrics["objective/scores"].value() == drawn_metrics["reward"].value() == pytest.approx(0.22)
    assert drawn_metrics["val/contain_eos_token"].value() == 1


def test_the_objective_by_hand():
    """The sampler's log-probs lie 0.5 above the reference's; lengths are 3, 1, 2, 4, 2, 1; the second has no score.

    The reference's are −(0 + 1 + 2), −4, −(8 + 9), −(12 + 13 + 14 + 15), −(16 + 17), −20: −131 in all, the sampler's
    −131 + 13/2 = −124.5.
    """
    drawn = experience([0.2, np.nan, 0.9, 0.5, 0.5, -1.0], [1] * 6)
    _, metrics, _ = online_preference.estimate(online_preference.Config(num_generations=3, beta=0.2), drawn, {})
    found = {name: metric.value() for name, metric in metrics.items()}
    assert found["objective/kl"] == pytest.approx(6.5 / 6)
    assert found["objective/non_score_reward"] == pytest.approx(-0.2 * 6.5 / 6)
    assert found["objective/entropy"] == pytest.approx(124.5 / 6)
    assert found["objective/rlhf_reward"] == pytest.approx((1.1 - 0.2 * 0.5 * 12) / 5)
    assert found["beta"] == 0.2


def test_a_missing_end_costs_and_ties_make_no_pair():
    # Without the penalty the second prompt is a tie of three; with it, the completion that did not end is the worst.
    drawn = experience([0.2, 0.2, 0.9, 0.5, 0.5, 0.5], [1, 1, 0, 1, 1, 0])
    assert online_preference.keep(online_preference.Config(num_generations=3), drawn).tolist() == [True, False]
    config = online_preference.Config(num_generations=3, missing_eos_penalty=1.0)
    assert online_preference.keep(config, drawn).tolist() == [True, True]
    # 0.9 - 1 is now the worst of the first prompt.
    pairs, _, _ = online_preference.estimate(config, drawn, {})
    np.testing.assert_array_equal(pairs.tokens, drawn.tokens[[0, 2, 3, 5]])
    assert online_preference.drawn_metrics(config, drawn)["val/contain_eos_token"].value() == pytest.approx(4 / 6)


@cache
def tiny():
    return tiny_model(num_layers=2, windows=(9, 9))


def source_of(config, score):
    model, variables = tiny()
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    settings = sampling.Config(
        temperature=config.temperature, max_new_tokens=STEPS, num_generations=GENERATIONS, eos_ids=tuple(range(1, 16))
    )
    logps = jax.jit(online_preference.make_logps(config, model))
    parts = Parts(
        prompts=PROMPTS,
        draw=make_draw(model, settings, mesh, width=WIDTH),
        policy=lambda params: params,
        score=score,
        rewards=("length",),
        passes={"ref_logps": lambda params, batch: logps(variables, batch)},
        width=WIDTH,
    )
    length = row_length(WIDTH, STEPS, GENERATIONS, share_prompt=True, multiple=32)
    return OnlineSource(online_preference, config, parts, Layout(3, 2, length), mesh, key=jax.random.key(1))


def test_a_step_is_a_step_of_dpo_on_the_pairs():
    model, variables = tiny()
    config = online_preference.Config(num_generations=GENERATIONS, max_completion_length=STEPS, temperature=0.7)
    source = source_of(config, lambda drawn: lambda: -drawn.lengths[:, None].astype(np.float64))
    batch, metrics = source.next(SimpleNamespace(params=variables))
    margin = metrics["objective/scores_margin"]
    assert isinstance(margin, Mean) and margin.total > 0
    optimizer = optax.sgd(0.1)
    state, frozen = online_preference.init(config, model, variables, optimizer, jax.random.key(0))
    after, found = jax.jit(online_preference.make_step(config, model, optimizer))(state, frozen, batch)
    # The policy is the reference: every pair's loss is -log sigmoid(0), in a batch of three pairs and one empty place.
    assert found["loss"].value() == pytest.approx(np.log(2), abs=1e-5)
    assert float(batch.present.sum()) == 6
    # The same pairs by hand. The loss is of log-probs at temperature 0.7: at 1 the gradient is another.
    drawn = source.experience
    assert drawn is not None
    rows = [drawn.tokens[c, : drawn.lengths[c]] for c in range(6)]
    assert all(len(rows[2 * i]) < len(rows[2 * i + 1]) for i in range(3))
    pairs = [
        {
            "prompt_ids": drawn.prompts[i, : drawn.prompt_lengths[i]],
            "chosen_ids": rows[2 * i],
            "rejected_ids": rows[2 * i + 1],
            "ref_chosen_logps": drawn.fields["ref_logps"][2 * i, : len(rows[2 * i])],
            "ref_rejected_logps": drawn.fields["ref_logps"][2 * i + 1, : len(rows[2 * i + 1])],
        }
        for i in range(3)
    ]
    plain = jax.tree.map(lambda x: jnp.asarray(x)[0], preference.make_batch(config.offline, pairs))

    def loss(params, frozen, plain, temperature):
        made = preference.make_loss(config.offline, model, temperature=temperature)
        assert not isinstance(made, CoupledLoss)
        return made(params, frozen, plain, {"loss": jnp.asarray(3.0)}, None)[0]

    slope = jax.jit(jax.grad(loss), static_argnames="temperature")

    def apart(temperature):
        grads = slope(state.params, frozen, plain, temperature=temperature)
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.params, expected)
        return max(float(gap) for gap in jax.tree.leaves(gaps))

    assert apart(0.7) < 1e-6 < 1e-5 < apart(1.0)


def test_metrics_and_samples_are_of_what_was_drawn():
    """With a reward of 0 or 1 a pair has one of each; of what was drawn, ten in twelve are right, or so."""

    def score(drawn):
        right = (drawn.tokens.sum(1) % 5 > 0).astype(np.float64)
        seen.append(drawn)
        scores.append(right)
        return lambda: right[:, None]

    seen, scores = [], []
    config = online_preference.Config(num_generations=GENERATIONS, max_completion_length=STEPS, max_rollouts=20)
    source = source_of(config, score)
    _, metrics = source.next(SimpleNamespace(params=tiny()[1]))
    right = np.concatenate(scores)
    assert right.mean() > 0.6 and len(right) == 12 * len(seen)
    found = {name: metric.value() for name, metric in metrics.items() if isinstance(metric, Mean)}
    for name in ("reward", "objective/scores", "rewards/length/mean"):
        assert found[name] == pytest.approx(right.mean())
    lengths = np.concatenate([each.lengths for each in seen])
    assert found["completions/mean_length"] == pytest.approx(lengths.mean())
    shown, pairs = source.drawn, source.experience
    assert shown is not None and pairs is not None and pairs.num_generations == 2
    np.testing.assert_array_equal(shown.tokens, seen[0].tokens)
    np.testing.assert_array_equal(shown.scores[:, 0], scores[0])
    assert pairs.scores.mean() == 0.5


def test_scores_that_never_differ_end_with_a_message():
    config = online_preference.Config(num_generations=GENERATIONS, max_completion_length=STEPS, max_rollouts=2)
    source = source_of(config, lambda drawn: lambda: np.ones((len(drawn.lengths), 1)))
    with pytest.raises(NoSignalError, match="only 0 of 3 prompts"):
        source.next(SimpleNamespace(params=tiny()[1]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_generations", 1), ("temperature", 0.0), ("missing_eos_penalty", -1.0), ("loss_type", "dpo"), ("beta", 0.0)],
)
def test_settings_without_meaning_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        online_preference.Config(**{field: value})
