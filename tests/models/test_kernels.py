"""The kernels behind the one entrance compute what the XLA path does: splash interpreted, cuDNN's call by XLA."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from jaxalign.methods import preference, sft
from jaxalign.models import attention, build, cudnn, splash
from jaxalign.models.attention import Attention, Keys, attend, rows_mask
from jaxalign.sharding import MeshConfig, batch_shardings, make_mesh, param_shardings
from jaxalign.types import TokenRows
from tests.layouts import ragged_pairs, ragged_texts, relative, tiny_config, tiny_model

# Three blocks of queries and keys once the row is padded; two queries to each key.
ROWS, LENGTH, HEADS, KV_HEADS, DIM = 2, 300, 4, 2, 8


def packed(share: bool) -> TokenRows:
    config = preference.Config(share_prompt=share)
    rows = preference.make_batch(config, ragged_pairs(12, prompt=120, completion=70), length=LENGTH).rows
    fullest = np.argsort(-rows.documents[0].max(1), kind="stable")[:ROWS]
    taken = jax.tree.map(lambda x: jnp.asarray(x[0, fullest]), rows)
    assert int(taken.branches.max()) == 2 and int(taken.documents.max()) >= 3 and not bool((taken.documents > 0).all())
    return taken


def both_ways(rows, mask, run=attend, dtype=jnp.float32, **options):
    """Output where there are tokens, and its gradients under a random cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(ROWS, LENGTH, HEADS, DIM), *[(ROWS, KV_HEADS, LENGTH, DIM)] * 2, (ROWS, LENGTH, HEADS, DIM)]
    query, key, value, cotangent = (
        3 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    real = rows.documents[:, :, None, None] > 0

    def total(query, key, value):
        out = jnp.where(real, run(query, (Keys(key, value, mask),), scale=DIM**-0.5, **options), 0)
        return (out * cotangent).sum(), out

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (150, 4.0), (None, 4.0)])
def test_splash_is_attention(window, softcap):
    rows = packed(share=False)
    found = both_ways(rows, splash.segments(rows, window, None), softcap=softcap)
    wanted = both_ways(rows, rows_mask(rows, window), softcap=softcap)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("shape", [(2, 1, 1, 2), (4, 1, 1, 1), (1, 2, 1, 4)])
def test_splash_on_a_mesh(shape):
    """Rows and heads are split; four shards split neither the two rows nor the two heads of keys."""
    names = ("data", "fsdp", "expert", "tensor")
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 4, devices=devices)
    rows = packed(share=False)
    found = both_ways(rows, splash.segments(rows, 150, mesh), softcap=4.0)
    wanted = both_ways(rows, rows_mask(rows, 150), softcap=4.0)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("window", [None, 9])
def test_the_call_to_cudnn_is_attention(window):
    """With branches and windows; computed by XLA, as no GPU is asked for."""
    rows = packed(share=True)

    def run(query, keys, *, scale):
        return cudnn.attend_cudnn(query, *keys[0], scale=scale, softcap=None, implementation="xla")

    mask = attention.MASKS["cudnn"](rows, window, None)
    found, wanted = both_ways(rows, mask, run), both_ways(rows, rows_mask(rows, window))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(ours, theirs) <= 1e-5


def test_the_call_to_cudnn_lowers(monkeypatch):
    """As far as that goes without CUDA: jax builds cuDNN's call, forward and backward, with the mask as its bias."""
    from jax._src.cudnn import fused_attention_stablehlo as fused  # nothing public says which cuDNN is there

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    model = build(tiny_config(), compute_dtype="bfloat16", attention="cudnn", remat="full")
    batch = sft.make_batch(sft.Config(), ragged_texts(5), length=128)
    step = jax.jit(partial(run_step, sft, sft.Config(), model))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    text = step.trace(shapes, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


def run_step(method, config, model, variables, batch):
    """The change of the parameters under SGD, and the loss."""
    optimizer = optax.sgd(1.0)
    state, frozen = method.init(config, model, variables, optimizer, jax.random.key(0))
    after, metrics = method.make_step(config, model, optimizer)(state, frozen, batch)
    return jax.tree.map(jnp.subtract, after.params, state.params), metrics["loss"]


@pytest.mark.slow
def test_a_preference_step_is_the_same_by_splash():
    """Shared prompts by XLA against unshared ones by the kernel: windows, soft-cap, rematerialised, micro-batches."""
    model, variables = tiny_model(num_layers=2, windows=(None, 9), attention_softcap=5.0)
    pairs = ragged_pairs(7)
    found = {}
    kinds: dict[Attention, bool] = {"xla": True, "splash": False}
    for kind, share in kinds.items():
        config = preference.Config(share_prompt=share, beta=0.3)
        own = build(model.config, attention=kind, remat="attention")
        batch = preference.make_batch(config, pairs, micro_batch_size=4, length=160)
        reference = jax.jit(preference.make_reference(config, own))
        batch = reference(jax.tree.map(lambda x: x * 0.97, variables), batch)
        found[kind] = jax.jit(partial(run_step, preference, config, own))(variables, batch)
    assert relative(found["splash"][0], found["xla"][0]) <= 1e-5
    assert found["splash"][1].value() == pytest.approx(found["xla"][1].value(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype", "changes", "said"),
    [
        ("splash", "float32", {"attention_dropout": 0.1}, "attention_dropout"),
        ("splash", "float64", {}, "float64"),
        ("cudnn", "float32", {}, "bfloat16"),
        ("cudnn", "bfloat16", {"attention_softcap": 30.0}, "attention_softcap"),
        ("cudnn", "bfloat16", {"head_dim": 12}, "head_dim=12"),
        ("cudnn", "bfloat16", {"head_dim": 512}, "head_dim=512"),
    ],
)
def test_what_a_kernel_cannot_serve_is_said(kind, dtype, changes, said):
    with pytest.raises(ValueError, match=f"model.attention={kind}: .*{said}"):
        build(replace(tiny_config(), **changes), compute_dtype=dtype, attention=kind)


@pytest.mark.parity
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("head_dim", [64, 96])
def test_the_step_compiles_for_a_tpu(head_dim):
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), devices)
    config = tiny_config(num_layers=2, windows=(None, 200), head_dim=head_dim, attention_softcap=30.0)
    model = build(config, compute_dtype="bfloat16", attention="splash", remat="full", mesh=mesh)
    batch = sft.make_batch(sft.Config(), ragged_texts(5, longest=400), length=512, shards=2)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    places = (param_shardings(mesh, variables), batch_shardings(mesh, batch))
    arguments = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (variables, batch), places
    )
    text = jax.jit(partial(run_step, sft, sft.Config(), model)).lower(*arguments).compile().as_text()
    assert text is not None
    for name in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert name in text
