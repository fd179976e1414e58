"""The critic of a stage as a folder, from which a later stage's critic goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxalign import models
from jaxalign.models.heads import drop_lm_head
from jaxalign.run.folder import run_folder
from jaxalign.run.prepare import Prepared
from jaxalign.types import PyTree

FOLDER = "critic"


def export_critic(ready: Prepared, folder: Path, trained: Any, params: PyTree, frozen: PyTree) -> Path:
    """Writes the critic as a reward model's folder: its score of a token is the value of the state behind it.

    An adapter is merged; a critic that shares the policy's blocks takes them along.

    Args:
      ready: the stage.
      folder: the stage's; the critic goes to `critic` in it.
      trained: the models that the stage trains, see `ppo.Models`.
      params: what was trained.
      frozen: the rest.

    Returns:
      The folder.
    """
    stage = ready.stage
    model, variables = trained.value, ready.method.value_of(params, frozen)
    if model.config.lm_head:
        model, variables = drop_lm_head(model, variables)
    ends = models.end_ids(ready.model.config, ready.data.tokenizer)
    # transformers would read the score before EOS if that were the padding token.
    pad = None if model.config.pad_id in ends else model.config.pad_id
    origin = models.origin_of(stage.model.critic or stage.model.path)
    return models.save(
        folder / FOLDER,
        model.rebuild(replace(model.config, eos_ids=ends, pad_id=pad)),
        variables,
        ready.data.tokenizer,
        dtype=stage.export.dtype or stage.model.param_dtype,
        name=f"{run_folder(stage, folder).name} (critic)",
        base_model=origin.base_model,
        licence=origin.licence,
        method=f"{stage.method_name} (critic)",
        overwrite=True,
    )
