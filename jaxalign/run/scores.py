"""A reward model's last step before its export: its scores brought to mean 0 and standard deviation 1."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from jaxalign import models
from jaxalign.methods.common import trains_scores
from jaxalign.methods.offline import OfflineSource, make_batches
from jaxalign.methods.reward import make_scores
from jaxalign.models.heads import rescale_scores
from jaxalign.run.inputs import Say
from jaxalign.run.prepare import Prepared
from jaxalign.sharding import replicated
from jaxalign.types import Variables

# Prompts that the mean and the standard deviation are taken over: enough for 2 % of a standard deviation.
PROMPTS = 2048


def finish_scores(ready: Prepared, params: Variables, say: Say) -> tuple[models.Model, Variables]:
    """The model and its parameters as they are exported: a stage's own, save for a reward model.

    A reward model is normalised if `method.normalize` asks for it: a gain and a bias after training, as Ziegler et al.,
    arXiv 1909.08593, do, here over the training data. Its padding token ends no completion, so that transformers reads
    its scores at EOS (see `models.identity.with_padding`).
    """
    if not trains_scores(ready.method):
        return ready.model, params
    config = ready.model.config
    if config.pad_id in models.end_ids(config, ready.data.tokenizer):
        config = replace(config, pad_id=None)
    if getattr(ready.stage.method, "normalize", False):
        scores = _training_scores(ready, params)
        mean, std = float(scores.mean()), float(scores.std())
        title = ready.stage.name or ready.stage.method_name
        say(f"{title}: scores of {scores.size} training completions: mean {mean:.4g}, standard deviation {std:.4g}")
        if std > 0:
            config, leaves = rescale_scores(config, params["params"], mean, std)
            params = {**params, "params": leaves}
        else:
            say(f"{title}: these cannot be normalised, the scores stay as they are")
    return ready.model.rebuild(config), params


def _training_scores(ready: Prepared, params: Variables) -> np.ndarray:
    """float64 `[completions]`, of at most `PROMPTS` prompts of the training data."""
    train, seed = ready.data.train, ready.stage.data.seed
    chosen = np.sort(np.random.default_rng(seed).permutation(len(train))[:PROMPTS])
    batches = make_batches(ready.method, ready.stage.method, train.select(chosen), ready.layout, shuffle=False)
    run = jax.jit(make_scores(ready.model), out_shardings=replicated(ready.mesh))
    source, found = OfflineSource(batches, ready.mesh), []
    try:
        for _ in range(len(batches)):
            batch, _ = source.next(None)
            found.append(np.asarray(run(params, batch), np.float64)[np.asarray(batch.present) > 0])
    finally:
        source.close()
    return np.concatenate(found)
