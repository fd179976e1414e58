"""Where parameters and batches lie on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign.packing import Document, pack
from jaxalign.sharding import (
    MeshConfig,
    data_shards,
    expert_specs,
    make_mesh,
    param_shardings,
    path_name,
    place_batch,
)
from tests.layouts import SPARSE, tiny_model


def test_every_matrix_is_split_and_every_split_fits():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    _, variables = tiny_model(vocab_size=96)
    shardings = jax.tree_util.tree_leaves_with_path(param_shardings(mesh, variables))
    for (path, sharding), leaf in zip(shardings, jax.tree.leaves(variables), strict=True):
        name = path_name(path)
        split = [axis for axis in sharding.spec if axis is not None]
        assert sharding.shard_shape(leaf.shape)
        if name.endswith(("kernel", "embedding")):
            assert sorted(split) == ["fsdp", "tensor"], name
        if name.endswith("scale"):
            assert not split, name


def test_experts_are_split_three_ways():
    mesh = make_mesh(MeshConfig(1, 2, 2, 2))
    _, variables = tiny_model(**SPARSE)
    experts = param_shardings(mesh, variables)["params"]["segment_1"]["block_0"]["experts"]
    # The first axis holds the layers of the segment.
    assert experts["gate"]["kernel"].spec == experts["up"]["kernel"].spec == P(None, "expert", "fsdp", "tensor")
    assert experts["down"]["kernel"].spec == P(None, "expert", "tensor", "fsdp")
    assert experts["router"]["kernel"].spec == P(None, "fsdp", None)
    assert data_shards(mesh) == 4
    held = expert_specs(mesh, variables)["params"]["segment_1"]["block_0"]
    assert held["experts"]["down"]["kernel"] == P(None, "expert", None, None)
    assert set(jax.tree.leaves(held["attention"])) == {P(None, None, None), P(None, None, None, None), P(None, None)}


def test_optimiser_state_lies_where_its_parameters_do():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    _, variables = tiny_model()
    wanted = param_shardings(mesh, variables)
    adam = param_shardings(mesh, jax.eval_shape(optax.adamw(1e-3).init, variables))
    assert adam[0].mu == wanted
    assert adam[0].nu == wanted
    factored = param_shardings(mesh, jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=8).init, variables))
    assert all(isinstance(each, jax.sharding.NamedSharding) for each in jax.tree.leaves(factored))


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    tree = {"attention": {"key": {"kernel": jnp.zeros((5, 32, 2, 8))}, "query": {"kernel": jnp.zeros((5, 32, 8, 8))}}}
    shardings = param_shardings(mesh, tree)
    assert shardings["attention"]["key"]["kernel"].spec == P(None, "fsdp", None, None)
    assert shardings["attention"]["query"]["kernel"].spec == P(None, "fsdp", "tensor", None)


def test_meshes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"data=3 fsdp=1 tensor=1 needs 3 devices, but there are 8"):
        make_mesh(MeshConfig(3, 1, 1))
    with pytest.raises(ValueError, match="needs 3 devices"):
        make_mesh(MeshConfig(-1, 3, 1), jax.devices()[:2])
    with pytest.raises(ValueError, match="at most one"):
        make_mesh(MeshConfig(-1, -1, 1))
    assert make_mesh(MeshConfig(-1, 2, 2)).shape == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}


def test_rows_are_split_and_per_completion_arrays_are_not():
    mesh = make_mesh(MeshConfig(2, 4, 1))
    documents = [Document(np.arange(1, 4 + i), (np.arange(3), np.arange(5))) for i in range(6)]
    batch = pack(documents, completions=2, length=16, shards=data_shards(mesh))
    placed = place_batch(mesh, batch)
    assert placed.rows.tokens.sharding.spec == P(None, ("data", "fsdp", "expert"))
    assert placed.present.sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
