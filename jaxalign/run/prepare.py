"""What a stage needs before any parameter is loaded; bad input stops here."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign import data, models
from jaxalign.config import Stage
from jaxalign.methods import METHODS
from jaxalign.methods.common import (
    check_examples,
    has_critic,
    is_online,
    make_eval_step,
    needs_reference,
    score_labels,
    split_variables,
    trains_scores,
)
from jaxalign.methods.offline import Layout, make_layout, pack_global, packing_report, split, split_length
from jaxalign.methods.rollout import row_length
from jaxalign.methods.row_length import choose_rollout_length
from jaxalign.methods.running import with_carry
from jaxalign.models.attention import Attention
from jaxalign.models.config import DType
from jaxalign.models.heads import score_config
from jaxalign.run.adapting import adapted_config, check_adapting, extended_config, longer_context
from jaxalign.run.checks import check_streaming
from jaxalign.run.drawing import sampling_config
from jaxalign.run.kernels import check_offloading, choose_attention
from jaxalign.run.scoring import check_rewards, reward_names
from jaxalign.run.supervised import load_supervised
from jaxalign.sections import TrainSection
from jaxalign.sharding import make_mesh, remesh
from jaxalign.training.metrics import check_writers
from jaxalign.training.optimizer import make_optimizer

logger = logging.getLogger("jaxalign")

# Settings of `train` that say nothing without evaluation data.
OF_EVALUATION = (
    *("eval_steps", "eval_on_start", "metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
    *("early_stopping_patience", "early_stopping_threshold"),
)


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
      attention: by what it is computed, and why.
      supervised: what is mixed into its batches, see `supervised`.
    """

    stage: Stage
    method: ModuleType
    mesh: Mesh
    data: data.Data
    model: models.Model
    layout: Layout
    num_steps: int
    attention: str = "xla"
    supervised: data.Data | None = None

    @property
    def compute_dtype(self) -> DType:
        """The dtype of activations and matrix products."""
        return resolve_dtype(self.stage.model.compute_dtype, self.mesh)


def resolve_dtype(name: str, mesh: Mesh | None = None) -> DType:
    """`auto` as bfloat16 on GPU and TPU, float32 on CPU, where bfloat16 is slower; without a mesh of this machine."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    auto = "float32" if device.platform == "cpu" else "bfloat16"
    return cast(DType, auto if name == "auto" else name)


def prepare(stage: Stage, *, devices: list | None = None, found: data.Data | None = None) -> Prepared:
    """Reads config, tokenizer and data, and checks that they fit each other and the devices.

    Args:
      stage: the config, its inputs resolved to paths.
      devices: where it will run; this machine's by default.
      found: the data, where they are not to be read.

    Raises:
      FileNotFoundError: no such model or data.
      ValueError: anything else that cannot work; names the file, line or key.
    """
    method, mesh = METHODS[stage.method_name], make_mesh(stage.mesh, devices)
    remesh(mesh, stage.rollout.mesh, "rollout.mesh")
    config = extended_config(stage, _heads(stage, models.load_config(stage.model.path)))
    shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
    config = adapted_config(stage, config, shapes)
    check_adapting(stage, config, shapes)
    if stage.data.max_length > config.max_position:
        raise ValueError(
            f"data.max_length={stage.data.max_length} exceeds the model's context of {config.max_position}"
            + longer_context(config)
        )
    if found is None:
        found = data.load(_data_config(stage), models.load_tokenizer(stage.model.path), method.KIND)
    check_streaming(stage, found)
    found = _wrapped(stage, found, config)
    for name, each in (("training", found.train), ("evaluation", found.eval)):
        if each is not None:
            check_examples(method, stage.method, each, stage.train.batch_size, name)
    mixed = load_supervised(stage, found.tokenizer, config)
    examples = [each for each in (found.train, found.eval) if each is not None]
    compute_dtype = resolve_dtype(stage.model.compute_dtype, mesh)
    stage, attention = choose_attention(stage, examples, config, mesh, compute_dtype)
    layout = _layout(stage, examples, config, mesh, mixed)
    model = models.build(
        config,
        param_dtype=stage.model.param_dtype,
        compute_dtype=compute_dtype,
        remat=stage.model.remat,
        attention=cast(Attention, stage.model.attention),
        mesh=mesh,
    )
    steps = stage.train.max_steps
    if steps < 1:
        steps = math.ceil(stage.train.num_train_epochs * steps_per_epoch(stage, found.epoch_size))
    make_optimizer(stage.optimizer, steps)
    check_offloading(stage, mesh)
    check_writers(stage.log.report_to)
    ready = Prepared(stage, method, mesh, found, model, layout, steps, attention, mixed)
    _check_evaluation(ready)
    return ready


def steps_per_epoch(stage: Stage, examples: int) -> int:
    """Optimiser steps in one pass over the data."""
    method, batch_size = METHODS[stage.method_name], stage.train.batch_size
    if not is_online(method):
        return math.ceil(examples / batch_size)
    updates, prompts = method.num_updates(stage.method), method.rollout_prompts(stage.method, batch_size)
    return math.ceil(examples / prompts * updates)


def best_metric(stage: Stage) -> str:
    """The evaluation metric that picks the best checkpoint."""
    default = "eval_reward" if is_online(METHODS[stage.method_name]) else "eval_loss"
    return stage.train.metric_for_best_model or default


def _heads(stage: Stage, config: models.ModelConfig) -> models.ModelConfig:
    """The config of what the stage trains: a language model, or one with a score head instead."""
    if trains_scores(METHODS[stage.method_name]):
        labels = score_labels(METHODS[stage.method_name])
        if config.score_head and config.score_labels != labels:
            raise ValueError(
                f"model.path={stage.model.path} has a score head with num_labels={config.score_labels}; "
                f"{stage.method_name} trains one with {labels}"
            )
        if config.score_head and labels == 1 and config.pad_id in config.eos_ids:
            logger.warning(
                "%s pads with EOS: transformers reads its scores at the token before EOS, here EOS itself is read",
                stage.model.path,
            )
        return config if config.score_head else score_config(config, labels=labels)
    if not config.lm_head:
        raise ValueError(
            f"model.path={stage.model.path} is a reward model, without an LM head; {stage.method_name} trains a policy"
        )
    return config


def _check_evaluation(ready: Prepared) -> None:
    """Raises ValueError where the config asks for what evaluation data or metrics cannot give."""
    train, model = ready.stage.train, ready.stage.model
    if model.critic and not has_critic(ready.method):
        raise ValueError(f"model.critic: the method {ready.stage.method_name} has no critic; leave it away")
    if ready.stage.export.critic and not has_critic(ready.method):
        raise ValueError(f"export.critic: the method {ready.stage.method_name} has no critic; set it to false")
    if is_online(ready.method):
        sampling_config(ready)
        check_rewards(ready)
    if model.reference and not needs_reference(ready.method, ready.stage.method):
        raise ValueError(f"model.reference: the method {ready.stage.method_name} has no reference; leave it away")
    if getattr(ready.stage.method, "sync_ref_model", False) and (ready.stage.lora or model.trainable):
        raise ValueError("method.sync_ref_model: the reference follows the whole policy; train all parameters")
    if model.reference_cache and not getattr(ready.stage.method, "precompute_ref_log_probs", False):
        raise ValueError("model.reference_cache: nothing is kept there without method.precompute_ref_log_probs: true")
    if trains_scores(ready.method) and ready.stage.log.sample_steps:
        raise ValueError("log.sample_steps: a reward model gives scores and no answers; set it to null here")
    if "float16" in (model.param_dtype, model.compute_dtype):
        raise ValueError("model: float16 cannot be trained in here (its gradients underflow); use bfloat16 or float32")
    if model.param_dtype == "bfloat16" and ready.stage.lora is None:
        logger.warning("model.param_dtype=bfloat16: small updates round to nothing; float32 is right for full training")
    if ready.data.eval is None:
        given = [name for name in OF_EVALUATION if getattr(train, name) != getattr(TrainSection, name)]
        if given:
            raise ValueError(f"train.{given[0]} needs evaluation data: set data.eval_path, eval_split or eval_ratio")
        return
    names = [f"eval_{name}" for name in (_online_metrics if is_online(ready.method) else _offline_metrics)(ready)]
    wanted = best_metric(ready.stage)
    if wanted not in names and f"eval_{wanted}" not in names:
        raise ValueError(f"train.metric_for_best_model: there is no {wanted!r}; there are {', '.join(names)}")


def _online_metrics(ready: Prepared) -> list[str]:
    """Names of what greedy answers are judged by."""
    lengths = [f"completions/{kind}_{of}length" for of in ("", "terminated_") for kind in ("mean", "min", "max")]
    rewards = [f"rewards/{name}/mean" for name in reward_names(ready.stage.rollout)]
    return ["reward", *rewards, *lengths, "completions/clipped_ratio"]


def _offline_metrics(ready: Prepared) -> list[str]:
    """Names of the metrics of the method's loss."""
    assert ready.data.eval is not None
    examples = [ready.data.eval[i] for i in range(min(2, len(ready.data.eval), ready.layout.batch_size))]
    batch = pack_global(ready.method, ready.stage.method, examples, ready.layout).batch
    shapes = jax.eval_shape(ready.model.init, jax.random.key(0))

    def evaluate(variables, batch):
        if needs_reference(ready.method, ready.stage.method):
            batch = ready.method.make_reference(ready.stage.method, ready.model)(variables, batch)
        batch = with_carry(ready.method, ready.stage.method, batch)
        return make_eval_step(ready.method, ready.stage.method, ready.model)(*split_variables(variables), batch)

    return list(jax.eval_shape(evaluate, shapes, batch))


def check_data(stage: Stage) -> tuple[data.Data, dict[str, float]]:
    """The data as found, bad rows kept, and the measures of packing the good ones."""
    method, config = METHODS[stage.method_name], models.load_config(stage.model.path)
    found = data.inspect(_data_config(stage), models.load_tokenizer(stage.model.path), method.KIND)
    check_streaming(stage, found)
    good = found.train.good()
    found = replace(found, report=replace(found.report, bias=data.length_bias(good)))
    if not len(good):
        return found, {}
    good = _wrapped(stage, replace(found, train=good, eval=None), config).train
    check_examples(method, stage.method, good, stage.train.batch_size, "training")
    mixed = load_supervised(stage, found.tokenizer, config)
    mesh = make_mesh(stage.mesh)
    stage, _ = choose_attention(stage, [good], config, mesh, resolve_dtype(stage.model.compute_dtype))
    layout = _layout(stage, [good], config, mesh, mixed)
    if is_online(method):
        return found, {"row_length": layout.length}  # what is packed is yet to be drawn
    return found, packing_report(method, stage.method, good, layout)


def _layout(
    stage: Stage, examples: list[data.Examples], config: models.ModelConfig, mesh: Mesh, mixed: data.Data | None
) -> Layout:
    if is_online(METHODS[stage.method_name]):
        return online_layout(stage, examples, config, mesh, mixed)
    wrapped = stage.train.packing_strategy == "wrapped"
    layout = make_layout(
        METHODS[stage.method_name],
        stage.method,
        examples,
        config,
        mesh,
        batch_size=stage.train.batch_size,
        micro_batch_size=stage.train.micro_batch_size,
        # A wrapped row's last token is only a target, which takes no place.
        row_length=_wrapped_length(stage) + 1 if wrapped else stage.train.row_length,
        seed=stage.data.seed,
        max_length=stage.data.max_length,
        # Of a stream only the beginning is known: what may come is at least this long.
        least=stage.data.max_length if stage.data.streaming else 0,
    )
    return replace(layout, length=split_length(_wrapped_length(stage), mesh)) if wrapped else layout


def _wrapped_length(stage: Stage) -> int:
    """Tokens of a row under `wrapped`, where no single text decides them."""
    length = stage.train.row_length
    return stage.data.max_length if isinstance(length, str) else length


def _data_config(stage: Stage) -> data.DataConfig:
    """How the texts are encoded: under `wrapped` they are cut into rows, so that none is too long."""
    if stage.train.packing_strategy != "wrapped":
        return stage.data
    if METHODS[stage.method_name].KIND != "sft":
        raise ValueError(f"train.packing_strategy=wrapped cuts texts into rows; {stage.method_name} needs them whole")
    if stage.data.truncation_mode or stage.data.max_prompt_length:
        raise ValueError(
            "train.packing_strategy=wrapped keeps every token: leave data.truncation_mode and "
            "data.max_prompt_length away"
        )
    return replace(stage.data, max_length=np.iinfo(np.int32).max)


def _wrapped(stage: Stage, found: data.Data, config: models.ModelConfig) -> data.Data:
    """The data as rows, where the stage asks for that."""
    if stage.train.packing_strategy != "wrapped":
        return found
    length = _wrapped_length(stage)
    if not 2 <= length <= config.max_position:
        raise ValueError(f"train.row_length={length} must be at least 2 and at most the model's {config.max_position}")
    train = data.wrap(found.train, length, stage.data.seed if stage.data.shuffle else None)
    return replace(found, train=train, eval=None if found.eval is None else data.wrap(found.eval, length))


def online_layout(
    stage: Stage,
    examples: list[data.Examples],
    config: models.ModelConfig,
    mesh: Mesh,
    mixed: data.Data | None = None,
) -> Layout:
    """Rows that hold whatever completions may come of these prompts, and any supervised example.

    Raises:
      ValueError: a prompt with a completion may not fit the model's context, or a row; or the processes cannot share a
        micro-batch evenly.
    """
    method, train = stage.method, stage.train
    micro = train.micro_batch_size or train.batch_size
    shards, process, processes = split(mesh, micro)
    longest = max(int(each.lengths["prompt"].max()) for each in examples)
    if longest + method.max_completion_length > config.max_position:
        raise ValueError(
            f"method.max_completion_length={method.max_completion_length} and the longest prompt of {longest} tokens "
            f"exceed the model's context of {config.max_position}: lower it, or set data.max_prompt_length"
        )
    multiple = 32 if mesh.devices.flat[0].platform == "cpu" else 128
    least = row_length(
        longest,
        method.max_completion_length,
        method.num_generations,
        share_prompt=method.share_prompt,
        multiple=multiple,
    )
    if mixed is not None:
        least = max(least, -(-int(mixed.train.lengths["total"].max()) // multiple) * multiple)
    if isinstance(train.row_length, int) and train.row_length < least:
        what = "a prompt with its completions" + (", or a text of ptx_data," if mixed is not None else "")
        raise ValueError(f"train.row_length={train.row_length}, but {what} may take {least}")
    if isinstance(train.row_length, int):
        length = train.row_length
    else:
        known = examples[0].lengths["prompt"]
        length = choose_rollout_length(
            known[np.random.default_rng(stage.data.seed).permutation(len(known))],
            train.batch_size,
            micro,
            steps=method.max_completion_length,
            completions=method.num_generations,
            share_prompt=method.share_prompt,
            least=least,
            model=config,
            multiple=multiple,
        )
    return Layout(train.batch_size, micro, split_length(length, mesh), shards, process, processes)
