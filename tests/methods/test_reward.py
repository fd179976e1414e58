"""Reward models: the loss by hand, where a score is read, and that no layout changes a gradient."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.methods import reward
from jaxalign.models import Model, build
from jaxalign.sharding import MeshConfig, data_shards, make_mesh, param_shardings, place_batch
from jaxalign.training.metrics import Interval
from jaxalign.training.step import accumulate, evaluate
from jaxalign.types import TokenRows
from tests.layouts import ragged_pairs, ragged_rankings, relative, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MODEL: dict[str, Any] = {"lm_head": False, "score_head": True, "num_layers": 2, "windows": (9, 9)}
COUNT = 7
LAYOUTS: dict[str, dict[str, Any]] = {
    "2x4": {"micro_batch_size": 4},
    "empty micro-batches": {"micro_batch_size": 3, "micro_batches": 5},
    "long rows": {"micro_batch_size": 8, "length": 512},
    "unshared": {"micro_batch_size": 2, "share": False},
}


def last_token_scorer() -> Model:
    """A model whose score is w × the token that is read: every value can be derived by hand."""

    def apply(variables, rows, cache=None, *, key=None):
        return variables["params"]["w"] * rows.tokens[..., None].astype(jnp.float32), cache, {}

    def scores(variables, hidden):
        return jnp.asarray(hidden)[..., 0]

    return replace(build(tiny_config(**MODEL)), apply=apply, scores=scores)


def value(examples, w=0.5, **settings):
    config = reward.Config(**settings)
    batch, model = reward.make_batch(config, examples), last_token_scorer()
    params = {"params": {"w": jnp.float32(w)}}

    @jax.jit
    def run(params, batch):
        return accumulate(reward.make_loss(config, model), reward.totals(batch), params, {}, batch, KEY)

    grads, metrics = run(params, batch)
    return float(grads["params"]["w"]), {name: metric.value() for name, metric in metrics.items()}


KEY = jax.random.key(0)
PAIR = {"prompt_ids": [9, 9], "chosen_ids": [7, 3], "rejected_ids": [1], "margin": 0.5}


def test_a_pair_by_hand():
    """Scores 0.5 × 3 = 1.5 and 0.5 × 1 = 0.5, margin 0.5: -log σ(1.5 - 0.5 - 0.5) = log(1 + e^-0.5) = 0.474077.

    Its derivative by w is -σ(-0.5) × (3 - 1) = -0.377541 × 2 = -0.755082.
    """
    gradient, metrics = value([PAIR])
    assert metrics["loss"] == pytest.approx(0.474077, abs=1e-6)
    assert gradient == pytest.approx(-0.755082, abs=1e-6)
    del metrics["loss"]
    assert metrics == {"min_reward": 0.5, "mean_reward": 1.0, "max_reward": 1.5, "accuracy": 1.0, "margin": 1.0}


def test_centring_by_hand():
    """The same pair with c = 0.01: 0.01 × (1.5 + 0.5)² = 0.04 more; by w, 0.01 × 2 × 2 × (3 + 1) = 0.16 more."""
    gradient, metrics = value([PAIR], center_rewards_coefficient=0.01)
    assert metrics["loss"] == pytest.approx(0.514077, abs=1e-6)
    assert gradient == pytest.approx(-0.595082, abs=1e-6)


def test_rankings_by_hand():
    """Last tokens 2, 6, 4 of ranks 1, 0, 1 score 1, 3, 2: the pairs are (3, 1) and (3, 2), for the tie is none.

    log(1 + e^-2) = 0.126928 and log(1 + e^-1) = 0.313262, mean 0.220095. With the pair above as another prompt the loss
    is (0.220095 + 0.474077) / 2 = 0.347086, the mean over prompts and not over pairs, while `margin` and `accuracy` are
    means over the three pairs: (2 + 1 + 1) / 3. A third prompt ranks wrongly: last token 1 above 5, scores 0.5 and 2.5,
    loss log(1 + e^2) = 2.126928, in the mean (0.220095 + 0.474077 + 2.126928) / 3 = 0.940367.
    """
    ranked = {
        "prompt_ids": [5],
        "completion_ids": [2, 8, 6, 9, 9, 4],
        "sizes": [1, 2, 3],
        "ranks": [1, 0, 1],
        "margins": [0, 0, 0],
    }
    _, metrics = value([ranked, PAIR])
    assert metrics["loss"] == pytest.approx(0.347086, abs=1e-6)
    assert metrics["margin"] == pytest.approx(4 / 3) and metrics["accuracy"] == 1
    assert (metrics["min_reward"], metrics["max_reward"]) == (0.5, 3.0)
    assert metrics["mean_reward"] == pytest.approx((1 + 3 + 2 + 1.5 + 0.5) / 5)
    wrong = {"prompt_ids": [5], "chosen_ids": [1], "rejected_ids": [7, 5]}
    _, metrics = value([ranked, PAIR, wrong])
    assert metrics["loss"] == pytest.approx(0.940367, abs=1e-6)
    assert metrics["accuracy"] == 3 / 4 and metrics["margin"] == pytest.approx((4 - 2) / 4)


def test_tokens_are_counted_with_each_prompt():
    assert reward.count_tokens(PAIR) == 2 * 2 + 2 + 1
    assert reward.count_tokens({"prompt_ids": [1, 2], "completion_ids": [1] * 9, "sizes": [4, 2, 3]}) == 3 * 2 + 9


@pytest.mark.parametrize(("sizes", "ranks"), [([1] * 8, range(8)), ([2, 1], [1, 1]), ([3], [0])])
def test_what_cannot_be_ranked(sizes, ranks):
    example = {"prompt_ids": [1], "completion_ids": [1] * sum(sizes), "sizes": sizes, "ranks": list(ranks)}
    with pytest.raises(ValueError, match="2 to 7, of unequal rank"):
        reward.make_batch(reward.Config(), [{**example, "margins": [0.0] * len(sizes)}])


def direct_scores(model, variables, examples) -> list[np.ndarray]:
    """Per example the score of each completion, each text alone in a padded row."""
    texts = []
    for example in examples:
        for part in np.split(example["completion_ids"], np.cumsum(example["sizes"])[:-1]):
            texts.append(np.concatenate([example["prompt_ids"], part]))
    lengths = np.asarray([len(text) for text in texts])
    padded = np.stack([np.pad(text, (0, 64 - len(text))) for text in texts])
    rows = TokenRows.from_padded(padded, np.arange(64)[None] < lengths[:, None])
    every = jax.jit(lambda variables, rows: model.scores(variables, model.apply(variables, rows)[0]))(variables, rows)
    scores = np.asarray(every)[np.arange(len(texts)), lengths - 1]
    return np.split(scores, np.cumsum([len(example["sizes"]) for example in examples])[:-1])


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
def test_a_score_is_read_at_the_last_token_of_its_text(share):
    """Packed with others or alone, shared prompt or not: the same score. Another last token: another score."""
    model, variables = tiny_model(**MODEL)
    examples = ragged_rankings(3, seed=2)
    config = reward.Config(share_prompt=share)
    batch = reward.make_batch(config, examples, micro_batch_size=3)
    scores = np.asarray(jax.jit(reward.make_scores(model))(variables, batch))[0].reshape(3, 7)
    alone = direct_scores(model, variables, examples)
    for found, wanted in zip(scores, alone, strict=True):
        np.testing.assert_allclose(found[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)
        assert not found[len(wanted) :].any()
    assert np.ptp(np.concatenate(alone)) > 1
    changed = [dict(example) for example in examples]
    changed[1]["completion_ids"] = changed[1]["completion_ids"].copy()
    changed[1]["completion_ids"][-1] = 1 + changed[1]["completion_ids"][-1] % 90
    batch = reward.make_batch(config, changed, micro_batch_size=3)
    moved = np.asarray(jax.jit(reward.make_scores(model))(variables, batch))[0].reshape(3, 7) != scores
    last = len(examples[1]["sizes"]) - 1
    assert moved[1, last]
    moved[1, last] = False
    assert not moved.any()


def gradient(model, variables, share=True, mesh=None, **layout):
    config = reward.Config(center_rewards_coefficient=0.05, share_prompt=share)
    examples = [*ragged_rankings(COUNT - 2), *ragged_pairs(2)]
    batch = reward.make_batch(config, examples, shards=1 if mesh is None else data_shards(mesh), **layout)
    if mesh is not None:
        batch = place_batch(mesh, batch)
        variables = jax.device_put(variables, param_shardings(mesh, variables))

    def compute(params, batch):
        totals = reward.totals(batch)
        grads, metrics = accumulate(reward.make_loss(config, model), totals, params, {}, batch, KEY)
        return grads, metrics

    return jax.jit(compute)({"params": variables["params"]}, batch)


def assert_same(got, wanted, bound=1e-5):
    assert relative(got[0], wanted[0]) <= bound
    for name, metric in wanted[1].items():
        assert got[1][name].value() == pytest.approx(metric.value(), rel=2e-5, abs=2e-5), name


@pytest.fixture(scope="module")
def whole():
    return gradient(*tiny_model(**MODEL), micro_batch_size=8)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_gradients_do_not_depend_on_the_layout(layout, whole):
    assert_same(gradient(*tiny_model(**MODEL), **layout), whole)


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)], ids=["8x1x1", "2x2x2"])
def test_gradients_do_not_depend_on_the_mesh(mesh, whole):
    assert_same(gradient(*tiny_model(**MODEL), mesh=make_mesh(mesh), micro_batch_size=4), whole)


def test_evaluation_is_the_mean_over_all_prompts(whole):
    """The same numbers as a step's, merged from batches of unequal size."""
    model, variables = tiny_model(**MODEL)
    config, examples = reward.Config(center_rewards_coefficient=0.05), [*ragged_rankings(COUNT - 2), *ragged_pairs(2)]
    run = jax.jit(lambda batch: evaluate(reward.make_loss(config, model), reward.totals, variables, {}, batch))
    merged = Interval()
    for part in (examples[:5], examples[5:]):
        merged = merged.add(run(reward.make_batch(config, part, micro_batch_size=3, micro_batches=2, length=256)))
    values = merged.values()
    assert values.keys() == whole[1].keys()
    for name, metric in whole[1].items():
        assert values[name] == pytest.approx(metric.value(), rel=2e-5, abs=2e-5), name


def test_in_float64_only_rounding_is_left():
    with jax.enable_x64(True):
        model = tiny_model(dtype="float64", **MODEL)
        one = gradient(*model, micro_batch_size=8)
        assert one[0]["params"]["score"]["kernel"].dtype == np.float64
        assert relative(gradient(*model, micro_batch_size=3, micro_batches=5, share=False)[0], one[0]) <= 1e-10


def test_the_comparison_can_fail():
    """Reading one token early, as a reader of predictions would, gives other gradients."""
    model, variables = tiny_model(**MODEL)
    config = reward.Config()
    batch = reward.make_batch(config, ragged_rankings(4))
    early = replace(batch.predictions, sources=np.maximum(np.asarray(batch.predictions.sources) - 1, 0))

    def compute(batch):
        loss = reward.make_loss(config, model)
        return accumulate(loss, reward.totals(batch), {"params": variables["params"]}, {}, batch, KEY)[0]

    compute = jax.jit(compute)
    assert relative(compute(replace(batch, predictions=early)), compute(batch)) > 1e-2
