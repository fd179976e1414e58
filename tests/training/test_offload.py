"""An optimiser's state in the host's memory changes no value, and leaves the devices' memory."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import jax
import pytest
from jax.experimental import topologies

from jaxalign.methods import sft
from jaxalign.models import build
from jaxalign.sharding import MeshConfig, batch_shardings, make_mesh, param_shardings
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.offload import on_host
from jaxalign.training.optimizer import Config, make_optimizer
from jaxalign.training.state import TrainState
from tests.layouts import ragged_texts, relative, tiny_config, tiny_model


def program(mesh, model, offload, variables):
    """Three things of one training: its initial state's function, its step and the shardings of state and batch."""
    optimizer, schedule = make_optimizer(Config(offload=offload, learning_rate=1e-2), 10)
    init = partial(sft.init, sft.Config(), model, optimizer=optimizer, key=jax.random.key(0))
    shapes = jax.eval_shape(init, variables)
    state, _ = param_shardings(mesh, shapes)
    if offload:
        state = TrainState(state.step, state.params, on_host(state.opt_state, shapes[0].opt_state), state.key)
    step = sft.make_step(sft.Config(), model, optimizer, schedule)
    step = jax.jit(step, donate_argnums=0, out_shardings=(state, None))
    return jax.jit(lambda variables: init(variables)[0], out_shardings=state), step, shapes, state


def test_values_are_the_same():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, variables = tiny_model(num_layers=1, windows=(9,))
    batch = sft.make_batch(sft.Config(), ragged_texts(9), length=128, micro_batch_size=5, shards=4)
    ends = []
    for offload in (False, True):
        init, step, _, _ = program(mesh, model, offload, variables)
        state = init(variables)
        for _ in range(3):
            state, metrics = step(state, {}, batch)
            kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim}
            assert kinds == ({"pinned_host"} if offload else {"device"})
        ends.append((state.params, state.opt_state, metrics["loss"].value()))
    assert relative(ends[1], ends[0]) <= 1e-6


def test_a_checkpoint_brings_it_back_to_the_host(tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, variables = tiny_model(num_layers=1, windows=(9,))
    init, _, _, _ = program(mesh, model, True, variables)
    state = init(variables)
    state = replace(state, opt_state=jax.tree.map(lambda x: x + 3, state.opt_state))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), init(variables))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(state, jax.tree.map(lambda x: x.sharding, like)), {}, {})
        checkpoints.wait()
        restored = checkpoints.restore(like)
    assert restored is not None and relative(restored.state.opt_state, state.opt_state) == 0
    for wanted, found in zip(jax.tree.leaves(like), jax.tree.leaves(restored.state), strict=True):
        assert found.sharding.memory_kind == wanted.sharding.memory_kind


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is not installed")
def test_the_state_leaves_a_tpu():
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), devices)
    config = tiny_config(num_layers=4, windows=(None,) * 4, embed_dim=512, mlp_dim=2048, head_dim=64)
    model = build(config, compute_dtype="bfloat16", remat="full", mesh=mesh)
    batch = sft.make_batch(sft.Config(), ragged_texts(5), length=128, shards=2)
    found = {}
    for offload in (False, True):
        variables = jax.eval_shape(model.init, jax.random.key(0))
        _, step, shapes, state = program(mesh, model, offload, variables)
        places = (state, {}, batch_shardings(mesh, batch))
        arguments = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (shapes[0], {}, batch), places
        )
        found[offload] = step.lower(*arguments).compile().memory_analysis()
    moments = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes[0].opt_state) if x.ndim)
    assert found[False].host_argument_size_in_bytes == 0
    assert found[True].host_argument_size_in_bytes == pytest.approx(moments / 4, rel=0.1)
    saved = found[False].argument_size_in_bytes - found[True].argument_size_in_bytes
    assert saved == pytest.approx(moments / 4, rel=0.1)
    # Fetched leaf by leaf after the gradients are there: far less than all of it is there at once.
    assert found[True].temp_size_in_bytes - found[False].temp_size_in_bytes < 0.7 * saved
