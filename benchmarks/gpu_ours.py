"""Times jaxalign's SFT or DPO step, or decoding, on one device, for a model shape with random weights; see gpu.py."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from types import ModuleType
from typing import Any

import gpu_cases
import jax
import numpy as np
from rollouts import read_bandwidth

import jaxalign
from jaxalign import sampling
from jaxalign.methods import preference, sft
from jaxalign.methods.rollout import make_draw
from jaxalign.models import Model, build
from jaxalign.models.families import from_hf
from jaxalign.run.hardware import peak_bandwidth, peak_flops
from jaxalign.sharding import Mesh, MeshConfig, make_mesh
from jaxalign.training import optimizer as optimizers
from jaxalign.types import Variables

ROUNDS, WARMUP = 3, 2


def main() -> None:
    """Prints one JSON line."""
    args = gpu_cases.arguments(__doc__ or "").parse_args()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    work = gpu_cases.chosen(args.shape, args.work)
    print(json.dumps(describe(mesh) | MEASURES[args.task](args, work, mesh)))


def train(args: argparse.Namespace, work: gpu_cases.Work, mesh: Mesh) -> dict[str, Any]:
    """Steps on packed batches that wait on the device, one dispatched after the other as a run does; seconds of each.

    A run packs while the device computes. DPO's live reference is part of the step.
    """
    total = WARMUP + ROUNDS * args.steps
    model, variables = start(args.shape, work, work.params)
    method, config, batches = examples(args, work)
    optimizer, schedule = optimizers.make_optimizer(
        optimizers.Config(name=work.optimizer, learning_rate=1e-5), num_steps=total
    )
    state, frozen = method.init(config, model, variables, optimizer, jax.random.key(0))
    reference = jax.jit(preference.make_reference(preference.Config(), model)) if args.task == "dpo" else None
    if reference is None:
        del variables
        variables = {}
    step = jax.jit(method.make_step(config, model, optimizer, schedule), donate_argnums=0)
    batches = [jax.device_put(batch) for batch in batches]

    def run(number: int, state):
        batch = batches[number % len(batches)]
        return step(state, frozen, reference(variables, batch) if reference else batch)

    started = time.perf_counter()
    for number in range(WARMUP):
        state, metrics = run(number, state)
    jax.block_until_ready(state)
    warm, seconds = time.perf_counter() - started, []
    for first in range(WARMUP, total, args.steps):
        started = time.perf_counter()
        for number in range(first, first + args.steps):
            state, metrics = run(number, state)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - started) / args.steps)
    loss = metrics["loss"].value()
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss}: these seconds mean nothing")
    return {"seconds": seconds, "compile_seconds": warm - WARMUP * statistics.median(seconds), "loss": loss} | memory()


def examples(args: argparse.Namespace, work: gpu_cases.Work) -> tuple[ModuleType, Any, list[Any]]:
    """The method, its config, and two packed batches that take turns."""
    if args.task == "sft":
        rows = [
            [{"input_ids": np.array(ids, np.int32), "loss_mask": np.ones(len(ids), bool)} for ids in step]
            for step in gpu_cases.sft_rows(args.shape, work, 2)
        ]
        method, config = sft, sft.Config()
    else:
        rows = [
            [{name: np.array(ids, np.int32) for name, ids in pair.items()} for pair in step]
            for step in gpu_cases.dpo_pairs(args.shape, work, 2)
        ]
        method, config = preference, preference.Config(beta=0.1)
    return method, config, [method.make_batch(config, step) for step in rows]


def decode(args: argparse.Namespace, work: gpu_cases.Work, mesh: Mesh) -> dict[str, Any]:
    """Whole calls of the sampler as a rollout makes them: seconds for all tokens, and for the first alone."""
    model, variables = start(args.shape, work, "bfloat16")
    prompts = [np.array(ids, np.int32) for ids in gpu_cases.prompts(args.shape, work)]
    width, calls = sampling.bucket_width(work.prompt), max(1, args.steps // 3)
    found: dict[str, list[float]] = {}
    compiled = 0.0
    for name, new in (("seconds", work.new), ("first_token_seconds", 1)):
        draw = make_draw(model, sampling.Config(max_new_tokens=new, slots=work.slots), mesh, width=width)
        found[name] = []
        for seed in range(1 + calls):
            started = time.perf_counter()
            samples = draw(variables, prompts, jax.random.key(seed))
            found[name].append(time.perf_counter() - started)
            if int(np.sum(samples.lengths)) != work.slots * new:
                raise ValueError(f"{int(np.sum(samples.lengths))} tokens were drawn, not {work.slots * new}")
        compiled += found[name].pop(0)
    return found | {"compile_seconds": compiled} | memory()


def start(shape: str, work: gpu_cases.Work, dtype: Any) -> tuple[Model, Variables]:
    """The model and random weights, made where they stay."""
    config = from_hf(gpu_cases.SHAPES[shape])
    remat: Any = work.remat
    model = build(config, param_dtype=dtype, compute_dtype="bfloat16", remat=remat)
    return model, jax.jit(model.init)(jax.random.key(0))


def memory() -> dict[str, Any]:
    """The most bytes that the device's allocator gave out; absent where it does not say, as on CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def describe(mesh: Mesh) -> dict[str, Any]:
    """The device, and what it could do at best; a CPU's rates are measured."""
    device = mesh.devices.flat[0]
    bandwidth = read_bandwidth(2**28, 2) if device.platform == "cpu" else peak_bandwidth(mesh)
    return {
        "device": device.device_kind,
        "peak_flops": peak_flops(mesh, "bfloat16"),
        "peak_bandwidth": bandwidth,
        "versions": {"jaxalign": jaxalign.__version__, "jax": jax.__version__},
    }


MEASURES = {"sft": train, "dpo": train, "decode": decode}


if __name__ == "__main__":
    main()
