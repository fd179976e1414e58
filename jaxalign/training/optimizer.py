"""Optimisers and learning-rate schedules with the meaning that they have in Hugging Face's Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import Array

Schedule = Callable[[Array | int], jax.Array]

UNDECAYED = ("scale", "bias")


@dataclass(frozen=True)
class Config:
    """How parameters are updated; names and defaults are those of transformers' `TrainingArguments`.

    Attributes:
      name: a key of `OPTIMIZERS`.
      learning_rate: the peak of the schedule; methods may have another default.
      lr_scheduler_type: a key of `SCHEDULES`.
      warmup_steps: updates of linear warm-up from 0; goes before `warmup_ratio`.
      warmup_ratio: share of all updates that warm up, rounded up, in `[0, 1]`; used where `warmup_steps` is 0.
      weight_decay: decoupled, times the learning rate; on everything but norms and biases.
      adam_beta1: decay of the first moment.
      adam_beta2: decay of the second moment.
      adam_epsilon: added to the root of the second moment, outside the root as in torch; by `adamw_tf` before that
        moment's bias is corrected.
      max_grad_norm: clip by the global norm; 0 or None turns it off.
      adafactor_decay_rate: the second moment's decay at update t (from 1) is `1 - t**-rate`.
      adafactor_clip_threshold: largest root mean square of a layer's update before the learning rate.
      adafactor_scale_parameter: multiply an update by the root mean square of its parameter.
      adafactor_min_dim_size_to_factor: a second moment is factored when its two largest axes are at least so long.
    """

    name: str = "adamw"
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    adafactor_decay_rate: float = 0.8
    adafactor_clip_threshold: float = 1.0
    adafactor_scale_parameter: bool = False
    adafactor_min_dim_size_to_factor: int = 128


def make_optimizer(config: Config, num_steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """Builds the optimiser and its schedule.

    Args:
      config: what to build.
      num_steps: updates of the whole run; the linear and cosine schedules reach 0 after the last.

    Returns:
      The optax transformation (clipping first), and the schedule: update number, from 0, -> float32 learning rate.

    Raises:
      ValueError: an unknown name, or a number outside its range.
    """
    _check(config, num_steps)
    schedule = make_schedule(config, num_steps)
    clip = [clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    decay = [optax.add_decayed_weights(config.weight_decay, mask=decay_mask)] if config.weight_decay else []
    rate = optax.scale_by_learning_rate(schedule)  # pyright: ignore[reportArgumentType]
    chain = optax.chain(*clip, OPTIMIZERS[config.name](config), *decay, rate)
    return chain, schedule


def make_schedule(config: Config, num_steps: int) -> Schedule:
    """The learning rate by update number, from 0: `learning_rate * warmup * decay`, as transformers' schedulers.

    During warm-up update i has the factor i / warmup, so the first is 0 (a run with warm-up starts with an update that
    changes nothing). After it, with r the share of the updates after warm-up that is still to do, linear has r, cosine
    (1 - cos(pi r)) / 2 = sin(pi r / 2)^2. Source: transformers `optimization.py`.

    Args:
      config: learning rate, kind and warm-up; "constant" has no warm-up.
      num_steps: updates of the whole run.
    """
    warmup = 0 if config.lr_scheduler_type == "constant" else warmup_length(config, num_steps)
    decay = SCHEDULES[config.lr_scheduler_type]
    rest = max(1, num_steps - warmup)

    def schedule(count: Array | int) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        left = jnp.clip((num_steps - count) / rest, 0.0, 1.0)
        factor = jnp.where(count < warmup, count / max(1, warmup), decay(left))
        return (config.learning_rate * factor).astype(jnp.float32)

    return schedule


def warmup_length(config: Config, num_steps: int) -> int:
    """Updates of warm-up: `warmup_steps`, or `warmup_ratio` of all updates rounded up where that is 0."""
    return config.warmup_steps or math.ceil(num_steps * config.warmup_ratio)


def decay_mask(params: optax.Params) -> optax.Params:
    """True for parameters that weight decay acts on: all but norms and biases, embeddings included.

    Decided by the leaf's name (`scale`, `bias`), not by its number of axes: layers are stacked, so a norm has two.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] not in UNDECAYED, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by `min(1, max_norm / (norm + 1e-6))`, as torch's `clip_grad_norm_`.

    The norm is over the whole tree, in float32. `optax.clip_by_global_norm` has no 1e-6.
    """

    def update(updates, state, params=None):
        del params
        squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(updates)]
        factor = jnp.minimum(1.0, max_norm / (jnp.sqrt(sum(squares)) + 1e-6))
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _adamw(config: Config) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.adam_beta1, b2=config.adam_beta2, eps=config.adam_epsilon)


def _adamw_tf(config: Config) -> optax.GradientTransformation:
    """Adam with TensorFlow's place of epsilon, before the correction of the bias: the first updates are smaller.

    `sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon)`: torch's with `epsilon / sqrt(1 - b2^t)`, which falls to
    epsilon as t grows. Source: Kingma and Ba, arXiv 1412.6980, the remark behind algorithm 1; detail 21 of "The N
    Implementation Details of RLHF with PPO".
    """
    b1, b2 = config.adam_beta1, config.adam_beta2
    adam = optax.scale_by_adam(b1=b1, b2=b2)  # its moments; its updates are not used

    def update(updates, state, params=None):
        _, state = adam.update(updates, state, params)
        assert isinstance(state, optax.ScaleByAdamState)
        factor = jnp.sqrt(1 - b2**state.count) / (1 - b1**state.count)
        scale = lambda m, v: (factor * m / (jnp.sqrt(v) + config.adam_epsilon)).astype(m.dtype)  # noqa: E731
        return jax.tree.map(scale, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def _adafactor(config: Config) -> optax.GradientTransformation:
    factored = optax.scale_by_factored_rms(
        decay_rate=config.adafactor_decay_rate,
        min_dim_size_to_factor=config.adafactor_min_dim_size_to_factor,
    )
    scale = [optax.scale_by_param_block_rms()] if config.adafactor_scale_parameter else []
    return optax.chain(factored, _clip_by_layer_rms(config.adafactor_clip_threshold), *scale)


def _clip_by_layer_rms(threshold: float) -> optax.GradientTransformation:
    """Adafactor's update clipping, layer by layer: the first axis of a leaf inside a segment counts layers."""

    def clip(path, update):
        stacked = any(name.startswith("segment_") for name in _names(path))
        axes = tuple(range(1 if stacked else 0, update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update.astype(jnp.float32)), axis=axes, keepdims=True))
        return (update / jnp.maximum(1.0, rms / threshold)).astype(update.dtype)

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _names(path: tuple) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _check(config: Config, num_steps: int) -> None:
    for key, table in (("name", OPTIMIZERS), ("lr_scheduler_type", SCHEDULES)):
        if getattr(config, key) not in table:
            raise ValueError(f"optimizer.{key}: {getattr(config, key)!r} is unknown; choose one of {', '.join(table)}")
    if config.lr_scheduler_type == "constant" and (config.warmup_steps or config.warmup_ratio):
        key = "warmup_steps" if config.warmup_steps else "warmup_ratio"
        raise ValueError(
            f"optimizer.{key}: lr_scheduler_type=constant has no warm-up; take constant_with_warmup, or leave it away"
        )
    others = "adafactor_" if config.name == "adamw" else "adam_"
    for field in fields(config):
        if field.name.startswith(others) and getattr(config, field.name) != field.default:
            raise ValueError(f"optimizer.{field.name}: {config.name} does not read it; leave it away")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not 0.0 <= config.warmup_ratio <= 1.0:
        raise ValueError(f"optimizer.warmup_ratio must lie in [0, 1], got {config.warmup_ratio}")
    for key in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
        if (getattr(config, key) or 0) < 0:
            raise ValueError(f"optimizer.{key} must not be negative, got {getattr(config, key)}")


SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda left: left,
    "cosine": lambda left: jnp.square(jnp.sin(0.5 * jnp.pi * left)),
    "constant": jnp.ones_like,
    "constant_with_warmup": jnp.ones_like,
}

OPTIMIZERS: dict[str, Callable[[Config], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adamw_tf": _adamw_tf,
    "adafactor": _adafactor,
}
