# pyright: reportMissingImports=false
"""NEFTune's noise against the hook of transformers: the same bound and spread for a text without padding."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxalign.methods import sft
from jaxalign.methods.noise import embedding_noise
from tests.layouts import VOCAB

torch = pytest.importorskip("torch")

from transformers.integrations.neftune import neftune_post_forward_hook  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

ALPHA, TOKENS, DIM = 5.0, 300, 64


def test_the_size_of_the_noise():
    module = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(module, None, torch.zeros(1, TOKENS, DIM)).numpy()
    ids = np.random.default_rng(0).integers(1, VOCAB, TOKENS).astype(np.int32)
    batch = sft.make_batch(sft.Config(), [{"input_ids": ids, "loss_mask": np.arange(TOKENS) > 0}])
    rows = jax.tree.map(lambda x: x[0], batch.rows)
    noise = np.asarray(embedding_noise(rows, jax.random.key(0), alpha=ALPHA, embed_dim=DIM))
    ours = noise[np.asarray(rows.documents) > 0]
    # The last token is only a target and takes no place in the row, and counts all the same.
    assert ours.shape == (TOKENS - 1, DIM) and not noise[np.asarray(rows.documents) == 0].any()
    bound = ALPHA / np.sqrt(TOKENS * DIM)
    for values in (ours, theirs):
        assert bound * 0.999 < np.abs(values).max() <= bound * (1 + 1e-6)
        # Uniform on [-b, b]: mean 0, standard deviation b / sqrt(3).
        assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.02) and abs(values.mean()) < 0.03 * bound
