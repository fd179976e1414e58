"""Memory: no array of vocabulary × tokens, whatever the batch, and no hidden states of all micro-batches."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from jaxalign.methods import preference, unpaired_preference
from jaxalign.models import ModelConfig, Rope, build
from jaxalign.training.optimizer import Config, make_optimizer
from jaxalign.training.step import accumulate
from tests.layouts import ragged_thumbs, tiny_model

VOCAB, LENGTH = 32_000, 512


@cache
def temporary_bytes(vocab: int, pairs: int) -> int:
    config = ModelConfig(
        "llama", vocab, 32, 2, 2, 2, 16, 64, 1024, rope=Rope(), windows=(None, None), tie_embeddings=True
    )
    model, settings = build(config), preference.Config(logits_chunk=32)
    rng = np.random.default_rng(0)
    example = {name: rng.integers(1, vocab, 160) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    batch = preference.make_batch(settings, [example] * pairs, length=LENGTH)
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


@pytest.mark.parametrize("pairs", [1, 4])
def test_a_step_never_holds_logits_of_all_predictions(pairs):
    """4 pairs have 1,280 predictions: all their logits would be 164 MB more than a vocabulary of 320 needs."""
    predictions = pairs * 320
    parameters = 4 * 32 * (VOCAB - 320)
    extra = temporary_bytes(VOCAB, pairs) - temporary_bytes(320, pairs) - 3 * parameters
    chunk = pairs * 32 * VOCAB * 4
    assert extra < 5 * chunk
    assert extra < 0.7 * predictions * VOCAB * 4


def test_more_predictions_do_not_need_more_logits():
    """A row's memory may grow with its tokens, not with tokens × vocabulary."""

    def growth(vocab):
        return temporary_bytes(vocab, 4) - temporary_bytes(vocab, 1)

    per_row = 3 * 32 * VOCAB * 4  # three more rows, one chunk of logits each
    assert growth(VOCAB) - growth(320) < 5 * per_row


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
