"""`model.offload_reference`: the reference lies in the host's memory, and what it says is the same."""

from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from jaxalign.methods import preference
from jaxalign.models import build
from jaxalign.run.programs import at, make_reference_pass, placed
from jaxalign.sharding import MeshConfig, batch_shardings, make_mesh, param_shardings, place_batch
from jaxalign.training.offload import HOST, on_host
from tests.layouts import ragged_pairs, tiny_config, tiny_model


def passed(model, offload: bool):
    stage = SimpleNamespace(method=preference.Config(), model=SimpleNamespace(offload_reference=offload))
    return make_reference_pass(cast(Any, SimpleNamespace(method=preference, stage=stage, model=model)))


def test_log_probs_are_the_same():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    model, variables = tiny_model(num_layers=2, windows=(None, 9))
    batch = place_batch(mesh, preference.make_batch(preference.Config(), ragged_pairs(11), shards=8, length=128))
    places = param_shardings(mesh, variables)
    here = jax.device_put(variables, places)
    away = jax.device_put(variables, on_host(places, variables))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away)} == {HOST}
    found, wanted = passed(model, True)(away, batch), passed(model, False)(here, batch)
    assert np.abs(wanted.fields["ref_logps"]).max() > 1
    np.testing.assert_array_equal(found.fields["ref_logps"], wanted.fields["ref_logps"])


@pytest.mark.parity
@pytest.mark.usefixtures("libtpu")
def test_a_tpu_holds_it_during_the_pass_alone():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), list(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices))
    model = build(tiny_config(embed_dim=512, mlp_dim=2048, head_dim=64), compute_dtype="bfloat16", mesh=mesh)
    shapes = placed(mesh, jax.eval_shape(model.init, jax.random.key(0)))
    batch = preference.make_batch(preference.Config(), ragged_pairs(8), shards=4, length=128)
    batch = at(batch, batch_shardings(mesh, batch))
    away = at(shapes, on_host(jax.tree.map(lambda leaf: leaf.sharding, shapes), shapes))
    memory = passed(model, True).lower(away, batch).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert memory is not None
    assert memory.host_argument_size_in_bytes == pytest.approx(size / 4, rel=0.1)
    assert memory.argument_size_in_bytes < size / 40
