"""Losses that couple the batch: exact under any split, packing, sharing and mesh, and what they couple is right."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import UNPAIRED_LOSSES, sum_by_completion
from jaxalign.methods import common, preference, unpaired_preference
from jaxalign.models import build
from jaxalign.models.config import DType
from jaxalign.sharding import data_shards, make_mesh, param_shardings, place_batch
from jaxalign.training.coupled import CoupledLoss
from jaxalign.training.step import evaluate
from tests.layouts import ragged_pairs, ragged_thumbs, relative, tiny_config
from tests.methods.test_layouts import COUNT, LAYOUTS, MESHES, assert_same, gradient

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KTO = unpaired_preference.Config(beta=0.3, desirable_weight=1.5, undesirable_weight=0.8, logits_chunk=17)


def tiny_model(dtype: DType = "float32"):
    """One layer with a window that bites, and a spread of logits of more than 1."""
    model = build(tiny_config(num_layers=1, windows=(9,)), param_dtype=dtype, compute_dtype=dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    spread = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape) + (len(x.shape) < 3), x.dtype)  # noqa: E731
    return model, jax.tree.map(spread, shapes)


def filled(method, config, variables, model, batch):
    """With log-probs of a reference that is far enough away for z0 and delta to matter."""
    other = jax.tree.map(lambda x: x * 1.1, variables)
    batch = jax.jit(method.make_reference(config, model))(other, batch)
    if method is preference or not unpaired_preference.carries(config):
        return batch
    carry = {"mean": np.float32(0.4), "count": np.float32(5)}
    return jax.jit(unpaired_preference.make_carry(config, model))(variables, batch, carry)[0]


def run(method, config, examples, model, variables, mesh=None, **layout):
    batch = method.make_batch(config, examples, shards=1 if mesh is None else data_shards(mesh), **layout)
    if mesh is not None:
        batch = place_batch(mesh, batch)
        variables = jax.device_put(variables, param_shardings(mesh, variables))
    return gradient(method, config, model, variables, filled(method, config, variables, model, batch))


def run_kto(model, mesh=None, config=KTO, **layout):
    return run(unpaired_preference, config, ragged_thumbs(COUNT), *model, mesh=mesh, **layout)


def run_aot(model, share=True, **layout):
    config = preference.Config(loss_type="aot", beta=0.3, label_smoothing=0.1, share_prompt=share, logits_chunk=17)
    return run(preference, config, ragged_pairs(COUNT), *model, **layout)


@pytest.fixture(scope="module")
def whole():
    found = run_kto(tiny_model(), micro_batch_size=8)
    kl, weight = found[1]["kl"]
    assert kl / weight > 0.1 and weight == COUNT  # a z0 of 0 would hide what couples
    return found


def test_kto_does_not_depend_on_the_layout(whole):
    """Five micro-batches, one of desirable examples alone, two empty; a copy of the prompt for each completion."""
    config = replace(KTO, share_prompt=False)
    assert_same(run_kto(tiny_model(), config=config, **LAYOUTS["empty micro-batches"]), whole, 1e-5)


def test_kto_does_not_depend_on_the_mesh(whole):
    assert_same(run_kto(tiny_model(), mesh=make_mesh(MESHES["2x2x2"]), micro_batch_size=4), whole, 1e-5)


def test_aot_does_not_depend_on_the_layout():
    """In float64, where only rounding is left; KTO's turn comes below."""
    with jax.enable_x64(True):
        wanted = run_aot(tiny_model("float64"), micro_batch_size=8)
        found = run_aot(tiny_model("float64"), share=False, **LAYOUTS["empty micro-batches"])
        assert relative(found[0], wanted[0]) <= 1e-10
        assert_same(found, wanted, 1e-10)


def direct(model, variables, other, examples):
    """The KTO loss from rows of one completion each, without packing, prompts shared or any second pass."""

    def log_ratios(params, prompt, completion):
        example = {"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion[:1]}
        batch = preference.make_batch(preference.Config(share_prompt=False), [example], length=128)
        one = jax.tree.map(lambda x: x[0], batch)
        ours, theirs = (common.read(model, each, one, None, 32).logps for each in ({"params": params}, other))
        return sum_by_completion(ours - theirs, one.predictions.completions, 2)[0]

    def loss(params):
        own = [log_ratios(params, e["prompt_ids"], e["completion_ids"]) for e in examples]
        mismatched = [
            log_ratios(params, e["prompt_ids"], before["completion_ids"])
            for e, before in zip(examples, [examples[-1], *examples[:-1]], strict=True)
        ]
        z0 = jax.lax.stop_gradient(jnp.maximum(sum(mismatched) / len(examples), 0))
        values = [
            1.5 * (1 - jax.nn.sigmoid(0.3 * (a - z0))) if e["label"] else 0.8 * (1 - jax.nn.sigmoid(0.3 * (z0 - a)))
            for a, e in zip(own, examples, strict=True)
        ]
        return sum(values) / len(examples), z0

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_kto_is_its_formula():
    """An odd batch in two micro-batches and an empty one: z0, the loss and its gradient, none of it through z0."""
    with jax.enable_x64(True):
        model, variables = tiny_model(dtype="float64")
        other, examples = jax.tree.map(lambda x: x * 1.1, variables), ragged_thumbs(3)
        got, metrics = run(unpaired_preference, KTO, examples, model, variables, micro_batch_size=2, micro_batches=3)
        (loss, z0), wanted = direct(model, variables, other, examples)
        assert metrics["loss"][0] == pytest.approx(float(loss), rel=1e-9)
        assert metrics["kl"][0] / metrics["kl"][1] == pytest.approx(float(z0), rel=1e-6) and z0 > 0.1
        assert relative(got["params"], wanted) <= 1e-9


def test_evaluation_is_the_same_loss_and_metrics(whole):
    model, variables = tiny_model()
    batch = unpaired_preference.make_batch(KTO, ragged_thumbs(COUNT), micro_batch_size=3)
    batch = filled(unpaired_preference, KTO, variables, model, batch)
    loss = unpaired_preference.make_loss(KTO, model)
    assert isinstance(loss, CoupledLoss)
    found = jax.jit(lambda p, b: evaluate(loss, unpaired_preference.totals, p, {}, b))(
        {"params": variables["params"]}, batch
    )
    for name, (total, weight) in whole[1].items():
        assert found[name].value() == pytest.approx(float(total) / float(weight), rel=2e-5, abs=2e-5), name


def test_the_metrics_are_those_of_the_completions(whole):
    """From log-probs by completion: desirable are chosen, the borrowed completions count nowhere but in kl."""
    model, variables = tiny_model()
    examples, other = ragged_thumbs(COUNT), jax.tree.map(lambda x: x * 1.1, variables)
    batch = unpaired_preference.make_batch(replace(KTO, loss_type="apo_zero_unpaired"), examples)
    logps = jax.jit(common.make_logps(model, 32))
    sums = [
        np.asarray(sum_by_completion(logps(v, batch)[0], batch.predictions.completions[0], 2 * COUNT))[0::2]
        for v in (variables, other)
    ]
    liked = np.array([example["label"] for example in examples])
    rewards = 0.3 * (sums[0] - sums[1])
    wanted = {
        "rewards/chosen": rewards[liked].mean(),
        "rewards/rejected": rewards[~liked].mean(),
        "rewards/margins": rewards[liked].mean() - rewards[~liked].mean(),
        "logps/chosen": sums[0][liked].mean(),
        "logps/rejected": sums[0][~liked].mean(),
    }
    assert 1 < liked.sum() < COUNT - 1
    for name, value in wanted.items():
        total, weight = whole[1][name]
        assert total / weight == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert set(whole[1]) == {*wanted, "logits/chosen", "logits/rejected", "entropy", "kl", "loss"}


def test_a_kind_that_is_not_there_has_no_metrics():
    """Nothing is 0 that was not computed; an empty completion, which teaches nothing, still counts."""
    model, variables = tiny_model()
    examples = [{**example, "label": True} for example in ragged_thumbs(4)]
    examples[1]["completion_ids"] = np.zeros(0, np.int32)
    batch = unpaired_preference.make_batch(KTO, examples, micro_batch_size=2)
    batch = filled(unpaired_preference, KTO, variables, model, batch)
    loss = unpaired_preference.make_loss(KTO, model)
    metrics = jax.jit(lambda p, b: evaluate(loss, unpaired_preference.totals, p, {}, b))(variables, batch)
    values = {name: metric.value() for name, metric in metrics.items()}
    absent = {name for name, value in values.items() if value is None}
    assert absent == {"rewards/rejected", "rewards/margins", "logps/rejected", "logits/rejected"}
    assert all(np.isfinite(value) for name, value in values.items() if name not in absent)
    assert metrics["rewards/chosen"].weight == 4


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="one example alone has none"):
        unpaired_preference.make_batch(KTO, ragged_thumbs(3)[:1])
    config = replace(KTO, loss_type="apo_zero_unpaired")
    assert unpaired_preference.make_batch(config, ragged_thumbs(3)[:1]).present.tolist() == [[1.0, 0.0]]


def test_a_borrowed_completion_is_the_predecessors_cut_to_fit():
    """With at most 12 tokens: 4 after a prompt of 8, all 6 after one of 5, 3 after one of 9."""
    sizes = [(8, 6), (5, 6), (9, 4)]
    examples = [
        {"prompt_ids": np.full(prompt, 1), "completion_ids": 10 * i + np.arange(completion), "label": True}
        for i, (prompt, completion) in enumerate(sizes)
    ]
    borrowed = [each["mismatched_ids"].tolist() for each in unpaired_preference.borrow(KTO, examples, max_length=12)]
    assert borrowed == [[20, 21, 22, 23], [0, 1, 2, 3, 4, 5], [10, 11, 12]]
    whole = unpaired_preference.borrow(KTO, examples)
    assert [len(each["mismatched_ids"]) for each in whole] == [4, 6, 6]


def test_the_running_mean_is_that_of_all_rewards_so_far():
    """Two batches with the policy moved between: delta is the mean over all their examples, none weighed twice."""
    model, variables = tiny_model()
    config, examples = replace(KTO, loss_type="bco"), ragged_thumbs(7)
    other, moved = (jax.tree.map(lambda x, f=f: x * f, variables) for f in (1.1, 1.05))
    update, logps = (jax.jit(f) for f in (unpaired_preference.make_carry(config, model), common.make_logps(model, 32)))
    carry, rewards = unpaired_preference.start_carry(config), []
    for part, policy in ((examples[:4], variables), (examples[4:], moved)):
        batch = unpaired_preference.make_batch(config, part, micro_batch_size=3)
        batch = jax.jit(unpaired_preference.make_reference(config, model))(other, batch)
        batch, carry = update(policy, batch, carry)
        ratios = logps(policy, batch) - batch.fields["ref_logps"]
        for micro in range(ratios.shape[0]):
            sums = sum_by_completion(ratios[micro], batch.predictions.completions[micro], 6)
            rewards += [0.3 * float(x) for x, there in zip(sums, batch.present[micro], strict=True) if there]
        np.testing.assert_allclose(batch.fields["delta"], np.full(len(batch.present), np.mean(rewards)), rtol=1e-5)
    assert len(rewards) == 7 == float(carry["count"]) and np.std(rewards) > 0.1


def test_settings_that_cannot_be():
    for settings, message in (
        ({"loss_type": "dpo"}, "known: kto, bco, apo_zero_unpaired"),
        ({"beta": 0.0}, "beta"),
        ({"undesirable_weight": -1.0}, "undesirable_weight"),
        ({"precompute_ref_log_probs": True}, "change with every shuffle"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(KTO, **settings)
    assert all(unpaired_preference.Config(loss_type=name) for name in UNPAIRED_LOSSES)
    model, _ = tiny_model()
    bco = unpaired_preference.Config(loss_type="bco")
    batch = unpaired_preference.make_batch(bco, ragged_thumbs(3))
    with pytest.raises(ValueError, match="no ref_logps: fill it with make_reference"):
        evaluate(unpaired_preference.make_loss(bco, model), unpaired_preference.totals, {}, {}, batch)
