"""What a stage trains on once it may load parameters: its policy, and examples with what their loss needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxalign import data, models
from jaxalign.config import Stage
from jaxalign.methods.common import needs_reference
from jaxalign.methods.moving_reference import MovingReference
from jaxalign.methods.offline import ExampleList
from jaxalign.methods.reference import cache_key, precompute
from jaxalign.run.prepare import Prepared, resolve_dtype
from jaxalign.sharding import param_shardings
from jaxalign.types import Batch, Variables

Say = Callable[[str], None]
HEAD = np.iinfo(np.int32).max  # no step has this number: the new head's draw is none of theirs


@dataclass(frozen=True)
class Examples:
    """Training and evaluation examples as the loss wants them, and what fills a batch on the devices.

    Attributes:
      train: the training examples.
      eval: the evaluation examples, or None.
      fill: adds the reference's log-probs to a batch; None where the examples carry them or nothing needs them.
      moving: that reference, where it follows the policy; then `fill` is it.
    """

    train: ExampleList
    eval: ExampleList | None
    fill: Callable[[Batch], Batch] | None
    moving: MovingReference | None = None


def load_policy(ready: Prepared, path: str) -> Variables:
    """Parameters on the mesh, in the stage's dtype; with a new score head, where the stage needs one and there is none.

    Raises:
      ValueError: the checkpoint is another model than the stage's: the same functions would misread it.
    """
    model, variables = models.load(path, mesh=ready.mesh, param_dtype=ready.stage.model.param_dtype)
    if ready.model.config.score_head and not model.config.score_head:
        key = jax.random.fold_in(jax.random.key(ready.stage.train.seed), HEAD)
        model, variables = models.add_score_head(model, variables, key)
        variables = jax.device_put(variables, param_shardings(ready.mesh, variables))
    same = {"bos_id": None, "eos_ids": (), "pad_id": None, "score_bias": 0.0}
    ours, theirs = (asdict(replace(each, **same)) for each in (ready.model.config, model.config))
    other = [
        f"{name} is {theirs[name]!r} instead of {value!r}" for name, value in ours.items() if theirs[name] != value
    ]
    if other:
        raise ValueError(f"{path} is not the same model as {ready.stage.model.path}: {'; '.join(other)}")
    return variables


def reference_folder(stage: Stage) -> Path:
    """Where log-probs of references are kept: `model.reference_cache`, or below the user's cache folder."""
    if stage.model.reference_cache is not None:
        return Path(stage.model.reference_cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxalign" / "reference"


def attach_reference(ready: Prepared, load: Callable[[str], Variables], say: Say) -> Examples:
    """The examples, with what their loss needs of a reference (the policy's start, or `model.reference`).

    Args:
      ready: the stage.
      load: path -> parameters; called only if the reference has to run.
      say: takes lines for the user.
    """
    train, held_out, stage = ready.data.train, ready.data.eval, ready.stage
    if not needs_reference(ready.method, stage.method):
        return Examples(train, held_out, None)
    path = stage.model.reference or stage.model.path
    run = jax.jit(ready.method.make_reference(stage.method, ready.model))
    if getattr(stage.method, "sync_ref_model", False):
        alpha, every = stage.method.ref_model_mixup_alpha, stage.method.ref_model_sync_steps
        moving = MovingReference(run, load(path), alpha=alpha, every=every)
        return Examples(train, held_out, moving, moving)
    if not stage.method.precompute_ref_log_probs:
        return Examples(train, held_out, partial(run, load(path)))
    folder = reference_folder(stage)
    dtypes = f"{stage.model.param_dtype} {resolve_dtype(stage.model.compute_dtype)}"
    fingerprint = f"{models.fingerprint(path)} {dtypes}"

    def attach(examples: data.Examples) -> ExampleList:
        key = cache_key(examples, fingerprint)
        say(f"reference log-probs: kept in {folder / key}")
        fill = lambda batch: run(load(path), batch)  # noqa: E731
        return precompute(ready.method, stage.method, examples, ready.layout, ready.mesh, fill, folder, key)

    return Examples(attach(train), None if held_out is None else attach(held_out), None)
