"""Adapters: what they add, what trains, and that layouts, merging and the sampler's form change nothing."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import models
from jaxalign.methods import grpo, ppo, preference, reward, sft
from jaxalign.methods.common import join_variables, split_variables
from jaxalign.models import LoraConfig, build
from jaxalign.models.families import from_hf
from jaxalign.models.lora import adapters, chosen_modules
from jaxalign.models.transformer import Model
from jaxalign.training.step import accumulate
from jaxalign.types import TokenRows, Variables
from tests.layouts import ragged_pairs, ragged_texts, relative, tiny_model
from tests.models.tiny import CONFIGS

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KEY = jax.random.key(7)
CONFIG = LoraConfig(r=4, alpha=6, dropout=0.0)


def adapted(model: Model, variables: Variables, config: LoraConfig = CONFIG) -> tuple[Model, Variables]:
    """With an adapter that has been trained: no part of it is 0."""
    model, variables = models.add_lora(model, variables, config, KEY)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(0.15 * rng.standard_normal(x.shape), x.dtype), variables["lora"])
    return model, {**variables, "lora": lora}


def small():
    """Two like layers, which compile faster than a pattern of five."""
    return tiny_model(num_layers=2, windows=(None, None))


def family(name: str):
    """A tiny model of a family, with a spread of logits of 1 and more."""
    model, rng = build(from_hf(CONFIGS[name])), np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, KEY)

    def draw(path, leaf):
        return jnp.asarray((path[-1].key == "scale") + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return model, jax.tree.map_with_path(draw, shapes)


def rows() -> TokenRows:
    mask = np.arange(12)[None] < np.array([12, 5, 9])[:, None]
    return TokenRows.from_padded(np.random.default_rng(3).integers(1, 90, (3, 12)), mask)


def logits(model: Model, variables: Variables, key=None) -> np.ndarray:
    run = jax.jit(lambda v: model.logits(v, model.apply(v, rows(), key=key)[0]))
    return np.asarray(run(variables))[np.asarray(rows().documents) > 0]


def test_a_projection_adds_scale_x_a_b():
    """By hand, on one projection: with r = 4, alpha = 6 the scale is 6/4, rank-stabilised 6/sqrt(4) = 3."""
    assert CONFIG.scale == 1.5 and LoraConfig(r=4, alpha=6, use_rslora=True).scale == 3.0
    for config, scale in ((CONFIG, 1.5), (LoraConfig(r=4, alpha=6, use_rslora=True, dropout=0.0), 3.0)):
        model, variables = adapted(*small(), LoraConfig(**{**vars(config), "target_modules": ("up_proj",)}))
        block, own = variables["params"]["segment_0"]["block_0"], variables["lora"]["segment_0"]["block_0"]
        delta = np.einsum("lir,lro->lio", own["mlp"]["up"]["a"], own["mlp"]["up"]["b"])
        merged = models.merge_lora(model, variables)[1]["params"]["segment_0"]["block_0"]
        wanted = np.asarray(block["mlp"]["up"]["kernel"]) + scale * delta
        np.testing.assert_allclose(merged["mlp"]["up"]["kernel"], wanted, atol=1e-6)
        np.testing.assert_array_equal(merged["mlp"]["gate"]["kernel"], block["mlp"]["gate"]["kernel"])
        assert set(variables["lora"]["segment_0"]["block_0"]) == {"mlp"}


@pytest.mark.parametrize("name", ["qwen2-windows", "gpt2"])
def test_applied_merged_and_unrolled_are_one(name):
    model, variables = adapted(*family(name))
    wanted, plain = logits(model, variables), logits(model, {"params": variables["params"]})
    assert np.abs(wanted - plain).max() > 1
    merged, full = models.merge_lora(model, variables)
    assert full.keys() == {"params"} and merged.config.lora is None
    np.testing.assert_allclose(logits(merged, full), wanted, atol=2e-4)
    apart, unroll = model.unrolled()
    assert "lora" not in unroll(variables)  # merged: it costs nothing more per token
    np.testing.assert_allclose(logits(apart, unroll(variables)), wanted, atol=2e-4)


def test_a_new_adapter_changes_nothing_and_is_drawn_as_pefts():
    model, variables = small()
    new, begun = models.add_lora(model, variables, LoraConfig(r=64), KEY)
    np.testing.assert_allclose(logits(new, begun), logits(model, variables), atol=1e-5)
    for path, own in adapters(begun["lora"]):
        a, bound = np.asarray(own["a"]), 1 / math.sqrt(own["a"].shape[1])
        assert not np.asarray(own["b"]).any(), path
        # Uniform in ±bound: its standard deviation is bound / sqrt(3); no two layers are drawn alike.
        assert np.abs(a).max() <= bound and a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05), path
        assert a.shape[0] == 1 or np.abs(a[0] - a[1]).max() > 0.1 * bound
    firsts = [float(own["a"].ravel()[0]) * math.sqrt(own["a"].shape[1]) for _, own in adapters(begun["lora"])]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize(("method", "examples"), [(sft, ragged_texts), (preference, ragged_pairs)])
def test_only_the_adapter_has_gradients_and_optimiser_state(method, examples):
    model, variables = models.add_lora(*small(), CONFIG, KEY)
    optimizer = optax.adam(1e-2)
    state, frozen = method.init(method.Config(), model, variables, optimizer, KEY)
    assert set(state.params) == {"lora"} and set(frozen) == {"params"}
    assert frozen["params"]["embed"]["embedding"] is variables["params"]["embed"]["embedding"]
    adapter = sum(leaf.size for leaf in jax.tree.leaves(variables["lora"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * adapter + 1
    batch = method.make_batch(method.Config(), examples(5), micro_batch_size=2)
    if method.needs_reference(method.Config()):
        # The reference is the same arrays with the adapter off, so that the first loss is -log sigmoid(0).
        batch = jax.jit(method.make_reference(method.Config(), model))({"params": variables["params"]}, batch)
    step = jax.jit(method.make_step(method.Config(), model, optimizer))
    new, metrics = step(state, frozen, batch)
    if method is preference:
        assert metrics["loss"].value() == pytest.approx(math.log(2), abs=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params, state.params)
    for path, change in adapters(moved["lora"]):
        assert change["b"] > 0, path  # b = 0 at first, so a has no gradient yet
    again, _ = step(new, frozen, batch)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), again.params, new.params)
    assert min(jax.tree.leaves(moved)) > 0


def test_the_layout_changes_nothing_under_an_adapter():
    model, variables = adapted(*small())
    config = preference.Config(beta=0.3, logits_chunk=17)
    params, frozen = split_variables(variables)

    def gradient(**layout):
        batch = preference.make_batch(config, ragged_pairs(7), **layout)
        batch = jax.jit(preference.make_reference(config, model))(frozen, batch)
        loss, totals = preference.make_loss(config, model), preference.totals(batch)
        return jax.jit(lambda p, b: accumulate(loss, totals, p, frozen, b, KEY))(params, batch)

    wanted = gradient(micro_batch_size=8)
    for layout in ({"micro_batch_size": 1}, {"micro_batch_size": 3, "micro_batches": 5, "length": 256}):
        grads, metrics = gradient(**layout)
        assert relative(grads, wanted[0]) <= 1e-5, layout
        assert metrics["loss"].value() == pytest.approx(wanted[1]["loss"].value(), rel=1e-5)
    assert relative(jax.tree.map(lambda g: g * 1.001, wanted[0]), wanted[0]) > 1e-5


def test_dropout_is_on_the_adapters_input_and_only_with_a_key():
    model, variables = adapted(*small(), LoraConfig(r=4, alpha=6, dropout=0.5))
    one, other = (logits(model, variables, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - other).max() > 0.1
    quiet = logits(model.rebuild(models.add_lora(*small(), CONFIG, KEY)[0].config), variables)
    np.testing.assert_array_equal(logits(model, variables), quiet)
    off = {"params": variables["params"]}
    np.testing.assert_array_equal(logits(model, off, jax.random.key(0)), logits(model, off))


def test_a_score_head_trains_in_full_beside_the_adapter():
    model, variables = models.add_score_head(*small(), KEY)
    model, variables = models.add_lora(model, variables, CONFIG, KEY)
    state, frozen = reward.init(reward.Config(), model, variables, optax.sgd(0.1), KEY)
    assert set(state.params) == {"lora", "params"} and set(state.params["params"]) == {"score"}
    assert "score" not in frozen["params"]
    step = jax.jit(reward.make_step(reward.Config(), model, optax.sgd(0.1)))
    new, _ = step(state, frozen, reward.make_batch(reward.Config(), ragged_pairs(4)))
    assert jnp.abs(new.params["params"]["score"]["kernel"] - state.params["params"]["score"]["kernel"]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, join_variables(state.params, frozen), variables)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_gives_the_critic_an_adapter_of_its_own(critic):
    model, variables = small()
    config = ppo.Config(critic=critic)
    both, by_role = ppo.add_critic(config, model, variables, KEY)
    kinds = {"policy": both.policy, "value": both.value}
    made = {
        role: models.add_lora(kinds[role], each, CONFIG, jax.random.key(i))
        for i, (role, each) in enumerate(by_role.items())
    }
    state, frozen = ppo.init(config, both, {role: each for role, (_, each) in made.items()}, optax.adam(1e-3), KEY)
    assert set(state.params) == set(by_role)
    for role, params in state.params.items():
        with_head = critic == "shared" or role == "value"
        assert set(params) == ({"lora", "params"} if with_head else {"lora"})
    if critic == "separate":
        shared = [frozen[role]["params"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"] for role in ("policy", "value")]
        assert shared[0] is shared[1]  # one base in memory
    whole = ppo.policy_of(state.params, frozen)
    assert set(whole) == {"params", "lora"} and "embed" in whole["params"]


def test_grpo_updates_an_adapter():
    model, variables = models.add_lora(*small(), CONFIG, KEY)
    config = grpo.Config(num_generations=2)
    state, frozen = grpo.init(config, model, variables, optax.sgd(1.0), KEY)
    groups = [
        {
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": [pair["chosen_ids"], pair["rejected_ids"]],
            "advantages": [1.0, -1.0],
        }
        for pair in ragged_pairs(3)
    ]
    step = jax.jit(grpo.make_step(config, model, optax.sgd(1.0)))
    new, metrics = step(state, frozen, grpo.make_batch(config, groups))
    assert metrics["grad_norm"].value() > 0
    assert all(jnp.abs(own["b"]).max() > 0 for _, own in adapters(new.params["lora"]))


def test_smollm2_trains_under_two_percent():
    """all-linear, r = 8, by shapes: 8 (in + out) for each of 7 modules in 30 layers."""
    hf = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    hf |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    model = build(from_hf(hf))
    shapes = jax.eval_shape(model.init, KEY)
    adapter = jax.eval_shape(lambda v: models.add_lora(model, v, LoraConfig(r=8), KEY)[1], shapes)["lora"]
    count, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (adapter, shapes))
    attention = (576 + 576) + 2 * (576 + 192) + (576 + 576)
    assert count == 30 * 8 * (attention + 3 * (576 + 1536)) == 2_442_240
    assert 134e6 < total < 135e6 and count / total < 0.02


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (("q_proj", "mlp.down_proj"), {"q_proj", "down_proj"}),
        (r".*\.self_attn\.[qv]_proj", {"q_proj", "v_proj"}),
    ],
)
def test_targets_as_peft_names_them(targets, wanted):
    found = chosen_modules(from_hf(CONFIGS["llama3"]), targets)
    assert {module.name.split(".")[-1] for module in found} == wanted and len(found) == 3 * len(wanted)


def test_gpt2s_fused_tensor_is_one_target():
    found = chosen_modules(from_hf(CONFIGS["gpt2"]), ("c_attn",))
    assert [module.name for module in found] == [f"transformer.h.{i}.attn.c_attn" for i in range(3)]
    model, variables = family("gpt2")
    lora = models.add_lora(model, variables, LoraConfig(r=4, target_modules=("c_attn",)), KEY)[1]["lora"]
    own = lora["segment_0"]["block_0"]["attention"]["query+key+value"]
    assert own["a"].shape == (3, 64, 4) and own["b"].shape == (3, 4, 3 * 64)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_porj",), "'q_porj' is no module of this model; the nearest is 'q_proj'"),
        (("embed_tokens",), "'embed_tokens' has no adapter here: only the linear modules of the blocks"),
        (("lm_head",), "'lm_head' has no adapter here"),
        (r"model\.layers\.1\..*", "matches model.layers.1.self_attn.q_proj but not the same module of all layers"),
        (r"nothing", "'nothing' matches no module"),
        (r"(", "'(' is not a regular expression"),
    ],
)
def test_other_targets_are_refused_by_name(targets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.add_lora(*family("llama3"), LoraConfig(target_modules=targets), KEY)


@pytest.mark.parametrize(
    ("name", "targets", "found"),
    [
        ("qwen3_moe", ("gate_proj",), "model.layers.1.mlp.experts.0.gate_proj"),
        ("qwen3_moe", r".*\.gate", "model.layers.1.mlp.gate"),
        ("qwen2_moe", ("shared_expert.up_proj",), "model.layers.1.mlp.shared_expert.up_proj"),
        ("mixtral", ("q_proj", "w1"), "model.layers.0.block_sparse_moe.experts.0.w1"),
    ],
)
def test_targets_that_name_experts_are_refused(name, targets, found):
    """PEFT would adapt them; the whole end of a dense layer's name is no expert's."""
    with pytest.raises(ValueError, match=rf"names {re.escape(found)}: experts, shared ones too"):
        chosen_modules(from_hf(CONFIGS[name]), targets)
    dense = [module.name for module in chosen_modules(from_hf(CONFIGS["qwen3_moe"]), ("mlp.gate_proj",))]
    assert dense == ["model.layers.0.mlp.gate_proj"]


def test_an_adapter_is_not_ignored():
    model, variables = small()
    new, begun = models.add_lora(model, variables, CONFIG, KEY)
    with pytest.raises(ValueError, match="the model was built without"):
        model.apply(begun, rows())
    with pytest.raises(ValueError, match="has an adapter already"):
        models.add_lora(new, begun, CONFIG, KEY)
