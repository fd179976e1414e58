"""Weights in 8 and 4 bits: levels and errors by hand, what is stored, what is trained through, what memory it takes."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import models
from jaxalign.methods import preference, sft
from jaxalign.models import LoraConfig, ModelConfig, Rope, build
from jaxalign.models.quantized import NF4, dequantize, matmul, quantize, quantize_params
from jaxalign.types import TokenRows
from tests.layouts import ragged_pairs, tiny_model

KEY = jax.random.key(0)
# Of a block's largest weight: int8 rounds to 1/127, nf4 to the nearer of two levels at most 0.3038 apart.
BOUNDS = {"int8": 0.5 / 127, "nf4": 0.15191}


def test_values_by_hand():
    """One block of two weights per output: scales are their largest sizes, -0.5 rounds to the level -0.525."""
    kernel = jnp.array([[1.0, 0.0], [-0.5, 0.0]])
    found = quantize(kernel, "int8", (1, 1))
    np.testing.assert_array_equal(found["values"], [[127, 0], [-64, 0]])  # -63.5 rounds to even
    np.testing.assert_allclose(found["scales"], [[1 / 127, 0.0]], rtol=1e-6)
    found = quantize(2 * kernel, "nf4", (1, 1))
    # The first of two weights in the low half of the byte: 1 is level 15, -0.5 is level 2; 0 is level 7 twice.
    np.testing.assert_array_equal(found["values"], [[15 + (2 << 4), 7 + (7 << 4)]])
    np.testing.assert_array_equal(found["scales"], [[2.0, 0.0]])
    np.testing.assert_allclose(dequantize(found, (1, 1)), [[2.0, 0.0], [2 * NF4[2], 0.0]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("shape", "axes", "block"),
    [((2, 128, 4, 16), (1, 2), 64), ((3, 4, 24, 40), (2, 1), 24), ((96, 50), (1, 1), 48)],
    ids=["query", "output", "unstacked"],
)
def test_error_bounds_and_size(kind, shape, axes, block):
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal(shape).astype(np.float32) * np.exp(rng.standard_normal(shape[-1])).astype(np.float32)
    leaves = quantize(jnp.asarray(kernel), kind, axes)
    again = np.asarray(dequantize(leaves, axes))
    assert again.shape == shape
    last = len(shape) - axes[1] - 1
    blocks = np.moveaxis(kernel, last, -1).reshape(-1, block)
    errors = np.moveaxis(np.abs(again - kernel), last, -1).reshape(-1, block)
    worst = (errors / np.abs(blocks).max(-1, keepdims=True)).max()
    assert 0.8 * BOUNDS[kind] < worst <= BOUNDS[kind] * (1 + 1e-5)
    assert leaves["values"].nbytes * {"int8": 1, "nf4": 2}[kind] == kernel.size
    assert leaves["scales"].nbytes == 4 * kernel.size // block
    # What a block's largest weight is stays so: quantised again, nothing changes.
    second = quantize(jnp.asarray(again), kind, axes)
    np.testing.assert_array_equal(second["values"], leaves["values"])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_product_and_its_gradient(kind):
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.standard_normal((4, 32, 24)), jnp.float32)  # two input axes, as attention's output
    x = jnp.asarray(rng.standard_normal((5, 128)), jnp.float32)
    leaves = quantize(kernel, kind, (2, 1))
    full = dequantize(leaves, (2, 1)).reshape(128, 24)

    def through(x):
        return (matmul(x, leaves["values"], leaves["scales"], (2, 1)) ** 2).sum()

    got, wanted = jax.value_and_grad(through)(x), jax.value_and_grad(lambda x: ((x @ full) ** 2).sum())(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, wanted)


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_model_over_quantised_weights_is_the_model_over_what_they_mean(kind):
    """Trained, in the sampler's form, and exported: all three see the same weights."""
    model, variables = tiny_model(num_layers=2, windows=(None, None))
    small = {"params": quantize_params(variables["params"], kind)}
    model, begun = models.add_lora(model, small, LoraConfig(r=4, dropout=0.0), KEY)
    lora = jax.tree.map(lambda x: x + 0.1, begun["lora"])
    quantised = {**begun, "lora": lora}
    rows = TokenRows.from_padded(np.arange(1, 25).reshape(2, 12), np.ones((2, 12), np.int32))

    def hidden(model, variables):
        return np.asarray(jax.jit(lambda v: model.apply(v, rows)[0])(variables))

    wanted = hidden(model, quantised)
    merged, full = models.merge_lora(model, quantised)
    np.testing.assert_allclose(hidden(merged, full), wanted, atol=2e-4)
    apart, unroll = model.unrolled()
    decoding = unroll(quantised)
    # Not merged: the weights stay small while tokens are drawn.
    assert {leaf.dtype.name for leaf in jax.tree.leaves(decoding)} >= {"int8" if kind == "int8" else "uint8"}
    np.testing.assert_allclose(hidden(apart, decoding), wanted, atol=2e-4)
    assert np.abs(wanted - hidden(model, {"params": variables["params"]})).max() > 0.1


def test_quantised_weights_do_not_train():
    model, variables = tiny_model(num_layers=2, windows=(None, None))
    small = {"params": quantize_params(variables["params"], "nf4")}
    with pytest.raises(ValueError, match="segment_0/block_0/attention/key is quantised"):
        sft.init(sft.Config(), model, small, optax.sgd(1.0), KEY)
    with pytest.raises(
        ValueError, match=r"'model.layers.0.\*' matches model.layers.0.self_attn.q_proj.weight, which is"
    ):
        models.freeze(model.config, small, ["model.layers.0.*"])
    norms = models.freeze(model.config, small, ["*norm.weight"])
    state, _ = sft.init(sft.Config(), model, norms, optax.sgd(1.0), KEY)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)} == {"scale"}


def test_the_full_precision_base_never_exists_at_once():
    """12 layers of 2.9 million weights, 139 MB in float32: an adapter over 4 bits never holds them at once."""
    config = ModelConfig(
        "llama", 256, 512, 12, 8, 8, 64, 1208, 128, rope=Rope(), windows=(None,) * 12, tie_embeddings=True
    )
    shapes = jax.eval_shape(build(config).init, KEY)
    blocks = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]["segment_0"]))
    # With rematerialised blocks: what is kept of the activations is then no more than the weights in question.
    model = build(replace(config, lora=LoraConfig(r=8)), remat="full")
    method = preference.Config(logits_chunk=32)
    pairs = [{**pair, "prompt_ids": pair["prompt_ids"] % 90} for pair in ragged_pairs(2)]
    batch = preference.make_batch(method, pairs)

    def start(variables):
        params = quantize_params(variables["params"], "nf4")
        return models.add_lora(model, {"params": params}, LoraConfig(r=8), KEY)[1]

    variables = jax.eval_shape(start, shapes)
    filled = jax.eval_shape(preference.make_reference(method, model), variables, batch)
    state, frozen = jax.eval_shape(lambda v: preference.init(method, model, v, optax.adam(1e-3), KEY), variables)
    step = jax.jit(preference.make_step(method, model, optax.adam(1e-3)), donate_argnums=0)
    compiled = step.lower(state, frozen, filled).compile()
    # No array of the program has the weights of several layers at full precision.
    shapes = re.findall(r"f32\[([0-9,]+)\]", compiled.as_text() or "")
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < blocks / 12
    memory = compiled.memory_analysis()
    assert memory is not None and blocks > 34e6
    adapter = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(variables["lora"]))
    assert memory.argument_size_in_bytes - adapter < 1.2 * blocks * 4.5 / 8 + 4 * 256 * 512
    assert memory.temp_size_in_bytes < 0.5 * 4 * blocks
    # One layer of it at a time is what there is at full precision: a twelfth, and the activations.
    assert memory.temp_size_in_bytes > 4 * blocks / 12 / 4
