"""What a stage trains on once it may load parameters: its policy, and examples with what their loss needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np

from jaxalign import data, models
from jaxalign.config import Stage
from jaxalign.methods.common import needs_reference
from jaxalign.methods.moving_reference import MovingReference
from jaxalign.methods.offline import ExampleList
from jaxalign.methods.reference import cache_key, precompute
from jaxalign.models.identity import adapter_fingerprint
from jaxalign.run.adapting import adapt, extended_config
from jaxalign.run.prepare import Prepared
from jaxalign.run.programs import make_reference_pass
from jaxalign.sharding import param_shardings
from jaxalign.training.offload import on_host
from jaxalign.types import Batch, Variables

Say = Callable[[str], None]
# No step has these numbers: the draws of a new head and of a new adapter are none of theirs.
HEAD = np.iinfo(np.int32).max
ADAPTER = HEAD - 3


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
    """Parameters on the mesh, in the stage's dtype or quantised, without an adapter.

    They have a new score head, where the stage needs one and there is none.

    Raises:
      ValueError: the checkpoint is another model than the stage's: the same functions would misread it.
    """
    settings = ready.stage.model
    model, variables = models.load(
        path, mesh=ready.mesh, param_dtype=settings.param_dtype, quantization=settings.quantization
    )
    if ready.model.config.score_head and not model.config.score_head:
        key = jax.random.fold_in(jax.random.key(ready.stage.train.seed), HEAD)
        model, variables = models.add_score_head(model, variables, key, labels=ready.model.config.score_labels)
        variables = jax.device_put(variables, param_shardings(ready.mesh, variables))
    extended = extended_config(ready.stage, model.config)
    same = {"bos_id": None, "eos_ids": (), "pad_id": None, "score_bias": 0.0, "lora": None}
    ours, theirs = (asdict(replace(each, **same)) for each in (ready.model.config, extended))
    other = [
        f"{name} is {theirs[name]!r} instead of {value!r}" for name, value in ours.items() if theirs[name] != value
    ]
    if other:
        raise ValueError(f"{path} is not the same model as {ready.stage.model.path}: {'; '.join(other)}")
    return variables


def load_start(ready: Prepared, load: Callable[[str], Variables]) -> Variables:
    """The policy's start: its parameters, and what of them trains."""
    variables = load(ready.stage.model.path)
    key = jax.random.fold_in(jax.random.key(ready.stage.train.seed), ADAPTER)
    return adapt(ready.stage, ready.model.config, variables, key)


def load_reference(ready: Prepared, load: Callable[[str], Variables]) -> Variables:
    """The reference's variables: `model.reference`, or the policy's start, whose arrays it then shares.

    A new adapter changes nothing yet, so that start is the weights without it; one that goes on is part of it.
    """
    stage = ready.stage
    if stage.model.reference is None and stage.lora is not None and stage.lora.path is not None:
        return load_start(ready, load)
    return load(stage.model.reference or stage.model.path)


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
    run = make_reference_pass(ready)
    if getattr(stage.method, "sync_ref_model", False):
        alpha, every = stage.method.ref_model_mixup_alpha, stage.method.ref_model_sync_steps
        moving = MovingReference(run, load_reference(ready, load), alpha=alpha, every=every)
        return Examples(train, held_out, moving, moving)
    if not stage.method.precompute_ref_log_probs:
        reference = load_reference(ready, load)
        if stage.model.offload_reference:
            reference = jax.device_put(reference, on_host(jax.tree.map(lambda x: x.sharding, reference), reference))
        return Examples(train, held_out, partial(run, reference))
    folder, reference = reference_folder(stage), cache(partial(load_reference, ready, load))
    dtypes = f"{stage.model.param_dtype} {ready.compute_dtype}"
    fingerprint = f"{models.fingerprint(path)} {dtypes}"
    if stage.model.quantization is not None:
        fingerprint += f" {stage.model.quantization}"
    if stage.model.long_context:
        fingerprint += " long context"
    if stage.lora is not None and stage.lora.path is not None and stage.model.reference is None:
        fingerprint += f" {adapter_fingerprint(stage.lora.path)}"

    def attach(examples: data.Examples) -> ExampleList:
        key = cache_key(examples, fingerprint)
        say(f"reference log-probs: kept in {folder / key}")
        fill = lambda batch: run(reference(), batch)  # noqa: E731
        return precompute(ready.method, stage.method, examples, ready.layout, ready.mesh, fill, folder, key)

    return Examples(attach(train), None if held_out is None else attach(held_out), None)
