"""Guarantee 2: how a batch is laid out never changes its loss or gradient beyond rounding."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.methods import preference, reference_free, sft
from jaxalign.sharding import MeshConfig, data_shards, make_mesh, param_shardings, place_batch
from jaxalign.training.step import accumulate
from tests.compiling import quick_compiles
from tests.layouts import ragged_pairs, ragged_texts, relative, tiny_model

# Two layers scanned and one beside them compile faster than five.
THREE: dict[str, Any] = {"num_layers": 3, "windows": (9, 9, None)}
COUNT = 7  # not a multiple of any micro-batch size but 1 and 7
LAYOUTS: dict[str, dict[str, Any]] = {
    "1x8": {"micro_batch_size": 8},
    "2x4": {"micro_batch_size": 4},
    "8x1": {"micro_batch_size": 1},
    "empty micro-batches": {"micro_batch_size": 3, "micro_batches": 5},
    "an example in each row": {"micro_batch_size": 8, "length": 128},
    "long rows": {"micro_batch_size": 8, "length": 1024},
}
MESHES = {"8x1x1": MeshConfig(8, 1, 1), "1x8x1": MeshConfig(1, 8, 1), "2x2x2": MeshConfig(2, 2, 2)}


@cache
def compiled(method, config, model):
    def compute(params, batch):
        grads, metrics = accumulate(
            method.make_loss(config, model), method.totals(batch), params, {}, batch, jax.random.key(0)
        )
        return grads, {name: jax.tree.leaves(metric) for name, metric in metrics.items()}

    return jax.jit(compute)


def gradient(method, config, model, variables, batch):
    return compiled(method, config, model)({"params": variables["params"]}, batch)


@cache
def compiled_reference(config, model):
    return jax.jit(preference.make_reference(config, model))


def reference_filled(config, model, variables, batch):
    return compiled_reference(config, model)(jax.tree.map(lambda x: x * 0.97, variables), batch)


def run_preference(model, variables, share=True, mesh=None, settings=(), **layout):
    config = preference.Config(beta=0.3, share_prompt=share, logits_chunk=17, **dict(settings))
    shards = 1 if mesh is None else data_shards(mesh)
    batch = preference.make_batch(config, ragged_pairs(COUNT), shards=shards, **layout)
    if mesh is not None:
        batch = place_batch(mesh, batch)
        variables = jax.device_put(variables, param_shardings(mesh, variables))
    return gradient(preference, config, model, variables, reference_filled(config, model, variables, batch))


def run_reference_free(model, variables, share=True, settings=(), **layout):
    config = reference_free.Config(share_prompt=share, logits_chunk=17, **dict(settings))
    return gradient(
        reference_free, config, model, variables, reference_free.make_batch(config, ragged_pairs(COUNT), **layout)
    )


def run_sft(model, variables, mesh=None, **layout):
    config = sft.Config(logits_chunk=17)
    batch = sft.make_batch(config, ragged_texts(COUNT), shards=1 if mesh is None else data_shards(mesh), **layout)
    if mesh is not None:
        batch = place_batch(mesh, batch)
        variables = jax.device_put(variables, param_shardings(mesh, variables))
    return gradient(sft, config, model, variables, batch)


def assert_same(got, wanted, bound):
    assert relative(got[0], wanted[0]) <= bound
    for name, (total, weight) in wanted[1].items():
        assert np.asarray(got[1][name][1]) == pytest.approx(np.asarray(weight), rel=1e-6), name
        assert np.asarray(got[1][name][0]) == pytest.approx(np.asarray(total), rel=2e-5, abs=2e-5), name


@pytest.fixture(scope="module")
def wanted_preference():
    return run_preference(*tiny_model(**THREE), micro_batch_size=8)


# Every layout, with prompts that are shared or not; with long rows, where both take the same shape, both.
@pytest.mark.parametrize(
    ("layout", "share"),
    [
        ("1x8", False),
        ("2x4", True),
        ("8x1", True),
        ("empty micro-batches", False),
        ("an example in each row", True),
        ("long rows", True),
        ("long rows", False),
        pytest.param("2x4", False, marks=pytest.mark.slow),
        pytest.param("8x1", False, marks=pytest.mark.slow),
        pytest.param("empty micro-batches", True, marks=pytest.mark.slow),
        pytest.param("an example in each row", False, marks=pytest.mark.slow),
    ],
)
def test_preference_gradients_do_not_depend_on_the_layout(layout, share, wanted_preference):
    assert_same(run_preference(*tiny_model(**THREE), share=share, **LAYOUTS[layout]), wanted_preference, 1e-5)


@pytest.mark.parametrize(
    "mesh", [MESHES["2x2x2"], *(pytest.param(MESHES[name], marks=pytest.mark.slow) for name in ("8x1x1", "1x8x1"))]
)
def test_preference_gradients_do_not_depend_on_the_mesh(mesh, wanted_preference):
    assert_same(run_preference(*tiny_model(**THREE), mesh=make_mesh(mesh), micro_batch_size=4), wanted_preference, 1e-5)


# Those that read lengths, steps, the policy's own probabilities or a likelihood with a denominator of its own.
READING = {
    "lengths": (run_preference, {"loss_type": "sigmoid_norm"}),
    "steps": (run_preference, {"loss_type": "ipo", "ld_alpha": 0.4, "f_divergence_type": "js_divergence"}),
    "probabilities": (run_preference, {"loss_type": "hinge", "use_weighting": True}),
    "tokens": (run_preference, {"loss_type": ("apo_zero", "sft"), "loss_weights": (0.7, 2.0)}),
    "sums": (run_reference_free, {"beta": 0.1}),
    "means": (run_reference_free, {"loss_type": "simpo", "beta": 2.0, "alpha": 0.25}),
    "prompts": (run_reference_free, {"loss_type": "orpo"}),
}


QUICK = ("lengths", "sums")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in READING]
)
def test_other_losses_split_alike(kind):
    model, (run, settings) = tiny_model(num_layers=1, windows=(9,)), READING[kind]
    with quick_compiles():
        whole = run(*model, settings=settings, micro_batch_size=8)
        assert_same(run(*model, settings=settings, micro_batch_size=2, micro_batches=5, share=False), whole, 1e-5)


@pytest.fixture(scope="module")
def wanted_sft():
    return run_sft(*tiny_model(**THREE), micro_batch_size=8)


@pytest.mark.parametrize(
    "layout",
    [
        "8x1",
        "empty micro-batches",
        "long rows",
        pytest.param("2x4", marks=pytest.mark.slow),
        pytest.param("an example in each row", marks=pytest.mark.slow),
    ],
)
def test_sft_gradients_do_not_depend_on_the_layout(layout, wanted_sft):
    assert_same(run_sft(*tiny_model(**THREE), **LAYOUTS[layout]), wanted_sft, 1e-5)


@pytest.mark.parametrize(
    "mesh", [MESHES["2x2x2"], *(pytest.param(MESHES[name], marks=pytest.mark.slow) for name in ("8x1x1", "1x8x1"))]
)
def test_sft_gradients_do_not_depend_on_the_mesh(mesh, wanted_sft):
    assert_same(run_sft(*tiny_model(**THREE), mesh=make_mesh(mesh), micro_batch_size=4), wanted_sft, 1e-5)


@pytest.mark.parametrize(
    ("layouts", "windows"),
    [
        (["8x1", "empty micro-batches", "long rows"], (9,)),
        pytest.param(list(LAYOUTS), (None, 9), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_in_float64_only_rounding_is_left(layouts, windows):
    with jax.enable_x64(True), quick_compiles():
        model = tiny_model(dtype="float64", num_layers=len(windows), windows=windows)
        whole = run_preference(*model, micro_batch_size=8)
        assert whole[0]["params"]["embed"]["embedding"].dtype == np.float64
        for name in layouts:
            assert relative(run_preference(*model, share=False, **LAYOUTS[name])[0], whole[0]) <= 1e-10
        model = tiny_model(dtype="float64", num_layers=1, windows=(9,))
        texts = run_sft(*model, micro_batch_size=8)
        assert relative(run_sft(*model, micro_batch_size=3, micro_batches=5)[0], texts[0]) <= 1e-10
        for run, settings in (READING["tokens"], READING["prompts"]):
            whole = run(*model, settings=settings, micro_batch_size=8)[0]
            split = run(*model, settings=settings, micro_batch_size=3, micro_batches=4, share=False)[0]
            assert relative(split, whole) <= 1e-10


def test_the_comparison_can_fail(wanted_sft):
    """Neighbouring documents would leak into each other without the document mask: the bound must notice."""
    model, variables = tiny_model(**THREE)
    config = sft.Config(logits_chunk=17)
    batch = sft.make_batch(config, ragged_texts(COUNT), length=1024)
    merged = jax.tree.map(lambda x: x, batch)
    merged.rows.documents[:] = (merged.rows.documents > 0).astype(np.int32)
    grads = gradient(sft, config, model, variables, merged)[0]
    assert relative(grads, wanted_sft[0]) > 1e-2
