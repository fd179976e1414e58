"""Where parameters and batches lie on a mesh."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign.models import LoraConfig, add_lora, build
from jaxalign.packing import Document, pack
from jaxalign.sharding import (
    AXES,
    MeshConfig,
    arrange,
    data_shards,
    describe_shardings,
    expert_specs,
    make_mesh,
    param_shardings,
    path_name,
    place_batch,
    remesh,
    rows_stay_in_processes,
)
from tests.layouts import SPARSE, tiny_config, tiny_model

KEY = jax.random.key(0)


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
    with pytest.raises(ValueError, match=r"data=-1 fsdp=3 tensor=1 needs a multiple of 3 devices .* there are 2"):
        make_mesh(MeshConfig(-1, 3, 1), jax.devices()[:2])
    with pytest.raises(ValueError, match="at most one of them -1; got data=-1 fsdp=-1"):
        MeshConfig(-1, -1, 1)
    with pytest.raises(ValueError, match=r"must be positive.*; got data=-1 context=-2"):
        MeshConfig(context=-2)
    with pytest.raises(ValueError, match=r"rollout\.mesh: data=1 fsdp=1 tensor=4 needs 4 devices, but there are 8"):
        remesh(make_mesh(MeshConfig(8)), MeshConfig(1, 1, 4), "rollout.mesh")
    sizes = {"data": 1, "fsdp": 2, "expert": 1, "context": 2, "tensor": 2}
    assert make_mesh(MeshConfig(-1, 2, 2, context=2)).shape == sizes


def fake_slices(slices: int, each: int) -> list[SimpleNamespace]:
    """Devices of several slices, as a GPU cluster or a multi-slice TPU lists them, in no order of slices."""
    found = [
        SimpleNamespace(id=i, slice_index=i % slices, process_index=i, platform="cpu", device_kind="cpu")
        for i in range(slices * each)
    ]
    return found[::-1]


@pytest.mark.parametrize(
    ("config", "axis"),
    [
        (MeshConfig(data=2, fsdp=4), "data"),
        (MeshConfig(data=2, fsdp=4, dcn={"data": -1}), "data"),
        (MeshConfig(data=1, fsdp=4, tensor=2, dcn={"fsdp": 2}), "fsdp"),
        (MeshConfig(data=4, tensor=2), "data"),
    ],
)
def test_one_axis_goes_over_the_slices_and_the_others_stay_inside(config, axis):
    slices = np.vectorize(lambda device: device.slice_index)(arrange(config, fake_slices(2, 4)))
    assert slices.shape == tuple(getattr(config, name) for name in AXES)
    across = np.moveaxis(slices, AXES.index(axis), 0)
    half = len(across) // 2
    # The first half of that axis is one slice, whole; the second the other.
    assert set(across[:half].flat) == {0} and set(across[half:].flat) == {1}


def test_devices_that_share_rows_belong_to_one_process():
    """A TPU of 2x2x2 chips, four to a host: along the torus, 4 chips of `tensor` may be of two hosts."""
    devices = [
        SimpleNamespace(
            id=i,
            process_index=z,
            platform="tpu",
            device_kind="TPU v5",
            coords=(x, y, z),
            core_on_chip=0,
        )
        for i, (z, y, x) in enumerate(np.ndindex(2, 2, 2))
    ]
    for config in (MeshConfig(data=2, tensor=4), MeshConfig(fsdp=2, context=2, tensor=2), MeshConfig(fsdp=4, tensor=2)):
        assert rows_stay_in_processes(arrange(config, devices)), config
    # Eight chips are two hosts: the run says so.
    assert not rows_stay_in_processes(arrange(MeshConfig(tensor=8), devices))


def test_slices_that_a_mesh_does_not_fit():
    devices = fake_slices(2, 4)
    with pytest.raises(ValueError, match=r"mesh\.data=1 cannot go over 2 slices \(all 2, as mesh\.dcn is empty\)"):
        arrange(MeshConfig(data=1, fsdp=8), devices)
    with pytest.raises(ValueError, match=r"mesh\.dcn: fsdp=4 does not multiply to the 2 slice"):
        arrange(MeshConfig(data=1, fsdp=8, dcn={"fsdp": 4}), devices)
    with pytest.raises(ValueError, match=r"mesh\.tensor=1 cannot go over 2 slices \(mesh\.dcn: tensor=2\)"):
        arrange(MeshConfig(data=8, dcn={"tensor": 2}), devices)
    with pytest.raises(ValueError, match=r"mesh\.dcn: data=2 does not multiply to the 1 slice"):
        make_mesh(MeshConfig(data=8, dcn={"data": 2}))
    with pytest.raises(ValueError, match=r"mesh\.dcn\.pipeline: not an axis; they are data, fsdp"):
        MeshConfig(dcn={"pipeline": 2})
    assert make_mesh(MeshConfig(data=8, dcn={"data": -1})).devices.tolist() == make_mesh(MeshConfig(8)).devices.tolist()


def test_a_parameter_without_a_rule_is_an_error():
    mesh = make_mesh(MeshConfig(1, 8))
    with pytest.raises(ValueError, match=r"no rule says how params/block/gate/weight of shape \[8, 4\] lies"):
        param_shardings(mesh, {"params": {"block": {"gate": {"weight": jnp.zeros((8, 4))}}}})
    # Every leaf that a model, an adapter and an optimiser can have: biases, both kinds of norm, learned positions.
    changes = {"norm": "layer", "norm_bias": True, "output_bias": True, "mlp_bias": True, "learned_positions": True}
    for more in (changes, {**SPARSE, "qk_norm": True}, {"lm_head": False, "score_head": True, "score_labels": 2}):
        model = build(tiny_config(**more))
        shapes = jax.eval_shape(lambda key, model=model: add_lora(model, model.init(key), LoraConfig(r=2), key)[1], KEY)
        param_shardings(mesh, (shapes, jax.eval_shape(optax.adafactor(1e-3).init, shapes)))


def test_what_each_device_holds():
    mesh = make_mesh(MeshConfig(1, 2, 2, context=2))
    shapes = {
        "embed": {"embedding": jax.ShapeDtypeStruct((96, 32), jnp.float32)},
        "final_norm": {"scale": jax.ShapeDtypeStruct((32,), jnp.float32)},
        "block_0": {"mlp": {"down": {"kernel": jax.ShapeDtypeStruct((5, 63, 32), jnp.bfloat16)}}},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    found = describe_shardings(shapes, mesh)
    assert {(each.path, each.spec, each.total_bytes, each.device_bytes) for each in found.arrays} == {
        ("embed/embedding", "(tensor, fsdp)", 96 * 32 * 4, 96 * 32 * 4 // 4),
        ("final_norm/scale", "()", 128, 128),
        # 63 does not divide by 2: that axis stays whole.
        ("block_0/mlp/down/kernel", "(-, -, fsdp)", 5 * 63 * 32 * 2, 5 * 63 * 32),
        ("step", "()", 4, 4),
    }
    assert found.total_bytes == 96 * 32 * 4 + 128 + 5 * 63 * 32 * 2 + 4
    assert found.device_bytes == 96 * 32 + 128 + 5 * 63 * 32 + 4


def test_rows_are_split_and_per_completion_arrays_are_not():
    mesh = make_mesh(MeshConfig(2, 4, 1))
    documents = [Document(np.arange(1, 4 + i), (np.arange(3), np.arange(5))) for i in range(6)]
    batch = pack(documents, completions=2, length=16, shards=data_shards(mesh))
    placed = place_batch(mesh, batch)
    assert placed.rows.tokens.sharding.spec == P(None, ("data", "fsdp", "expert"), "context")
    assert placed.present.sharding.is_fully_replicated
    split = place_batch(make_mesh(MeshConfig(2, context=4)), batch)
    assert split.rows.tokens.sharding.spec == P(None, ("data", "fsdp", "expert"), "context")
    assert split.predictions.sources.sharding.spec == P(None, ("data", "fsdp", "expert"))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
