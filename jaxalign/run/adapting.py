"""What of a stage's models trains: an adapter, some of the parameters, or all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax

from jaxalign import models
from jaxalign.config import Stage
from jaxalign.models import LoraConfig, ModelConfig
from jaxalign.models.families import tensors
from jaxalign.models.freezing import check_trainable, split
from jaxalign.models.lora import init_lora
from jaxalign.models.peft import base_of, open_adapter, to_lora
from jaxalign.models.quantized import quantize_params
from jaxalign.types import Variables

logger = logging.getLogger("jaxalign")


def extended_config(stage: Stage, config: ModelConfig) -> ModelConfig:
    """The config with the context that the stage asks for; raises ValueError where `longrope` has no longer one."""
    if not stage.model.long_context:
        return config
    return _named("model.long_context", lambda: models.extend_context(config))


def longer_context(config: ModelConfig) -> str:
    """The end of a message about long texts: how a model with longrope is asked for its longer context."""
    ropes = [rope for rope in config.layer_ropes if rope is not None and rope.kind == "longrope" and not rope.long]
    return f"; model.long_context: true takes the factors for {ropes[0].max_position}" if ropes else ""


def adapted_config(stage: Stage, config: ModelConfig, shapes: Variables) -> ModelConfig:
    """The config with the adapter of the stage, if it has one.

    Args:
      stage: the config of the stage.
      config: of its model.
      shapes: of the model's variables.

    Raises:
      ValueError: settings that differ from those of the adapter that is continued.
    """
    section = stage.lora
    if section is None:
        return config
    names = [each.name for each in fields(LoraConfig)]
    settings = LoraConfig(**{name: getattr(section, name) for name in names})
    if section.path is not None:
        found, _ = _open(section.path, config, shapes)
        _check_base(section.path, stage.model.path)
        for name in names:
            asked = getattr(section, name)
            if name != "dropout" and asked not in (getattr(LoraConfig, name), getattr(found, name)):
                has = getattr(found, name)
                raise ValueError(f"lora.{name}={asked!r}, but the adapter in {section.path} has {has!r}; leave it away")
        settings = replace(found, dropout=section.dropout)
    return replace(config, lora=settings)


def adapt(
    stage: Stage, config: ModelConfig, variables: Variables, key: jax.Array, *, continued: bool = True
) -> Variables:
    """Variables in which the stage's choice of what trains is made; see `models.freezing.split`.

    Args:
      stage: the config of the stage.
      config: of the model, see `adapted_config`.
      variables: of the model, without an adapter; the result shares their arrays.
      key: of a new adapter's draw.
      continued: begin with the adapter of `lora.path`, where there is one.

    Raises:
      ValueError: a target or a pattern that matches nothing, or an adapter for another model; names the key.
    """
    if stage.lora is not None and config.lora is not None:
        if stage.lora.path is not None and continued:
            return {**variables, "lora": _open(stage.lora.path, config, variables)[1]}
        lora = config.lora
        adapter = _named("lora.target_modules", lambda: init_lora(config, variables, lora, key))
        return {**variables, "lora": adapter}
    if stage.model.trainable is None:
        return variables
    heads = [tensor.name for tensor in tensors(config) if tensor.path[0] == "score"]
    patterns = (*stage.model.trainable, *heads)
    return _named("model.trainable", lambda: models.freeze(config, variables, patterns))


def check_adapting(stage: Stage, config: ModelConfig, shapes: Variables) -> None:
    """Raises ValueError where the stage cannot train what it says; nothing is loaded for it."""

    def start(variables: Variables) -> Variables:
        if stage.model.quantization is not None:
            params = _named(
                "model.quantization", lambda: quantize_params(variables["params"], stage.model.quantization or "")
            )
            variables = {**variables, "params": params}
        return split(adapt(stage, config, variables, jax.random.key(0)))[0]

    _named("model.quantization", lambda: check_trainable(jax.eval_shape(start, shapes)))


def describe_training(stage: Stage, config: ModelConfig, shapes: Variables) -> str | None:
    """A line that says how much trains, None where everything does."""
    if stage.lora is None and stage.model.trainable is None:
        return None
    trained = jax.eval_shape(lambda variables: split(adapt(stage, config, variables, jax.random.key(0)))[0], shapes)
    some, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trained, shapes))
    bits = {None: "", "int8": " over weights in 8 bits", "nf4": " over weights in 4 bits"}[stage.model.quantization]
    what = f"an adapter of rank {config.lora.r}" if config.lora else ", ".join(stage.model.trainable or ())
    off = config.lora is not None and config.lora.dropout > 0 and getattr(stage.method, "disable_dropout", False)
    dropout = "; its dropout is off (method.disable_dropout)" if off else ""
    return f"training {what}{bits}: {some:,} parameters, {some / total:.2%} of the model's{dropout}"


def _open(path: str, config: ModelConfig, variables: Variables) -> tuple[LoraConfig, dict]:
    return _named("lora.path", lambda: to_lora(open_adapter(path), config, variables["params"]))


def _check_base(adapter: str, model: str) -> None:
    """Warns of an adapter that names another base than the stage's: its tensors' shapes fit, and cannot tell."""
    base = _named("lora.path", lambda: base_of(Path(adapter)))
    if base != model and Path(base).resolve() != Path(model).resolve():
        logger.warning(
            "lora.path: the adapter in %s was made for %s, and model.path is %s; over other weights it means nothing",
            adapter,
            base,
            model,
        )


def _named(key: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; its ValueErrors and missing files begin with the key."""
    try:
        return make()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        if text.startswith(("lora.", "model.")):
            raise
        raise type(error)(f"{key}: {text}") from error
