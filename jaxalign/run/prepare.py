"""What a stage needs before any parameter is loaded; bad input stops here."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import jax
from jax.sharding import Mesh

from jaxalign import data, models
from jaxalign.config import Stage
from jaxalign.methods import METHODS
from jaxalign.methods.common import make_eval_step, split_variables
from jaxalign.methods.offline import Layout, make_layout, packing_report
from jaxalign.models.transformer import DType
from jaxalign.sharding import make_mesh
from jaxalign.training.metrics import check_writers
from jaxalign.training.optimizer import make_optimizer

logger = logging.getLogger("jaxalign")


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
    make_optimizer(stage.optimizer, steps)
    check_writers(stage.log.report_to)
    ready = Prepared(stage, method, mesh, found, model, layout, steps)
    _check_evaluation(ready)
    return ready


def _check_evaluation(ready: Prepared) -> None:
    """Raises ValueError where the config asks for what evaluation data or metrics cannot give."""
    train, model = ready.stage.train, ready.stage.model
    if model.reference and not ready.method.NEEDS_REFERENCE:
        raise ValueError(f"model.reference: the method {ready.stage.method_name} has no reference; leave it away")
    if "float16" in (model.param_dtype, model.compute_dtype):
        raise ValueError("model: float16 cannot be trained in here (its gradients underflow); use bfloat16 or float32")
    if model.param_dtype == "bfloat16":
        logger.warning("model.param_dtype=bfloat16: small updates round to nothing; float32 is right for full training")
    if ready.data.eval is None:
        asked = ["eval_steps", "eval_on_start", "load_best_model_at_end", "early_stopping_patience"]
        given = [name for name in asked if getattr(train, name)]
        if given:
            raise ValueError(f"train.{given[0]} needs evaluation data: set data.eval_path, eval_split or eval_ratio")
        return
    examples = [ready.data.eval[0]]
    batch = ready.method.make_batch(ready.stage.method, examples, length=ready.layout.length)
    shapes = jax.eval_shape(ready.model.init, jax.random.key(0))

    def evaluate(variables, batch):
        if ready.method.NEEDS_REFERENCE:
            batch = ready.method.make_reference(ready.stage.method, ready.model)(variables, batch)
        return make_eval_step(ready.method, ready.stage.method, ready.model)(*split_variables(variables), batch)

    names = [f"eval_{name}" for name in jax.eval_shape(evaluate, shapes, batch)]
    wanted = train.metric_for_best_model
    if wanted not in names and f"eval_{wanted}" not in names:
        raise ValueError(f"train.metric_for_best_model: there is no {wanted!r}; there are {', '.join(names)}")


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
