"""The load-balancing loss: by hand, and the same in every layout and on every mesh."""

from __future__ import annotations

from collections import namedtuple
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import balance_loss
from jaxalign.methods import balance, preference, sft
from jaxalign.methods.common import make_eval_step
from jaxalign.models import build
from jaxalign.packing import Document, pack
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.training.step import PreparedLoss
from tests.layouts import SPARSE, ragged_texts, relative, tiny_model
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
