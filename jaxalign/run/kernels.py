"""Which implementation of attention a stage takes, decided before its rows are packed; and what the host can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxalign.config import Stage
from jaxalign.data import Examples
from jaxalign.methods import METHODS
from jaxalign.methods.common import is_online, needs_reference
from jaxalign.methods.row_length import ATTENTION_SLOWNESS, attention_weight
from jaxalign.models import ModelConfig, context
from jaxalign.models.attention import BLOCKWISE_FROM, MISFITS
from jaxalign.models.cudnn import HEAD_DIM
from jaxalign.models.remat import OFFLOADING

KERNELS = {"tpu": "splash", "gpu": "cudnn"}
MACHINES = {"splash": "TPUs", "cudnn": "NVIDIA GPUs"}
# The mask that cuDNN reads as a bias has 128 MiB per row then, for each kind of window; so has its gradient.
LONGEST_BIAS = 8192


def choose_attention(
    stage: Stage, examples: Sequence[Examples], config: ModelConfig, mesh: Mesh, dtype: str
) -> tuple[Stage, str]:
    """The stage with `model.attention` decided, and what to say of it.

    `auto` is the kernel of the machine where that can serve, else `xla`. Splash needs rows in which no two completions
    share a prompt: where prompts are shared, the operations of both ways are counted, see `costs`, and where
    it is cheaper `method.share_prompt` becomes false.

    Args:
      stage: the config.
      examples: what will be packed, the training data first.
      config: of the model.
      mesh: the devices.
      dtype: of computation.

    Raises:
      ValueError: an implementation was asked for that cannot serve.
    """
    asked, device = stage.model.attention, mesh.devices.flat[0]
    if asked == "xla":
        return stage, "xla, as asked for"
    kind = KERNELS.get(device.platform) if asked == "auto" else asked
    if kind is None:
        return _decided(stage, "xla"), f"xla, which is what there is for {device.platform}"
    problem = context.misfit(kind, mesh) or _misfit(kind, stage, examples, config, device, dtype)
    shared = kind == "splash" and getattr(stage.method, "share_prompt", False)
    if asked != "auto":
        if shared and problem is None:
            problem = "rows of several completions of one prompt are nothing that it can tell apart; set "
            problem += "method.share_prompt to false"
        if problem:
            raise ValueError(f"model.attention={asked}: {problem}")
        return stage, f"{kind}, as asked for"
    if problem:
        return _decided(stage, "xla"), f"xla, not {kind}: {problem}"
    if not shared:
        return _decided(stage, kind), f"{kind}, the kernel for {MACHINES[kind]}"
    before, after = costs(stage, examples[0], config)
    if after >= before:
        return _decided(stage, "xla"), f"xla, sharing prompts: splash without would be {after / before:.2f} of the work"
    stage = replace(stage, method=replace(stage.method, share_prompt=False))
    return _decided(stage, kind), f"splash, without sharing prompts, at {after / before:.2f} of the work"


def costs(stage: Stage, examples: Examples, config: ModelConfig) -> tuple[float, float]:
    """Work per prompt, in forward passes of a token through the blocks: shared prompts by XLA, unshared by splash.

    With n tokens in rows of L it is `n (1 + w L)`, w from `attention_weight`. XLA's attention is
    `ATTENTION_SLOWNESS` times as slow as its operations say, and takes half of a row's scores from `BLOCKWISE_FROM`
    on; the kernel always does, at the speed of the matrix products.
    """
    prompt, branches = _lengths(stage, examples)
    weight = attention_weight(config)
    shared, apart = np.add(prompt, sum(branches)), np.sum([prompt + each for each in branches], axis=0)
    row, short = shared.max(), max((prompt + each).max() for each in branches)
    by_xla = weight * row * (0.5 if row >= BLOCKWISE_FROM else 1)
    by_kernel = weight / ATTENTION_SLOWNESS * short * 0.5
    return float(shared.mean() * (1 + by_xla)), float(apart.mean() * (1 + by_kernel))


def check_offloading(stage: Stage, mesh: Mesh) -> None:
    """Raises ValueError, naming the key, where something cannot be kept in the host's memory, or is there already."""
    given = {
        "model.offload_reference": stage.model.offload_reference,
        "model.remat": stage.model.remat in OFFLOADING,
    }
    asked = [key for key, wanted in given.items() if wanted]
    if asked and mesh.devices.flat[0].platform == "cpu":
        raise ValueError(f"{asked[0]}: a CPU's memory is the host's, nothing can be moved there; leave it away")
    if not stage.model.offload_reference:
        return
    method = METHODS[stage.method_name]
    if is_online(method) or not needs_reference(method, stage.method):
        raise ValueError(f"model.offload_reference: {stage.method_name} keeps no reference apart; leave it away")
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(stage.method, name, False):
            raise ValueError(f"model.offload_reference does not go with method.{name}; leave one of them away")


def _lengths(stage: Stage, examples: Examples) -> tuple[Any, list[Any]]:
    """Tokens of the prompts, and of each one's completions; of those that are yet to be drawn the most."""
    prompt = np.asarray(examples.lengths["prompt"])
    if is_online(METHODS[stage.method_name]):
        most = np.full_like(prompt, stage.method.max_completion_length)
        return prompt, [most] * stage.method.num_generations
    rest = {name: np.asarray(each) for name, each in examples.lengths.items() if name not in ("prompt", "total")}
    return prompt, list(rest.values())


def _decided(stage: Stage, kind: Any) -> Stage:
    return replace(stage, model=replace(stage.model, attention=kind))


def _misfit(
    kind: str, stage: Stage, examples: Sequence[Examples], config: ModelConfig, device: Any, dtype: str
) -> str | None:
    if KERNELS.get(device.platform) != kind:
        return f"it runs on {MACHINES[kind]}, and this is {device.platform}; set it to auto"
    if problem := MISFITS[kind](config, dtype):
        return problem
    if kind != "cudnn":
        return None
    if config.head_dim > HEAD_DIM and float(device.compute_capability) < 9:
        return f"head_dim={config.head_dim} is more than {HEAD_DIM}, which needs a Hopper GPU or later"
    length = stage.train.row_length
    if isinstance(length, str):
        longest = max(int(each.lengths["total"].max()) for each in examples)
        length = stage.data.max_length if stage.data.streaming else longest
    if length > LONGEST_BIAS:
        return f"rows of {length} tokens are too long for a mask over all of them; set train.row_length"
    return None
