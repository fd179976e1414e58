"""The load-balancing loss: by hand, and the same in every layout and on every mesh."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.losses import balance_loss
from jaxalign.methods import (
    balance,
    ppo,
    preference,
    process_reward,
    reference_free,
    reward,
    sft,
    unpaired_preference,
)
from jaxalign.methods.common import make_eval_step, needs_reference
from jaxalign.methods.ppo_models import routers_of
from jaxalign.models import build
from jaxalign.packing import Document, pack
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.training.step import PreparedLoss, accumulate, evaluate
from jaxalign.types import TokenRows
from tests.layouts import (
    SPARSE,
    ragged_pairs,
    ragged_rankings,
    ragged_steps,
    ragged_texts,
    ragged_thumbs,
    relative,
    tiny_model,
)
from tests.methods.test_layouts import assert_same, gradient, run_preference, run_sft

pytestmark = pytest.mark.usefixtures("compiled_quickly")

COUNT = 7
UNEVEN = {"micro_batch_size": 3, "micro_batches": 4}  # 3, 3, 1 and no examples


@pytest.fixture(scope="module")
def sparse():
    return tiny_model(**SPARSE)


@pytest.fixture(scope="module")
def wanted(sparse):
    return run_sft(*sparse, micro_batch_size=8)


def test_by_hand():
    # 10 tokens to 2 of 4 experts each; f = (8, 6, 4, 2) / 10, P = (5, 3, 1, 1) / 10:
    # 4 · (40 + 18 + 4 + 2) / 100 = 2.56. Only P has a gradient, 4 f / 10 per unit of its sum.
    loads, probs = jnp.array([8.0, 6, 4, 2]), jnp.array([5.0, 3, 1, 1])
    value, grads = jax.value_and_grad(partial(balance_loss, experts_per_token=2), argnums=(0, 1))(probs, loads)
    assert float(value) == pytest.approx(2.56, rel=1e-6)
    np.testing.assert_allclose(grads[0], [0.32, 0.24, 0.16, 0.08], rtol=1e-6)
    assert not grads[1].any()
    # Two parts of the batch add up; no tokens give 0; even use gives experts_per_token, the least.
    parts = [balance_loss(part, loads, experts_per_token=2) for part in (probs * 0.3, probs * 0.7)]
    assert float(sum(parts)) == pytest.approx(2.56, rel=1e-6)
    assert float(balance_loss(jnp.zeros(4), jnp.zeros(4), experts_per_token=2)) == 0
    assert float(balance_loss(jnp.full(4, 2.5), jnp.full(4, 5.0), experts_per_token=2)) == pytest.approx(2)


def test_a_prompt_weighs_as_much_as_its_completions():
    # A prompt of 3 with completions of 4, 1 and 2 (their last tokens are no inputs: 3, 0 and 1 remain), beside a text.
    shared = Document(np.arange(1, 4), (np.arange(4), np.arange(1), np.arange(2)))
    text = Document(np.arange(1, 5), targets=np.array([False, True, True, True]))
    batch = pack([shared, text], completions=3, length=16)
    found = {
        number: balance.token_weights(jax.tree.map(lambda x: x[0], batch))[
            np.asarray(batch.rows.documents[0] == number)
        ]
        for number in (0, 1, 2)
    }
    by_size = {len(weights): weights.tolist() for weights in found.values()}
    assert by_size == {7: [3, 3, 3, 1, 1, 1, 1], 3: [1, 1, 1], 6: [0] * 6}
    apart = pack([shared, text], completions=3, length=16, share_prompt=False)
    copies = balance.token_weights(jax.tree.map(lambda x: x[0], apart))
    assert float(copies.sum()) == sum(map(sum, by_size.values())) == np.asarray(apart.rows.documents > 0).sum()


@pytest.mark.parametrize(
    "layout", [UNEVEN, pytest.param({"micro_batch_size": 1, "length": 128}, marks=pytest.mark.slow)], ids=str
)
def test_the_split_changes_nothing(sparse, wanted, layout):
    assert float(wanted[1]["aux_loss"][0]) > 2.1  # 2 is even use
    assert_same(run_sft(*sparse, **layout), wanted, 1e-5)


@pytest.mark.slow
def test_prompts_may_be_shared(sparse):
    whole = run_preference(*sparse, micro_batch_size=8)
    assert_same(run_preference(*sparse, share=False, **UNEVEN), whole, 1e-5)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(MeshConfig(8), marks=pytest.mark.slow), MeshConfig(1, 2, 1, 4), MeshConfig(1, 1, 2, 4)],
    ids=str,
)
def test_meshes_change_nothing(sparse, wanted, mesh):
    mesh = make_mesh(mesh)
    known = build(sparse[0].config, mesh=mesh, remat="full")
    assert_same(run_sft(known, sparse[1], mesh=mesh, micro_batch_size=4), wanted, 1e-5)


@pytest.mark.slow
def test_a_mesh_that_the_model_does_not_know_changes_nothing(sparse, wanted):
    assert_same(run_sft(*sparse, mesh=make_mesh(MeshConfig(1, 1, 2, 4)), micro_batch_size=8), wanted, 1e-5)


def test_the_loss_of_each_micro_batch_would_be_another(sparse, wanted):
    """Without the loads of the whole batch a split shows, so the bounds above can fail."""
    config = sft.Config(logits_chunk=17)
    batch = sft.make_batch(config, ragged_texts(COUNT), micro_batch_size=1)
    model, variables = sparse
    coupled = sft.make_loss(config, model)
    assert isinstance(coupled, PreparedLoss)
    method = namedtuple("Method", "make_loss totals")(lambda config, model: coupled.loss, sft.totals)
    alone = gradient(method, config, model, variables, batch)
    assert relative(alone[0], wanted[0]) > 1e-3


def test_the_coefficient(sparse, wanted):
    """None is the model's own, 0 is off, and a dense model has none."""
    model, variables = sparse
    batch = sft.make_batch(sft.Config(), ragged_texts(COUNT), micro_batch_size=8)
    off, grads = {}, {}
    for weight in (0.0, 0.3):
        found = gradient(sft, sft.Config(router_aux_loss_coef=weight), model, variables, batch)
        grads[weight], metrics = jax.device_get(found)
        off[weight] = float(metrics["loss"][0])
        assert ("aux_loss" in metrics) == bool(weight)
    aux, loss = (float(wanted[1][name][0]) for name in ("aux_loss", "loss"))
    assert loss == pytest.approx(off[0.0] + 0.1 * aux, rel=1e-5)
    assert off[0.3] == pytest.approx(off[0.0] + 0.3 * aux, rel=1e-5)
    # The gradient is linear in it.
    blended = jax.tree.map(lambda none, much: none + (much - none) / 3, grads[0.0], grads[0.3])
    assert relative(blended, wanted[0]) < 1e-5 < 1e-3 < relative(grads[0.0], wanted[0])
    dense = tiny_model(num_layers=1, windows=(9,))[0]
    assert not isinstance(preference.make_loss(preference.Config(), dense), PreparedLoss)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1, but the model has no experts"):
        preference.make_loss(preference.Config(router_aux_loss_coef=0.1), dense)


def test_evaluation_takes_the_whole_batch(sparse, wanted):
    config = sft.Config(logits_chunk=17)
    batch = sft.make_batch(config, ragged_texts(COUNT), **UNEVEN)
    metrics = jax.jit(make_eval_step(sft, config, sparse[0]))({"params": sparse[1]["params"]}, {}, batch)
    assert metrics["aux_loss"].value() == pytest.approx(float(wanted[1]["aux_loss"][0]), rel=1e-5)
    assert metrics["loss"].value() == pytest.approx(float(wanted[1]["loss"][0]), rel=1e-5)


def by_hand(model, variables, sequences) -> float:
    """The load-balancing loss of sequences that are read one by one, each in a padded row of its own."""
    width = max(map(len, sequences))
    ids, mask = (np.zeros((len(sequences), width), np.int32) for _ in range(2))
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    aux = jax.jit(model.apply)(variables, TokenRows.from_padded(ids, mask))[2]
    per_token = model.config.experts_per_token
    return float(balance_loss(aux["router_probs"], aux["expert_loads"], experts_per_token=per_token))


def read_completions(examples, *names):
    """Prompt and completion of each; a completion's last token is predicted and not read."""
    return [np.concatenate([each["prompt_ids"], each[name][:-1]]) for each in examples for name in names]


def read_rankings(examples):
    parts = [np.split(each["completion_ids"], np.cumsum(each["sizes"])[:-1]) for each in examples]
    return [
        np.concatenate([each["prompt_ids"], ids])
        for each, ids_of in zip(examples, parts, strict=True)
        for ids in ids_of
    ]


def read_steps(examples):
    """As far as the last step's end."""
    return [np.concatenate([each["prompt_ids"], each["completion_ids"][: each["ends"][-1] + 1]]) for each in examples]


def read_pairs(examples):
    return read_completions(examples, "chosen_ids", "rejected_ids")


ONE_LAYER: dict[str, Any] = SPARSE | {"num_layers": 1, "windows": (9,), "sparse_layers": (True,)}
SCORER: dict[str, Any] = {"lm_head": False, "score_head": True}
# Method, settings, heads, examples, and what of them is read: of KTO not the completions of others.
METHODS = {
    "kto": (unpaired_preference, {"beta": 0.3}, {}, ragged_thumbs, lambda x: read_completions(x, "completion_ids")),
    "apo_zero": (
        unpaired_preference,
        {"loss_type": "apo_zero_unpaired"},
        {},
        ragged_thumbs,
        lambda x: read_completions(x, "completion_ids"),
    ),
    "aot": (preference, {"loss_type": "aot"}, {}, ragged_pairs, read_pairs),
    "orpo": (reference_free, {"loss_type": "orpo"}, {}, ragged_pairs, read_pairs),
    "reward": (reward, {}, SCORER, ragged_rankings, read_rankings),
    "process_reward": (process_reward, {}, SCORER | {"score_labels": 2}, ragged_steps, read_steps),
}


def settle(method, settings, model, variables, examples, **layout):
    """A config, and its batch with what the reference says."""
    config = method.Config(**settings)
    batch = method.make_batch(config, examples, **layout)
    if needs_reference(method, config):
        batch = jax.jit(method.make_reference(config, model))(jax.tree.map(lambda x: x * 0.97, variables), batch)
    return config, batch


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_it(name):
    """In an uneven split, as of sequences that are read one by one; the loss is its share more."""
    method, settings, heads, make, read = METHODS[name]
    model, variables = tiny_model(**ONE_LAYER, **heads)
    examples, found = make(COUNT), {}
    for given in (None, 0.0):
        known = {**settings, "router_aux_loss_coef": given}
        config, batch = settle(method, known, model, variables, examples, **UNEVEN)
        found[given] = jax.jit(make_eval_step(method, config, model))(variables, {}, batch)
    aux = found[None]["aux_loss"].value()
    assert aux == pytest.approx(by_hand(model, variables, read(examples)), rel=1e-5)
    assert found[None]["loss"].value() == pytest.approx(found[0.0]["loss"].value() + 0.1 * aux, rel=1e-5)
    assert "aux_loss" not in found[0.0]
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1, but the model has no experts"):
        method.make_loss(method.Config(**settings, router_aux_loss_coef=0.1), tiny_model(num_layers=1, windows=(9,))[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "aot"])
def test_losses_that_couple_the_batch_have_its_gradient(name):
    """It goes through both passes: the same in any split, and linear in the coefficient."""
    method, settings, _, make, _ = METHODS[name]
    model, variables = tiny_model(**ONE_LAYER)

    def run(coefficient, share, **layout):
        known = {**settings, "router_aux_loss_coef": coefficient, "share_prompt": share}
        config, batch = settle(method, known, model, variables, make(COUNT), **layout)
        return gradient(method, config, model, variables, batch)[0]

    whole = run(0.3, True, micro_batch_size=8)
    assert relative(run(0.3, False, **UNEVEN), whole) <= 1e-5 < 1e-3 < relative(run(0.0, True, **UNEVEN), whole)


@pytest.mark.parametrize("critic", [pytest.param("separate", marks=pytest.mark.slow), "shared"])
def test_policy_and_critic_of_ppo(critic):
    """Each has its own; a shared one is the policy's. A dense critic beside a sparse policy has none."""
    config = ppo.Config(critic=critic, num_ppo_epochs=1)
    model, variables = tiny_model(**ONE_LAYER)
    other = tiny_model(5, **ONE_LAYER | {"router_aux_loss_coef": 0.3}, **SCORER) if critic == "separate" else None
    models, by_role = ppo.add_critic(config, model, variables, jax.random.key(1), start=other)
    state, frozen = ppo.init(config, models, by_role, optax.sgd(0.1), jax.random.key(2))
    rng, pairs = np.random.default_rng(0), ragged_pairs(COUNT)
    groups = [
        {
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": (ids := [pair["chosen_ids"], pair["rejected_ids"]]),
            **{name: [rng.normal(size=len(each)) for each in ids] for name in ("advantages", "returns", "values")},
        }
        for pair in pairs
    ]

    def run(coefficient, compute, **layout):
        known = replace(config, router_aux_loss_coef=coefficient)
        batch = ppo.make_batch(known, groups, **layout)
        return jax.jit(lambda params: compute(ppo.make_loss(known, models), params, batch))(state.params)

    def judge(loss, params, batch):
        return evaluate(loss, ppo.totals, params, frozen, batch)

    found, off = run(None, judge, **UNEVEN), run(0.0, judge)
    terms = {"aux_loss": (0.1, by_hand(model, variables, read_pairs(pairs)))}
    if other is not None:
        terms["critic/aux_loss"] = (0.3, by_hand(*other, read_pairs(pairs)))
    assert {name for name in found if "aux_loss" in name} == terms.keys()
    for name, (_, value) in terms.items():
        assert found[name].value() == pytest.approx(value, rel=1e-5)
    added = sum(weight * value for weight, value in terms.values())
    assert found["loss"].value() == pytest.approx(off["loss"].value() + added, rel=1e-5)
    dense = ppo.Models(model, tiny_model(num_layers=1, windows=(9,), **SCORER)[0])
    assert [each.name for each in routers_of(replace(config, critic="separate"), dense)] == ["aux_loss"]
    if other is not None:

        def grads(loss, params, batch):
            return accumulate(loss, ppo.totals(batch), params, frozen, batch, jax.random.key(0))[0]

        assert relative(run(None, grads, **UNEVEN), run(None, grads)) <= 1e-5


def test_noise_on_the_embeddings_changes_the_loads_of_all_micro_batches():
    """They are counted with NEFTune's noise too, so that a split changes nothing under it either."""
    model, variables = tiny_model(**ONE_LAYER)
    config = sft.Config(neftune_noise_alpha=20.0)
    optimizer = optax.sgd(1.0)

    def step(**layout):
        batch = sft.make_batch(config, ragged_texts(COUNT), **layout)
        state, frozen = sft.init(config, model, variables, optimizer, jax.random.key(0))
        return jax.jit(sft.make_step(config, model, optimizer))(state, frozen, batch)[1]

    whole, split = step(micro_batch_size=8), step(**UNEVEN)
    assert split["aux_loss"].value() == pytest.approx(whole["aux_loss"].value(), rel=1e-5)
    assert split["loss"].value() == pytest.approx(whole["loss"].value(), rel=1e-5)
