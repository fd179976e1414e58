"""Rematerialisation changes what a step keeps, and nothing else."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxalign.methods import sft
from jaxalign.models import build
from jaxalign.models.attention import Attention
from jaxalign.models.remat import OFFLOADING, POLICIES
from tests.layouts import ragged_texts, relative, tiny_config, tiny_model

LAYERS, ROWS, LENGTH = 12, 4, 256
CONFIG = tiny_config(num_layers=LAYERS, windows=(None,) * LAYERS)


def gradient(model):
    def loss(variables, rows):
        hidden, _, _ = model.apply(variables, rows)
        return jnp.sin(hidden).sum()

    return jax.jit(jax.grad(loss))


def rows():
    packed = sft.make_batch(sft.Config(), ragged_texts(24), length=LENGTH).rows
    return jax.tree.map(lambda x: jnp.asarray(x[0, :ROWS]), packed)


@cache
def compiled(remat, attention: Attention = "xla"):
    """The gradient's program for one CPU, or by splash for one chip of a TPU."""
    chip = attention == "splash"
    model = build(CONFIG, remat=remat, attention=attention, compute_dtype="bfloat16" if chip else "float32")
    arguments = (jax.eval_shape(model.init, jax.random.key(0)), rows())
    if chip:
        place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0])
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    return gradient(model).lower(*arguments).compile()


def flops(remat) -> float:
    found = compiled(remat).cost_analysis()
    assert found is not None
    return found["flops"]


@pytest.mark.parametrize("remat", sorted(set(POLICIES) - set(OFFLOADING)))
def test_gradients_are_the_same(remat):
    _, variables = tiny_model(num_layers=LAYERS, windows=(None,) * LAYERS)
    assert relative(compiled(remat)(variables, rows()), compiled("none")(variables, rows())) <= 1e-5


def test_more_is_kept_the_less_is_computed_again():
    order = ["full", "attention", "dots", "dots_attention", "none"]
    found = [compiled(remat).memory_analysis() for remat in order]
    temporary = [each.temp_size_in_bytes for each in found if each is not None]
    assert len(set(temporary)) == len(order) and temporary == sorted(temporary)
    # What `attention` adds at most: an output and a number per head, of each token and layer.
    assert temporary[1] - temporary[0] <= 4 * LAYERS * ROWS * LENGTH * CONFIG.num_heads * (CONFIG.head_dim + 1)
    most, *between, least = (flops(remat) for remat in order)
    assert all(most > each > least for each in between) and between[2] == min(between)


@pytest.mark.parity
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(("remat", "kept"), [("offload", "attention"), ("dots_offload", "dots")])
def test_offloading_moves_what_is_kept_to_the_host(remat, kept):
    moved, stayed = (compiled(each, "splash").memory_analysis() for each in (remat, kept))
    assert moved is not None and stayed is not None
    assert moved.host_temp_size_in_bytes > 0 and stayed.host_temp_size_in_bytes == 0
    assert moved.temp_size_in_bytes < stayed.temp_size_in_bytes
