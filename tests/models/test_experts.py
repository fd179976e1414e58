"""Experts against loops over tokens, sparse configs, and experts on a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.models import build, load, save
from jaxalign.models.config import count_params, forward_flops, locate, segments
from jaxalign.models.families import FAMILIES, from_hf, tensors, to_hf
from jaxalign.models.grouped import blocked_matmul, grouped_matmul
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.types import TokenRows
from tests.layouts import SPARSE, tiny_config, tiny_model
from tests.models import tiny

SIZES = np.array([0, 41, 1, 0, 30, 0], np.int32)  # groups without rows, and blocks that no size divides


@pytest.mark.parametrize("product", [grouped_matmul, blocked_matmul, jax.lax.ragged_dot])
def test_grouped_products(product):
    rng = np.random.default_rng(0)
    real = SIZES.sum()
    x, matrices, dy = (rng.standard_normal(s).astype(np.float32) for s in ((90, 7), (6, 7, 5), (90, 5)))
    y, dx, dmatrices = np.zeros((90, 5)), np.zeros((90, 7)), np.zeros((6, 7, 5))
    for row, group in enumerate(np.repeat(np.arange(6), SIZES)):
        y[row], dx[row] = x[row] @ matrices[group], matrices[group] @ dy[row]
        dmatrices[group] += np.outer(x[row], dy[row])

    @jax.jit
    def run(x, matrices, dy):
        value, pull = jax.vjp(lambda x, matrices: product(x, matrices, SIZES), x, matrices)
        return value, *pull(dy)

    value, got_x, got_matrices = run(x, matrices, dy * (np.arange(90) < real)[:, None])
    np.testing.assert_allclose(value[:real], y[:real], atol=1e-5)
    np.testing.assert_allclose(got_x[:real], dx[:real], atol=1e-5)
    np.testing.assert_allclose(got_matrices, dmatrices, atol=3e-5)
    if product is grouped_matmul:
        # What stands behind the last group is neither read nor written, not even where it is no number.
        value, got_x, got_matrices = run(np.where(np.arange(90)[:, None] < real, x, np.nan), matrices, dy)
        assert not value[real:].any() and not got_x[real:].any()
        np.testing.assert_allclose(got_matrices, dmatrices, atol=3e-5)


def test_which_product_runs_where():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((90, 7), (6, 7, 5))]
    traced = jax.jit(lambda x, matrices: grouped_matmul(x, matrices, SIZES)).trace(*shapes)
    lowered = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu", "cuda")}
    assert {name: "ragged_dot" in text for name, text in lowered.items()} == {"tpu": True, "cpu": False, "cuda": False}
    assert all(("while" in text) is (name != "tpu") for name, text in lowered.items())


def test_a_sparse_layer_is_a_loop_over_tokens():
    """One block without attention's help: its experts' output, token by token; of 40 experts 10 and more get none."""
    changes = SPARSE | {"num_layers": 1, "windows": (None,), "sparse_layers": (True,), "num_experts": 40}
    model, variables = tiny_model(**changes)
    block = variables["params"]["segment_0"]["block_0"]
    leaves = jax.tree.map(lambda x: np.asarray(x[0], np.float64), block["experts"])
    block["attention"]["output"]["kernel"] *= 0.0
    block["mlp_norm"]["scale"] = jnp.ones_like(block["mlp_norm"]["scale"])
    variables["params"]["final_norm"]["scale"] = jnp.ones_like(variables["params"]["final_norm"]["scale"])
    rng = np.random.default_rng(1)
    rows = TokenRows.from_padded(rng.integers(1, 97, (2, 11)), np.arange(11)[None] < np.array([[11], [4]]))
    hidden, _, aux = jax.jit(lambda v: model.apply(v, rows))(variables)

    def norm(x):
        return x / np.sqrt(np.square(x).mean() + 1e-6)

    def expert(x, gate, up, down):
        inner = x @ gate
        return (inner / (1 + np.exp(-inner)) * (x @ up)) @ down

    loads, sums = np.zeros(40), np.zeros(40)
    embedding = np.asarray(variables["params"]["embed"]["embedding"], np.float64)
    for row, column in zip(*np.nonzero(np.asarray(rows.documents)), strict=True):
        x = embedding[rows.tokens[row, column]]
        inputs = norm(x)
        odds = np.exp(inputs @ leaves["router"]["kernel"])
        probs = odds / odds.sum()
        best = np.argsort(-probs)[:2]
        for e in best:
            kernels = (leaves[name]["kernel"][e] for name in ("gate", "up", "down"))
            x = x + probs[e] / probs[best].sum() * expert(inputs, *kernels)
        kernels = (leaves[f"shared_{name}"]["kernel"] for name in ("gate", "up", "down"))
        switch = (inputs @ leaves["shared_switch"]["kernel"])[0]
        x = x + expert(inputs, *kernels) / (1 + np.exp(-switch))
        np.testing.assert_allclose(hidden[row, column], norm(x), atol=2e-5)
        loads[best] += 1
        sums += probs
    assert loads.sum() == 2 * 15
    np.testing.assert_array_equal(aux["expert_loads"], loads)
    np.testing.assert_allclose(aux["router_probs"], sums, rtol=1e-5)


def test_parameters_and_flops_are_counted():
    model, variables = tiny_model(**SPARSE)
    config = dataclasses.replace(model.config, qk_norm=False, qkv_bias=False)
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(variables) if path[-1].key in ("kernel", "embedding")]
    assert count_params(config) == sum(leaf.size for leaf in kernels)
    # Of 8 experts of 3 matrices of 32 × 24 a token runs through 2, in 2 layers.
    assert count_params(config) - count_params(config, active=True) == 2 * 6 * 3 * 32 * 24
    blocks = count_params(config, embeddings=False, active=True)
    assert forward_flops(config, 10, 0, 0) == 2 * 10 * blocks
    # Attention 32 × 8 × (2·4 + 2·2) in 3 layers; a dense layer; and router, experts, shared expert and its switch.
    assert blocks == 3 * 3072 + 3 * 32 * 64 + 2 * (32 * 8 + 2 * 3 * 32 * 24 + 3 * 32 * 16 + 32)


def test_published_sizes():
    """Qwen3-30B-A3B by its config.json: 30.5B parameters, of which 3.3B are active."""
    hf = {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "head_dim": 128,
    }
    hf |= {"num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768}
    hf |= {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "mlp_only_layers": [],
        "rope_theta": 1e6,
        "max_window_layers": 48,
    }
    config = from_hf(hf)
    assert (round(count_params(config) / 1e9, 1), round(count_params(config, active=True) / 1e9, 2)) == (30.5, 3.35)
    assert len(segments(config)) == 1 and config.windows == (None,) * 48


def test_dense_layers_first_are_a_segment_of_their_own():
    config = tiny_config(
        **SPARSE | {"num_layers": 6, "windows": (None,) * 6, "sparse_layers": (False, False, True, True, True, True)}
    )
    found = [(s.start, s.repeats, [layer.sparse for layer in s.layers]) for s in segments(config)]
    assert found == [(0, 2, [False]), (2, 4, [True])]
    assert [locate(config, layer) for layer in (1, 2, 5)] == [(0, 1, 0), (1, 0, 0), (1, 3, 0)]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, (True,) * 5),
        ({"decoder_sparse_step": 2}, (False, True, False, True, False)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (False, False, False, True, False)),
        ({"mlp_only_layers": [0, 4]}, (False, True, True, True, False)),
    ],
)
def test_sparse_layers_of_a_config(changes, wanted):
    hf = tiny.CONFIGS["qwen3_moe"] | {"mlp_only_layers": []} | changes
    config = from_hf(hf)
    assert config.sparse_layers == wanted
    assert from_hf(to_hf(config)) == config
    names = {tensor.name for tensor in tensors(config)}
    for layer, sparse in enumerate(wanted):
        assert (f"model.layers.{layer}.mlp.up_proj.weight" in names) is not sparse
        assert (f"model.layers.{layer}.mlp.experts.7.up_proj.weight" in names) is sparse


def test_sparse_configs_that_cannot_be():
    with pytest.raises(ValueError, match="experts_per_token=9 must lie between 1 and num_experts=8"):
        tiny_config(**SPARSE | {"experts_per_token": 9})
    with pytest.raises(ValueError, match="sparse_layers has 2 entries for num_layers=3"):
        tiny_config(**SPARSE | {"sparse_layers": (True, True)})
    with pytest.raises(ValueError, match="router_jitter_noise"):
        from_hf(tiny.CONFIGS["mixtral"] | {"router_jitter_noise": 0.1})
    model = build(tiny_config(**SPARSE | {"num_experts": 6}), mesh=make_mesh(MeshConfig(2, 1, 1, 4)))
    with pytest.raises(ValueError, match=r"mesh\.expert=4 does not divide the model's 6 experts"):
        jax.eval_shape(model.init, jax.random.key(0))


def test_experts_are_read_onto_a_mesh_and_written_back(tmp_path):
    """The published names of Qwen3-30B-A3B; every device holds the experts that are its own."""
    original = tiny.write_folder(tmp_path / "in", tiny.CONFIGS["qwen3_moe"])
    mesh = make_mesh(MeshConfig(1, 2, 1, 4))
    model, variables = load(tmp_path / "in", mesh=mesh)
    gate = variables["params"]["segment_1"]["block_0"]["experts"]["gate"]["kernel"]
    assert gate.shape == (4, 8, 64, 48)
    assert {shard.data.shape for shard in gate.addressable_shards} == {(4, 2, 32, 48)}
    wanted = original["model.layers.3.mlp.experts.5.gate_proj.weight"].T
    np.testing.assert_array_equal(np.asarray(gate)[2, 5], wanted)
    save(tmp_path / "out", model, variables, None)
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_names_of_mixtral():
    """As in mistralai/Mixtral-8x7B-v0.1: w1 is the gate, w3 goes up, w2 down."""
    names = FAMILIES["mixtral"].names
    ours = {"gate": "w1", "up": "w3", "down": "w2"}
    for leaf, theirs in ours.items():
        name, layout = names[f"block/experts/{leaf}/kernel"]
        assert name.format(31, 7) == f"model.layers.31.block_sparse_moe.experts.7.{theirs}.weight"
        assert layout == "linear"
