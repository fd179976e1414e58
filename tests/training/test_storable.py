"""Trees to names and to JSON with arrays, and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.training import storable
from jaxalign.training.state import TrainState, init_state


def round_trip(tree):
    skeleton, arrays = storable.pack(tree)
    return storable.unpack(json.loads(json.dumps(skeleton)), arrays)


def test_python_values_and_structure_survive_json():
    rng = np.random.default_rng(0)
    tree = {
        "rng": rng.bit_generator.state,
        "nested": [1, (2.5, None, {"a": "x/y.z", "b": []}), True, {}],
        "bytes": b"\x00\xff",
        "floats": [0.1, 1e-320, float("inf"), -0.0],
        "large": 2**100,
    }
    got = round_trip(tree)
    assert got == tree and type(got["nested"][1]) is tuple and str(got["floats"][3]) == "-0.0"
    assert np.isnan(round_trip({"x": float("nan")})["x"])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.zeros((0, 3), np.float16),
        np.array(True),
        np.ones(3, jnp.bfloat16),
        np.float64(0.1),
        np.int32(7),
        np.float32("nan"),
    ],
)
def test_numpy_arrays_and_numbers_keep_type_shape_and_dtype(array):
    got = round_trip({"x": [array]})["x"][0]
    assert type(got) is type(array) and got.dtype == array.dtype and got.shape == array.shape
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("kind", storable.KEY_KINDS)
def test_typed_keys_survive(kind):
    key = jax.random.key(5, impl=kind)
    got = round_trip((key,))[0]
    assert got.dtype == key.dtype and jax.random.bits(got) == jax.random.bits(key)


def test_numpy_arrays_are_copied():
    array = np.zeros(3)
    _, arrays = storable.pack({"x": array})
    array += 1
    assert not arrays["0"].any()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [{1: 2}]}, r"state\['a'\]\[0\]: dict keys must be strings to be saved, got 1"),
        ({"a": {"b": object()}}, r"state\['a'\]\['b'\]: a object cannot be saved"),
        ({"a": np.array(["x"])}, "use a list"),
        ({"a": optax.EmptyState()}, "a EmptyState cannot be saved"),
    ],
)
def test_what_cannot_be_saved_is_named(tree, message):
    with pytest.raises(ValueError, match=message):
        storable.pack(tree)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(1), jax.random.key(1), jax.random.key(1, impl="unsafe_rbg")])
def test_a_train_state_becomes_names_and_back(key):
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b.c": {"scale": jnp.zeros(4)}}
    state = init_state(params, optax.adamw(1e-3), key)
    names = storable.to_names(state)
    assert set(names) == {"step", "params", "opt_state", "key"} and names["params"].keys() == params.keys()
    got = storable.from_names(names, jax.eval_shape(lambda: state))
    assert isinstance(got, TrainState) and jax.tree.structure(got) == jax.tree.structure(state)
    assert got.key.dtype == state.key.dtype and jax.random.bits(got.key) == jax.random.bits(state.key)
    abstract = storable.to_names(state, abstract=True)
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, names)
