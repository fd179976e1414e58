"""Attention block by block is attention: values and gradients of the dense path, whatever shares a row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.methods import preference, sft
from jaxalign.models import attention
from jaxalign.models.attention import Keys, attend, make_blocks, rows_mask
from jaxalign.types import TokenRows
from tests.layouts import ragged_pairs, ragged_texts, relative, tiny_model

ROWS, LENGTH, HEADS, KV_HEADS, DIM = 2, 150, 4, 2, 8


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    """Trunks with branches, plain documents, padding in between and at the end; documents end inside of blocks."""
    packed = preference.make_batch(preference.Config(), ragged_pairs(9, prompt=70), length=LENGTH).rows
    taken = jax.tree.map(lambda x: jnp.asarray(x[0, :ROWS]), packed)
    assert int(taken.branches.max()) == 2 and int(taken.documents.max()) >= 2 and not bool((taken.documents > 0).all())
    return taken


def tensors(dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(ROWS, LENGTH, HEADS, DIM), *[(ROWS, KV_HEADS, LENGTH, DIM)] * 2, (ROWS, LENGTH, HEADS, DIM)]
    return [3 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def both_ways(rows, mask, dtype, **options):
    """Output where there are tokens, and its gradients under a random cotangent."""
    query, key, value, cotangent = tensors(dtype)
    cotangent = jnp.where(rows.documents[:, :, None, None] > 0, cotangent, 0)

    def run(query, key, value):
        out = attend(query, (Keys(key, value, mask),), scale=DIM**-0.5, **options)
        return (out * cotangent).sum(), jnp.where(rows.documents[:, :, None, None] > 0, out, 0)

    grads, out = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return out, grads


@pytest.mark.parametrize(("size", "window"), [pytest.param(32, None, marks=pytest.mark.slow), (50, 9), (160, None)])
def test_blocks_and_the_whole_agree(rows, size, window):
    with jax.enable_x64(True):
        for dtype, bound in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
            found = both_ways(rows, make_blocks(rows, window, size), dtype)
            wanted = both_ways(rows, rows_mask(rows, window), dtype)
            for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                assert relative(ours, theirs) <= bound
                assert ours.dtype == dtype


def test_a_block_of_the_mask_is_that_part_of_the_whole(rows):
    size, whole = 32, np.asarray(rows_mask(rows, 9))
    blocks = make_blocks(rows, 9, size)
    count = blocks.needed.shape[0]
    padded = np.pad(whole, [(0, 0)] + [(0, count * size - LENGTH)] * 2)
    for i, j in np.ndindex(count, count):
        part = padded[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
        np.testing.assert_array_equal(blocks.block(i, j), part)
        assert blocks.needed[i, j] or not part.any()
    # What ends before a window begins, and other documents, are skipped.
    assert np.asarray(blocks.needed).sum() <= 0.7 * count**2


def test_scores_far_apart_and_soft_caps(rows):
    """Blocks whose scores lie 1e4 below an earlier block's, and the cap: against a dense softmax written out."""
    query, key, value, _ = tensors(jnp.float32, seed=1)
    key = key.at[:, :, : LENGTH // 2].multiply(300.0)
    mask = make_blocks(rows, None, 32)
    grouped = query.reshape(ROWS, LENGTH, KV_HEADS, 2, DIM).transpose(0, 2, 3, 1, 4).reshape(ROWS, KV_HEADS, -1, DIM)
    real = (rows.documents > 0)[:, None, None, :, None]

    def dense(query, key, value, softcap):
        scores = jnp.einsum("rhgqd,rhkd->rhgqk", query.reshape(ROWS, KV_HEADS, 2, LENGTH, DIM), key)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        visible = rows_mask(rows, None)[:, None, None]
        probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1, where=visible)
        return jnp.where(real, jnp.einsum("rhgqk,rhkd->rhgqd", probs, value), 0)

    def blocks(query, key, value, softcap):
        out = attention.attend_blocks(query, key, value, mask, softcap=softcap)
        return jnp.where(real, out.reshape(ROWS, KV_HEADS, 2, LENGTH, DIM), 0)

    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (grouped, key, value)]
        for softcap in (None, 5.0):
            results = [
                jax.jit(jax.value_and_grad(partial(_total, f, softcap), argnums=(0, 1, 2)))(*wide)
                for f in (blocks, dense)
            ]
            assert relative(*results) <= 1e-10
            assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(results[0]))


def test_dropout_is_one_draw_in_both_passes(rows):
    """The gradient is that of the very probabilities that were kept: a difference quotient along a direction."""
    query, key, value, cotangent = tensors(jnp.float32)
    mask, drop_key = make_blocks(rows, None, 32), jax.random.key(5)
    cotangent = jnp.where(rows.documents[:, :, None, None] > 0, cotangent, 0)
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (query, key, value)]

        @jax.jit
        def run(query, key, value):
            keys = (Keys(key, value, mask),)
            return (attend(query, keys, scale=0.3, dropout=0.4, dropout_key=drop_key) * cotangent).sum()

        grads = jax.grad(run, argnums=(0, 1, 2))(*wide)
        step = [1e-6 * jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(wide)]
        ahead, behind = (run(*(x + sign * d for x, d in zip(wide, step, strict=True))) for sign in (1, -1))
        slope = sum((g * d).sum() for g, d in zip(grads, step, strict=True))
        np.testing.assert_allclose((ahead - behind) / 2, slope, rtol=1e-6)
    # Ones as values: a kept probability weighs 1 / 0.6, so the mean over many stays 1.
    ones = attend(query, (Keys(key, jnp.ones_like(value), mask),), scale=0.01, dropout=0.4, dropout_key=drop_key)
    real = np.asarray(ones)[np.asarray(rows.documents) > 0]
    assert real.mean() == pytest.approx(1, abs=0.05) and real.std() > 0.05


def test_a_step_of_a_model_is_the_same_either_way(monkeypatch):
    """Through the decoder with windows and rematerialisation: long rows choose the blocks by themselves."""
    model, variables = tiny_model(num_layers=2, windows=(None, 9))
    examples, optimizer = ragged_texts(5, longest=120), optax.sgd(1.0)
    batch = sft.make_batch(sft.Config(), examples, length=192)

    def step(variables):
        state, frozen = sft.init(sft.Config(), model, variables, optimizer, jax.random.key(0))
        after, metrics = sft.make_step(sft.Config(), model, optimizer)(state, frozen, batch)
        return jax.tree.map(jnp.subtract, after.params, state.params), metrics["loss"]

    dense = jax.jit(step)(variables)
    used = []
    monkeypatch.setattr(attention, "BLOCKWISE_FROM", 192)
    monkeypatch.setattr(attention, "BLOCK", 64)
    monkeypatch.setattr(attention, "attend_blocks", partial(_noted, used, attention.attend_blocks))
    blocks = jax.jit(lambda variables: step(variables))(variables)
    assert used and relative(blocks[0], dense[0]) <= 1e-5
    assert blocks[1].value() == pytest.approx(dense[1].value(), rel=1e-6)


def _total(function, softcap, *arguments):
    return jnp.sin(function(*arguments, softcap)).sum()


def _noted(used, function, *args, **kwargs):
    used.append(True)
    return function(*args, **kwargs)
