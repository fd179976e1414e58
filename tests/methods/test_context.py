"""Rows split over the mesh's axis `context`: the same losses and gradients, less memory on each device."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxalign.methods import preference, sft
from jaxalign.models import attention, build
from jaxalign.planning.hlo import traffic
from jaxalign.sharding import MeshConfig, batch_shardings, data_shards, make_mesh, param_shardings, place_batch
from tests.layouts import SPARSE, ragged_pairs, ragged_texts, relative, tiny_config, tiny_model
from tests.methods.test_layouts import gradient, reference_filled

DENSE: dict[str, Any] = {"num_layers": 2, "windows": (None, 9)}
# Rows of 100 tokens do not divide by 8: the model pads them. Blocks of 48 do not divide a stretch.
CASES: dict[str, tuple[Any, MeshConfig, dict[str, Any], dict[str, Any]]] = {
    "preference, with fsdp and tensor": (preference, MeshConfig(fsdp=2, tensor=2, context=2), DENSE, {}),
    "preference, rows that do not divide": (preference, MeshConfig(context=8), DENSE, {"length": 100}),
    "sft in blocks": (sft, MeshConfig(data=2, context=4), DENSE, {"length": 512}),
    "sft with experts": (sft, MeshConfig(expert=2, context=2), SPARSE, {"length": 128}),
}


def compute(method, dtype, changes, mesh, **layout):
    model, variables = tiny_model(dtype=dtype, **changes)
    shards = 1
    if mesh is not None:
        model = build(model.config, param_dtype=dtype, compute_dtype=dtype, mesh=mesh)
        variables, shards = jax.device_put(variables, param_shardings(mesh, variables)), data_shards(mesh)
    config = method.Config(logits_chunk=17)
    examples = ragged_texts(5) if method is sft else ragged_pairs(5)
    batch = method.make_batch(config, examples, shards=shards, micro_batch_size=3, **layout)
    batch = batch if mesh is None else place_batch(mesh, batch)
    batch = batch if method is sft else reference_filled(config, model, variables, batch)
    return gradient(method, config, model, variables, batch)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if "experts" in name else ()) for name in CASES]
)
@pytest.mark.usefixtures("compiled_quickly")
def test_losses_and_gradients_are_those_of_one_device(case, monkeypatch):
    method, sizes, changes, layout = CASES[case]
    if "blocks" in case:
        monkeypatch.setattr(attention, "BLOCKWISE_FROM", 128)
        monkeypatch.setattr(attention, "BLOCK", 48)
    with jax.enable_x64(True):
        expected = compute(method, "float64", changes, None, **layout)
        got = compute(method, "float64", changes, make_mesh(sizes), **layout)
    assert relative(got[0], expected[0]) <= 1e-10
    for name, (total, weight) in expected[1].items():
        np.testing.assert_allclose(np.asarray(got[1][name]), np.asarray([total, weight]), rtol=1e-6, err_msg=name)


def compiled_step(sizes: MeshConfig, *, devices: int, length: int, texts: int):
    """The step of supervised fine-tuning of a small model on some of the devices."""
    mesh = make_mesh(sizes, jax.devices()[:devices])
    config, settings = tiny_config(num_layers=3, windows=(None,) * 3), sft.Config(logits_chunk=128)
    model, optimizer = build(config, remat="full", mesh=mesh), optax.sgd(1e-3)
    batch = sft.make_batch(settings, ragged_texts(texts, longest=1000), length=length, shards=data_shards(mesh))
    state, _ = jax.eval_shape(lambda key: sft.init(settings, model, model.init(key), optimizer, key), jax.random.key(0))
    placed = [
        jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)
        for tree, shardings in ((state, param_shardings(mesh, state)), (batch, batch_shardings(mesh, batch)))
    ]
    step = jax.jit(sft.make_step(settings, model, optimizer), donate_argnums=0)
    compiled = step.lower(placed[0], {}, placed[1]).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    return memory, text


def test_a_long_row_takes_half_the_memory_on_two_devices():
    alone = compiled_step(MeshConfig(), devices=1, length=8192, texts=14)
    shared = compiled_step(MeshConfig(context=2), devices=2, length=8192, texts=14)
    ratio = shared[0].temp_size_in_bytes / alone[0].temp_size_in_bytes
    assert ratio <= 0.65  # gradients, and the logits of a chunk of predictions, are whole on both
    # No whole row's hidden states pass between the devices: keys and values, 2 heads of 8, are the widest.
    assert 0 < traffic(shared[1], devices=2).largest <= 8192 * 2 * 8 * 4
