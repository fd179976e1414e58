"""Times jaxalign's SFT or preference step on the shared rows: packing, the reference's pass and the update."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign import packing
from jaxalign.methods import preference, sft
from jaxalign.methods.offline import Layout, pack_global
from jaxalign.methods.row_length import attention_weight, choose_length, prediction_weight
from jaxalign.models import Model
from jaxalign.models.attention import rows_mask
from jaxalign.models.config import forward_flops
from jaxalign.models.pretrained import load
from jaxalign.training import optimizer as optimizers
from jaxalign.types import Batch


def parse():
    """The shared command line and jaxalign's own choices."""
    parser = cases.arguments(__doc__ or "")
    parser.add_argument("--remat", default="none", help="as model.remat")
    parser.add_argument("--chunk", type=int, default=128, help="as method.logits_chunk")
    parser.add_argument("--length", type=int, default=0, help="tokens per row; 0: the cheapest for this data")
    parser.add_argument("--micro-batch-size", type=int, default=0, help="as train.micro_batch_size; 0: the whole batch")
    parser.add_argument("--unshared", action="store_true", help="give each completion its own copy of the prompt")
    return parser.parse_args()


def describe(args) -> tuple[ModuleType, Any]:
    """The method's module and its config."""
    if args.task == "sft":
        return sft, sft.Config(logits_chunk=args.chunk)
    return preference, preference.Config(beta=0.1, share_prompt=not args.unshared, logits_chunk=args.chunk)


def examples(task: str, batch: list[cases.Pair]) -> list[dict[str, Any]]:
    """The rows as jaxalign takes them; SFT is prompt + chosen with the loss on the completion."""
    if task == "dpo":
        return [{name: np.array(ids, np.int32) for name, ids in pair._asdict().items()} for pair in batch]
    return [
        {
            "input_ids": np.array(pair.prompt_ids + pair.chosen_ids, np.int32),
            "loss_mask": np.arange(len(pair.prompt_ids) + len(pair.chosen_ids)) >= len(pair.prompt_ids),
        }
        for pair in batch
    ]


def row_length(method, config, model: Model, rows: list[dict[str, Any]], batch_size: int, micro_batch_size: int) -> int:
    """The row length that a run on CPU would take for these examples."""
    share = getattr(config, "share_prompt", True)
    pieces = [packing.pieces_of(method.to_document(config, row), share) for row in rows]
    return choose_length(
        [pieces[start : start + batch_size] for start in range(0, len(pieces), batch_size)],
        micro_batch_size,
        attention_weight=attention_weight(model.config),
        prediction_weight=prediction_weight(model.config),
        multiple=32,
    )


def least_flops(task: str, model: Model, batch: Batch) -> float:
    """Operations that no implementation of a step on these packed tokens can leave out.

    The backward pass is twice the forward one, the reference's pass once. No recomputation, no optimiser.
    """
    tokens = int((np.asarray(batch.rows.documents) > 0).sum())
    asked = int((np.asarray(batch.predictions.completions) >= 0).sum())
    attended = int(jax.vmap(lambda rows: rows_mask(rows, None))(batch.rows).sum())
    return forward_flops(model.config, tokens, attended, asked) * (4.0 if task == "dpo" else 3.0)


def matmul_rate(dtype: str) -> float:
    """Operations a second of a square matrix product of 2048, the best of five."""
    x = jnp.ones((2048, 2048), dtype)
    multiply = jax.jit(jnp.dot)
    jax.block_until_ready(multiply(x, x))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


class Compiled:
    """A jitted function compiled once per shape of its last argument, with the time that took."""

    def __init__(self, function) -> None:
        self.function, self.programs, self.seconds = function, {}, 0.0

    def prepare(self, *arguments) -> None:
        shapes = self.key(arguments[-1])
        if shapes not in self.programs:
            start = time.perf_counter()
            self.programs[shapes] = self.function.lower(*arguments).compile()
            self.seconds += time.perf_counter() - start

    def __call__(self, *arguments):
        return self.programs[self.key(arguments[-1])](*arguments)

    def key(self, batch) -> tuple:
        return tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))


def main() -> None:
    """Runs the warm-up and the measured steps and prints one JSON line."""
    args = parse()
    cases.use_cores(args.threads)
    batches = cases.read_batches(args.data, args.batch_size, args.warmup + args.steps)
    method, config = describe(args)
    model, variables = load(args.model, compute_dtype=args.dtype, remat=args.remat)
    settings = optimizers.Config(learning_rate=args.learning_rate, lr_scheduler_type="linear")
    optimizer, schedule = optimizers.make_optimizer(settings, len(batches))
    state, frozen = method.init(config, model, variables, optimizer, jax.random.key(0))
    rows = [examples(args.task, batch) for batch in batches]
    every = [row for batch in rows for row in batch]
    micro = args.micro_batch_size or args.batch_size
    length = args.length or row_length(method, config, model, every, args.batch_size, micro)
    layout = Layout(args.batch_size, micro, length)
    step = Compiled(jax.jit(method.make_step(config, model, optimizer, schedule), donate_argnums=0))
    reference = Compiled(jax.jit(preference.make_reference(config, model))) if args.task == "dpo" else None

    if reference is None:
        del variables

    packed = [pack_global(method, config, batch, layout).batch for batch in rows]
    for batch in packed:
        if reference:
            reference.prepare(variables, batch)
        filled = jax.eval_shape(reference.function, variables, batch) if reference else batch
        step.prepare(state, frozen, filled)

    seconds, losses = [], []
    for batch in rows:
        start = time.perf_counter()
        ready = pack_global(method, config, batch, layout).batch
        if reference:
            ready = reference(variables, ready)
        state, metrics = step(state, frozen, ready)
        jax.block_until_ready(state)
        losses.append(metrics["loss"].value())
        seconds.append(time.perf_counter() - start)

    peak = cases.peak_memory_mib()
    rate = matmul_rate(args.dtype)
    flops = [least_flops(args.task, model, batch) for batch in packed]
    cases.report(
        args,
        batches,
        trainer="jaxalign",
        versions={"jaxalign": jaxalign.__version__, "jax": jax.__version__},
        settings={
            "remat": args.remat,
            "chunk": args.chunk,
            "length": length,
            "micro_batch_size": micro,
            "share_prompt": not args.unshared,
        },
        seconds=seconds,
        losses=losses,
        row_tokens=[int(batch.rows.tokens.size) for batch in packed],
        extra={
            "compile_seconds": step.seconds + (reference.seconds if reference else 0.0),
            "peak_memory_mib": peak,
            "row_efficiency": [packing.efficiency(batch) for batch in packed],
            "row_shapes": sorted({str(batch.rows.tokens.shape) for batch in packed}),
            "matmul_gflops": rate / 1e9,
            "floor_seconds": float(np.median([each / rate for each in flops[args.warmup :]])),
        },
    )


if __name__ == "__main__":
    main()
