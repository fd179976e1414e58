"""NEFTune's noise belongs to the document: its size, and that no layout changes it."""

import jax
import numpy as np
import optax
import pytest

from jaxalign.methods import sft
from jaxalign.methods.common import make_eval_step
from jaxalign.methods.noise import embedding_noise
from tests.layouts import ragged_texts, relative, tiny_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ALPHA, DIM = 5.0, 16


def by_document(batch, key) -> dict[tuple[int, ...], np.ndarray]:
    """Tokens of each document -> its noise `[tokens, DIM]`."""
    found = {}
    for m in range(len(batch.present)):
        rows = jax.tree.map(lambda x, m=m: x[m], batch.rows)
        noise = np.asarray(embedding_noise(rows, key, alpha=ALPHA, embed_dim=DIM))
        assert not noise[rows.documents == 0].any()
        for r in range(len(rows.tokens)):
            for document in range(1, rows.documents[r].max() + 1):
                here = rows.documents[r] == document
                found[tuple(rows.tokens[r, here].tolist())] = noise[r, here]
    return found


def test_a_document_has_its_own_noise_in_every_layout():
    examples, key = ragged_texts(9), jax.random.key(3)
    twin = {name: values.copy() for name, values in examples[0].items()}
    twin["input_ids"][1] += 1  # one token apart: other noise, also where the tokens agree
    batches = [
        sft.make_batch(sft.Config(), [*examples, twin], length=128),
        sft.make_batch(sft.Config(), [twin, *examples[::-1]], micro_batch_size=3, length=64),
    ]
    first, second = (by_document(batch, key) for batch in batches)
    assert first.keys() == second.keys() and len(first) == 10
    for tokens, noise in first.items():
        np.testing.assert_array_equal(noise, second[tokens])
        bound = ALPHA / np.sqrt((len(tokens) + 1) * DIM)
        assert 0.8 * bound < np.abs(noise).max() <= bound * (1 + 1e-6)
    one, other = (by_document(sft.make_batch(sft.Config(), [each]), key) for each in (examples[0], twin))
    (one,), (other,) = one.values(), other.values()
    assert not np.isin(one[2:], other[2:]).any()
    changed = by_document(batches[0], jax.random.key(4))
    assert all(not np.isin(noise, changed[tokens]).any() for tokens, noise in first.items())


def test_neither_split_nor_packing_changes_the_gradient():
    model, variables = tiny_model(num_layers=1, windows=(9,))
    config, examples, optimizer = sft.Config(neftune_noise_alpha=20.0), ragged_texts(7), optax.sgd(1.0)
    found = []
    for layout in ({"length": 192}, {"micro_batch_size": 3, "length": 64}):
        state, frozen = sft.init(config, model, variables, optimizer, jax.random.key(0))
        batch = sft.make_batch(config, examples, **layout)
        after, metrics = jax.jit(sft.make_step(config, model, optimizer))(state, frozen, batch)
        found.append((jax.tree.map(lambda a, b: a - b, after.params, state.params), metrics["loss"].value()))
    assert relative(found[0][0], found[1][0]) <= 1e-5
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    # Evaluation is without noise.
    quiet = jax.jit(make_eval_step(sft, config, model))(state.params, frozen, batch)["loss"].value()
    plain = jax.jit(make_eval_step(sft, sft.Config(), model))(state.params, frozen, batch)["loss"].value()
    assert quiet == plain and abs(quiet - found[1][1]) > 1e-3


def test_settings_that_clash_are_refused():
    for options, message in [
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "label_smoothing_factor goes with"),
        ({"label_smoothing_factor": 1.0}, "must lie in"),
        ({"neftune_noise_alpha": 0.0}, "must be above 0"),
        ({"loss_type": "chunked_nll"}, "is unknown; known: nll, dft"),
    ]:
        with pytest.raises(ValueError, match=message):
            sft.Config(**options)
