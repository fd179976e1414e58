"""What devices tell each other in a training step, counted in the compiled program's text."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from jaxalign.methods import preference, sft
from jaxalign.models import build
from jaxalign.planning.hlo import Traffic, traffic
from jaxalign.sharding import MeshConfig, batch_shardings, data_shards, describe_shardings, make_mesh, param_shardings
from tests.layouts import ragged_pairs, ragged_texts, tiny_config

LAYERS, CHUNK = 4, 16
CONFIG = tiny_config(num_layers=LAYERS, windows=(None,) * LAYERS, vocab_size=96)
HEAD = CONFIG.embed_dim * CONFIG.vocab_size * 4
SMALL = 1024  # sums of losses and metrics


def compiled(method, sizes: MeshConfig, devices: int = 8):
    """A step's traffic, its batch, bytes of all parameters, and of those that are split over devices."""
    mesh = make_mesh(sizes, jax.devices()[:devices])
    model, optimizer, settings = (
        build(CONFIG, mesh=mesh, remat="full"),
        optax.sgd(1e-3),
        method.Config(logits_chunk=CHUNK),
    )
    examples = ragged_texts(16) if method is sft else ragged_pairs(16)
    batch = method.make_batch(settings, examples, shards=data_shards(mesh), length=128)
    if method is preference:
        batch = replace(batch, fields={"ref_logps": np.zeros(batch.predictions.sources.shape, np.float32)})
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    state, _ = jax.eval_shape(lambda each: method.init(settings, model, each, optimizer, jax.random.key(0)), shapes)
    places = (param_shardings(mesh, state), batch_shardings(mesh, batch))
    arguments = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, batch), places
    )
    step = jax.jit(method.make_step(settings, model, optimizer), donate_argnums=0, out_shardings=(places[0], None))
    text = step.lower(arguments[0], {}, arguments[1]).compile().as_text()
    assert text is not None
    found = describe_shardings(state.params, mesh)
    split = sum(each.total_bytes for each in found.arrays if each.device_bytes < each.total_bytes)
    return traffic(text, devices=devices), batch, found.total_bytes, split


def sizes_of(found: Traffic) -> dict[str, float]:
    return {kind: size for kind, (_, size) in found.collectives.items()}


def gradients(batch, parameters: int) -> float:
    """Bytes of gradients that are summed up over devices: the head's once for every chunk of predictions."""
    chunks = -(-batch.predictions.sources.shape[2] // CHUNK)
    return parameters + (chunks - 1) * HEAD


@pytest.mark.parametrize("method", [pytest.param(sft, marks=pytest.mark.slow), preference], ids=["sft", "preference"])
def test_data_parallel_devices_sum_gradients_and_nothing_else(method):
    found, batch, parameters, _ = compiled(method, MeshConfig(data=8))
    assert set(found.collectives) == {"all-reduce"}
    assert 0 <= sizes_of(found)["all-reduce"] - gradients(batch, parameters) <= SMALL


@pytest.mark.parametrize("method", [pytest.param(preference, marks=pytest.mark.slow), sft], ids=["preference", "sft"])
def test_what_fsdp_splits_is_gathered_twice_and_hidden_states_never(method):
    """Once in the forward pass and once in the backward pass, which needs no embedding table."""
    found, batch, parameters, split = compiled(method, MeshConfig(data=1, fsdp=8))
    assert set(found.collectives) == {"all-gather", "all-reduce"}
    assert sizes_of(found)["all-gather"] == 2 * split - HEAD
    assert 0 <= sizes_of(found)["all-reduce"] - gradients(batch, parameters) <= SMALL


def test_tensor_parallel_devices_sum_hidden_states():
    """Attention's output, forward and again, and the feed-forward's; back what query, key, value, gate and up say of
    their input, each by itself (compilers for TPU and GPU add these up first); once the embedding.
    """
    found, batch, _, _ = compiled(sft, MeshConfig(data=1, tensor=2), devices=2)
    hidden = batch.rows.tokens.size * CONFIG.embed_dim * 4
    assert set(found.collectives) == {"all-reduce"}
    assert 0 <= sizes_of(found)["all-reduce"] - (8 * LAYERS + 1) * hidden <= hidden


def test_a_split_row_gathers_keys_and_values():
    """Of a layer twice, forward and to compute it again; gradients go back; the head's states go around a ring."""
    found, batch, parameters, _ = compiled(preference, MeshConfig(data=1, context=8))
    keys = batch.rows.tokens.size * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    rows, asked = batch.rows.tokens.size * 4, batch.predictions.sources.size * 4
    assert found.collectives["reduce-scatter"] == (2 * LAYERS, 2 * LAYERS * keys)
    assert 0 <= sizes_of(found)["all-gather"] - 4 * LAYERS * keys <= 4 * rows + 8 * asked
    assert found.collectives["all-reduce"] == (1, parameters)
    assert found.collectives["collective-permute"][0] == 2 * 7
