"""Decoding with experts: from the cache as from a full pass, on one device as on shards that hold different experts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import build
from jaxalign.sampling import Config, make_decoding, make_generate
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings
from jaxalign.types import TokenRows
from tests.sampling.conftest import CONFIG, spread

SPARSE = replace(
    CONFIG,
    sparse_layers=(False, True, True, True),
    num_experts=8,
    experts_per_token=3,
    expert_mlp_dim=40,
    shared_mlp_dim=20,
)
OPTIONS, KEY = Config(max_new_tokens=9, temperature=0.0, slots=8, refill=1), jax.random.key(5)


@pytest.fixture(scope="module")
def drawn(small, pad):
    """The model, its variables, padded prompts, and what one device draws."""
    model = build(SPARSE)
    variables = spread(jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(8))
    prompts = pad([*small.prompts, *small.prompts[:6]])
    samples = jax.jit(make_generate(model, OPTIONS))(make_decoding(model)(variables), *prompts, KEY)
    return model, variables, prompts, jax.device_get(samples)


def test_greedy_is_the_argmax_of_a_full_pass(drawn):
    model, variables, (prompts, lengths), samples = drawn
    rows = np.zeros((16, 41), np.int32)
    for row, prompt, length, tokens in zip(rows, prompts, lengths, samples.tokens, strict=True):
        row[: length + 9] = np.concatenate([prompt[:length], tokens])
    forward = jax.jit(lambda v, rows: jax.nn.log_softmax(model.logits(v, model.apply(v, rows)[0])))
    mask = np.arange(41)[None] < lengths[:, None] + 9
    log_probs = np.asarray(forward(variables, TokenRows.from_padded(jnp.asarray(rows), mask)))
    assert len(np.unique(samples.tokens)) > 20
    for row, (length, tokens) in enumerate(zip(lengths, samples.tokens, strict=True)):
        at = log_probs[row, length - 1 : length + 8]
        np.testing.assert_array_equal(tokens, at.argmax(-1))
        np.testing.assert_allclose(samples.sampler_logps[row], at.max(-1), atol=1e-4)


@pytest.mark.parametrize(
    "axes", [MeshConfig(2, 1, 1, 4), pytest.param(MeshConfig(1, 1, 2, 4), marks=pytest.mark.slow)], ids=str
)
def test_experts_on_a_mesh_draw_the_same(drawn, axes):
    _, variables, prompts, samples = drawn
    mesh = make_mesh(axes)
    model = build(SPARSE, mesh=mesh)
    decoding = make_decoding(model, mesh)(jax.device_put(variables, param_shardings(mesh, variables)))
    down = decoding["params"]["segment_1_0"]["block_0"]["experts"]["down"]["kernel"]
    # A shard holds its experts alone, and of these its part of the width.
    assert {shard.data.shape for shard in down.addressable_shards} == {(2, 40 // axes.tensor, 48)}
    many = jax.device_get(jax.jit(make_generate(model, OPTIONS, mesh))(decoding, *prompts, KEY))
    np.testing.assert_array_equal(many.tokens, samples.tokens)
    np.testing.assert_allclose(many.sampler_logps, samples.sampler_logps, atol=1e-4)
