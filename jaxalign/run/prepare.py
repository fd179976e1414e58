"""What a stage needs before any parameter is loaded; bad input stops here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import jax
from jax.sharding import Mesh

from jaxalign import data, models
from jaxalign.config import Stage
from jaxalign.methods import METHODS
from jaxalign.methods.offline import Layout, make_layout, packing_report
from jaxalign.models.transformer import DType
from jaxalign.sharding import make_mesh


@dataclass(frozen=True)
class Prepared:
    """A stage ready to load its policy.

    Attributes:
      stage: the config, its inputs resolved to paths.
      method: the module of `METHODS`.
      mesh: the devices.
      data: examples, report and tokenizer.
      model: the policy's functions.
      layout: of batches.
      num_steps: optimiser steps of the stage.
    """

    stage: Stage
    method: ModuleType
    mesh: Mesh
    data: data.Data
    model: models.Model
    layout: Layout
    num_steps: int


def resolve_dtype(name: str) -> DType:
    """`auto` as bfloat16 on GPU and TPU, float32 on CPU, where bfloat16 is slower."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return cast(DType, auto if name == "auto" else name)


def prepare(stage: Stage) -> Prepared:
    """Reads config, tokenizer and data, and checks that they fit each other and the devices.

    Raises:
      FileNotFoundError: no such model or data.
      ValueError: anything else that cannot work; names the file, line or key.
    """
    method, mesh, config = METHODS[stage.method_name], make_mesh(stage.mesh), models.load_config(stage.model.path)
    if stage.data.max_length > config.max_position:
        raise ValueError(
            f"data.max_length={stage.data.max_length} exceeds the model's context of {config.max_position}"
        )
    found = data.load(stage.data, models.load_tokenizer(stage.model.path), method.KIND)
    layout = _layout(stage, [each for each in (found.train, found.eval) if each is not None], config, mesh)
    model = models.build(
        config,
        param_dtype=stage.model.param_dtype,
        compute_dtype=resolve_dtype(stage.model.compute_dtype),
        remat=stage.model.remat,
    )
    per_epoch = math.ceil(len(found.train) / stage.train.batch_size)
    steps = stage.train.max_steps
    if steps < 1:
        steps = math.ceil(stage.train.num_train_epochs * per_epoch)
    return Prepared(stage, method, mesh, found, model, layout, steps)


def check_data(stage: Stage) -> tuple[data.Data, dict[str, float]]:
    """The data as found, bad rows kept, and the measures of packing the good ones."""
    method, config = METHODS[stage.method_name], models.load_config(stage.model.path)
    found = data.inspect(stage.data, models.load_tokenizer(stage.model.path), method.KIND)
    good = found.train.good()
    if not len(good):
        return found, {}
    layout = _layout(stage, [good], config, make_mesh(stage.mesh))
    return found, packing_report(method, stage.method, good, layout)


def _layout(stage: Stage, examples: list[data.Examples], config: models.ModelConfig, mesh: Mesh) -> Layout:
    return make_layout(
        METHODS[stage.method_name],
        stage.method,
        examples,
        config,
        mesh,
        batch_size=stage.train.batch_size,
        micro_batch_size=stage.train.micro_batch_size,
        row_length=stage.train.row_length,
        seed=stage.data.seed,
    )
