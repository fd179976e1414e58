"""Training a part of the parameters: what trains, what it keeps, and that the rest is untouched."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import models
from jaxalign.methods import sft
from jaxalign.methods.common import join_variables, split_variables
from jaxalign.models.freezing import whole
from jaxalign.training.step import accumulate
from tests.layouts import ragged_texts, relative, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

KEY = jax.random.key(0)


def sizes(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def gradient(model, variables, config):
    params, frozen = split_variables(variables)
    batch = sft.make_batch(config, ragged_texts(5), micro_batch_size=2)
    run = jax.jit(lambda p: accumulate(sft.make_loss(config, model), sft.totals(batch), p, frozen, batch, KEY)[0])
    return run(params)


@pytest.fixture(scope="module")
def everything():
    """The gradients of all parameters."""
    return gradient(*tiny_model(), sft.Config())["params"]


@pytest.mark.parametrize(
    "patterns",
    [
        ["model.layers.3.*", "model.layers.4.*"],  # of a pattern of blocks and a rest: whole leaves and parted ones
        ["model.layers.[024].mlp.*", "model.embed_tokens.weight"],
    ],
    ids=["last layers", "every other mlp"],
)
def test_gradients_are_those_of_full_training(patterns, everything):
    """Each trained row has the gradient that it has when everything trains; nothing else has any."""
    model, variables = tiny_model()
    full = models.freeze(model.config, {"params": everything}, patterns)
    part = models.freeze(model.config, variables, patterns)
    got = gradient(model, part, sft.Config())["params"]
    assert relative(got, full["params"]) <= 1e-6
    jax.tree.map(np.testing.assert_array_equal, whole(part)["params"], variables["params"])


def test_a_step_keeps_nothing_for_what_is_frozen():
    """The last two of five layers: of the windowed blocks 3 and 4 one lies in a scanned segment, one by itself."""
    model, variables = tiny_model()
    part = models.freeze(model.config, variables, ["model.layers.3.*", "model.layers.4.*"])
    optimizer = optax.adamw(1e-2, weight_decay=0.5)
    state, frozen = sft.init(sft.Config(), model, part, optimizer, KEY)
    layer = sizes(jax.tree.map(lambda x: x[0], variables["params"]["segment_0"]["block_0"]))
    assert sizes(state.params) == 2 * layer
    assert sizes(state.opt_state) == 4 * layer + 1
    step = jax.jit(sft.make_step(sft.Config(), model, optimizer))
    new, _ = step(state, frozen, sft.make_batch(sft.Config(), ragged_texts(4)))
    after = whole(join_variables(new.params, frozen))["params"]
    kernels = [
        np.abs(np.asarray(tree["segment_0"][f"block_{place}"]["mlp"]["up"]["kernel"] - old)).max(axis=(1, 2))
        for tree in [after]
        for place, old in enumerate(
            variables["params"]["segment_0"][f"block_{place}"]["mlp"]["up"]["kernel"] for place in (0, 1)
        )
    ]
    moved = np.stack(kernels, 1).reshape(-1)  # layers 0 to 3, as the segment repeats two blocks
    assert (moved[:3] == 0).all() and moved[3] > 0
    np.testing.assert_array_equal(after["embed"]["embedding"], variables["params"]["embed"]["embedding"])


def test_the_sampler_and_the_export_see_all(tmp_path):
    model, variables = tiny_model(num_layers=3, windows=(None,) * 3, output_bias=True)
    part = models.freeze(model.config, variables, ["model.layers.1.*", "lm_head.weight"])
    _, unroll = model.unrolled()
    jax.tree.map(np.testing.assert_array_equal, unroll(part), unroll(variables))
    models.save(tmp_path / "out", model, part, None)
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "out")[1], variables)
    hidden = jnp.ones((2, model.config.embed_dim))
    np.testing.assert_array_equal(model.logits(part, hidden), model.logits(variables, hidden))


def test_an_unknown_pattern_names_the_nearest_parameter():
    model, variables = tiny_model()
    message = "'model.layers.9.mlp.up_proj.weight' matches no parameter of this model; the nearest is 'model.layers."
    with pytest.raises(ValueError, match=re.escape(message)):
        models.freeze(model.config, variables, ["model.norm.weight", "model.layers.9.mlp.up_proj.weight"])
