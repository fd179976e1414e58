"""Memory: of vocabulary × tokens there is a chunk per row, and of all micro-batches no hidden states."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from jaxalign.methods import common, grpo, preference, sft, unpaired_preference
from jaxalign.models import ModelConfig, Rope, build
from jaxalign.training.optimizer import Config, make_optimizer
from jaxalign.training.step import accumulate
from tests.layouts import ragged_thumbs, tiny_model

VOCAB, LENGTH, CHUNK = 32_000, 512, 32
CHUNK_BYTES = CHUNK * VOCAB * 4  # a chunk's float32 logits of one row


@cache
def temporary_bytes(vocab: int, pairs: int, *, micro: int | None = None, length: int = LENGTH) -> int:
    """Of one step over pairs of 15/16 of a row each, a pair per row."""
    config = ModelConfig(
        "llama", vocab, 32, 2, 2, 2, 16, 64, 4096, rope=Rope(), windows=(None, None), tie_embeddings=True
    )
    model, settings = build(config), preference.Config(logits_chunk=CHUNK)
    rng = np.random.default_rng(0)
    example = {name: rng.integers(1, vocab, length * 5 // 16) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    batch = preference.make_batch(settings, [example] * pairs, micro_batch_size=micro, length=length)
    assert batch.predictions.sources.shape == (pairs // (micro or pairs), micro or pairs, length * 5 // 8)
    batch = replace(batch, fields={"ref_logps": np.zeros(batch.predictions.sources.shape, np.float32)})
    optimizer, schedule = make_optimizer(Config(), 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    state, frozen = jax.eval_shape(
        lambda variables: preference.init(settings, model, variables, optimizer, jax.random.key(0)), shapes
    )
    step = jax.jit(preference.make_step(settings, model, optimizer, schedule), donate_argnums=0)
    memory = step.lower(state, frozen, batch).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def vocabulary_bytes(pairs: int, **options: int) -> int:
    """What a step needs more with the vocabulary than with a hundredth of it."""
    return temporary_bytes(VOCAB, pairs, **options) - temporary_bytes(VOCAB // 100, pairs, **options)


@pytest.mark.parametrize("pairs", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_never_holds_logits_of_all_predictions(pairs):
    """Beside gradients and updates, two chunks of a row's 320 predictions: a fifth of all their logits."""
    gradients = 3 * 32 * VOCAB * 4
    assert vocabulary_bytes(pairs) - gradients < 2 * pairs * CHUNK_BYTES


def test_more_rows_need_their_chunks_and_no_more_logits():
    """Three more rows, each with a chunk of its own and its gradient; their 960 predictions have ten."""
    assert vocabulary_bytes(4) - vocabulary_bytes(1) < 2 * 3 * CHUNK_BYTES


def test_longer_rows_need_no_more_logits():
    """Four rows of four times the predictions: 3,840 more, whose logits would be 120 chunks of a row."""
    assert vocabulary_bytes(4, length=4 * LENGTH) - vocabulary_bytes(4) < 4 * CHUNK_BYTES


def test_more_micro_batches_need_no_more_memory():
    """Six more of them: nothing is kept of one but its gradient, which is added to the sum."""
    assert temporary_bytes(VOCAB, 8, micro=1) - temporary_bytes(VOCAB, 2, micro=1) < CHUNK_BYTES / 4


@pytest.mark.slow
def test_a_coupled_loss_does_not_hold_the_micro_batches():
    """Temporaries of 8 micro-batches less those of 2: a few numbers per completion, no hidden states."""
    model, variables = tiny_model(num_layers=1, windows=(9,))
    kto = unpaired_preference.Config(logits_chunk=17)

    def temporary(micro_batches):
        examples = ragged_thumbs(4) * micro_batches
        batch = unpaired_preference.make_batch(kto, examples, micro_batch_size=4, length=256)
        ref_logps = np.zeros(batch.predictions.sources.shape, np.float32)
        batch = replace(batch, fields={**batch.fields, "ref_logps": ref_logps})

        def compute(params, batch):
            loss, totals = unpaired_preference.make_loss(kto, model), unpaired_preference.totals(batch)
            return accumulate(loss, totals, params, {}, batch, jax.random.key(0))

        memory = jax.jit(compute).lower({"params": variables["params"]}, batch).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes, batch

    (few, _), (many, batch) = temporary(2), temporary(8)
    hidden = batch.rows.tokens[0].size * 32 * 4  # one layer's input of one micro-batch
    assert many - few < hidden


class Slice:
    """Eight devices of a kind that is not here, as a mesh shows them."""

    def __init__(self, platform: str, **sizes: int):
        self.shape = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), 1) | sizes
        self.devices = np.array([SimpleNamespace(platform=platform)] * 8)


@pytest.mark.parametrize(
    ("mesh", "rows", "chunk"),
    [
        (None, 1, 128),
        (Slice("cpu", fsdp=8), 8, 128),
        # 2**29 bytes of float32 are 1,046 times Llama 3's vocabulary.
        (Slice("tpu", fsdp=8), 8, 1046),
        (Slice("gpu", data=2, fsdp=4), 16, 523),
        (Slice("tpu", fsdp=4, tensor=2), 8, 1046),
        (Slice("tpu", fsdp=8), 8 * 64, 128),
    ],
)
def test_chunks_fill_a_share_of_an_accelerators_memory(mesh, rows, chunk):
    model = SimpleNamespace(mesh=mesh, config=SimpleNamespace(vocab_size=128_256))
    assert common.choose_chunk(cast("Any", model), rows) == chunk


@pytest.mark.parametrize("method", [sft, grpo], ids=["sft", "grpo"])
def test_a_chunk_that_is_none_is_refused(method):
    with pytest.raises(ValueError, match="logits_chunk=0 must be at least 1"):
        method.Config(logits_chunk=0)
