"""Where the time of jaxalign's DPO step on the 5M Llama goes: its parts, each compiled by itself, against their floors.

    python benchmarks/step_parts.py [--micro-batch-size 2] [--chunk 128] [--rounds 10]

One batch of `run.py`'s rows. Every part is run in turn, round after round in one process, and the least time of each is
kept, so that the shares hold on a machine that does other things too; absolute seconds do not. A part's floor is its
matrix products (counted as `models.config.forward_flops` does) at the rate of a 2048-square product in this process.
Parts by themselves do not overlap, and XLA fuses across them in the whole step, so that they need not add up to it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ours import examples, matmul_rate, row_length

from jaxalign.losses import token_statistics
from jaxalign.methods import preference
from jaxalign.methods.offline import Layout, pack_global
from jaxalign.models.attention import rows_mask
from jaxalign.models.config import forward_flops
from jaxalign.models.pretrained import load
from jaxalign.training import optimizer as optimizers
from jaxalign.training.coupled import CoupledLoss
from jaxalign.types import Batch

PAIRS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases.write_llama5m(Path(folder) / "llama5m")
        model, variables = load(Path(folder) / "llama5m")
    pairs = cases.ragged_pairs(PAIRS * 7, model.config.vocab_size, 2)
    config = preference.Config(beta=0.1, logits_chunk=args.chunk)
    length = row_length(preference, config, model, examples("dpo", pairs), PAIRS, args.micro_batch_size)
    layout = Layout(PAIRS, args.micro_batch_size, length)
    rows = examples("dpo", pairs[-PAIRS:])
    batch = pack_global(preference, config, rows, layout).batch
    runs = {"packing": lambda: pack_global(preference, config, rows, layout)} | programs(
        model, variables, config, batch
    )
    least = measure(runs, args.rounds)
    rate = matmul_rate("float32")
    floors, counted = floors_of(model, batch)
    print(f"rows {batch.rows.tokens.shape}, predictions {batch.predictions.sources.shape}; {counted}")
    print(f"{rate / 1e9:.0f} GFLOP/s\n")
    print("| part | ms | of the step | GFLOP | floor ms | floor / time |\n|---|---|---|---|---|---|")
    for name, seconds in least.items():
        flops = floors.get(name, 0.0)
        share = f"{flops / rate / seconds:.0%}" if flops else ""
        print(
            f"| {name} | {seconds * 1e3:.1f} | {seconds / least['whole step']:.0%} | {flops / 1e9:.1f} | "
            f"{flops / rate * 1e3:.1f} | {share} |"
        )


def programs(model, variables, config, batch: Batch) -> dict[str, Callable[[], object]]:
    """Each part as a call on arrays that are there already."""
    optimizer, schedule = optimizers.make_optimizer(optimizers.Config(learning_rate=1e-5), 10)
    reference = jax.jit(preference.make_reference(config, model))
    ready = jax.block_until_ready(reference(variables, batch))
    state, frozen = preference.init(config, model, variables, optimizer, jax.random.key(0))
    step = jax.jit(preference.make_step(config, model, optimizer, schedule))
    loss, totals = preference.make_loss(config, model), preference.totals(batch)
    assert not isinstance(loss, CoupledLoss)

    def blocks(params, rows):
        return model.apply({"params": params}, rows)[0]

    def head(params, hidden, micro: Batch):
        logits = partial(model.logits, {"params": params})
        return token_statistics(logits, hidden, micro.predictions, chunk=config.logits_chunk)

    def micro_batches(function):
        """A function of micro-batches, in turn; what it gives is summed up, so that one result is held."""

        def total(params, parts):
            shapes = jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def one(total, part):
                return jax.tree.map(jnp.add, total, function(params, part)), None

            return jax.lax.scan(one, zeros, parts)[0]

        return jax.jit(total)

    def gradient_of_blocks(params, part):
        return jax.grad(lambda p: (blocks(p, part[0].rows) * part[1]).sum())(params)

    def gradient_of_head(params, part):
        # Its statistics are metrics of the step too.
        def total(params, hidden):
            found = head(params, hidden, part[0])
            return found.logps.sum(), (found.entropy.sum(), found.hits.sum(), found.mean_logits.sum())

        return jax.grad(total, (0, 1), has_aux=True)(params, part[1])

    def gradient(params, micro):
        return jax.grad(lambda p: loss(p, frozen, micro, totals, None)[0])(params)

    params = state.params["params"]
    hidden = jax.jit(lambda parts: jax.lax.map(lambda part: blocks(params, part.rows), parts))(ready)
    grads = jax.tree.map(jnp.ones_like, state.params)

    def update(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state, optax.tree.norm(grads)

    both = (replace(ready, fields={}), hidden)
    calls = {
        "whole step": (step, state, frozen, ready),
        "reference": (reference, variables, batch),
        "loss and gradient": (micro_batches(gradient), state.params, ready),
        "blocks forward": (micro_batches(lambda p, part: blocks(p, part.rows)), params, ready),
        "blocks forward and backward": (micro_batches(gradient_of_blocks), params, both),
        "head forward": (micro_batches(lambda p, part: head(p, part[1], part[0])), params, both),
        "head forward and backward": (micro_batches(gradient_of_head), params, both),
        "optimiser": (jax.jit(update), state, grads),
        "adding up gradients": (micro_batches(lambda p, part: p), state.params, ready),
        "dispatch": (jax.jit(lambda state, batch: state.step + batch.present.shape[0]), state, ready),
    }
    return {name: partial(run, *call) for name, call in calls.items()}


def run(function: Callable, *arguments) -> None:
    """Calls, and waits for the result."""
    jax.block_until_ready(function(*arguments))


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each, in turn; the first round, which compiles, is not counted."""
    least = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for name, call in runs.items():
            started = time.perf_counter()
            call()
            if number:
                least[name] = min(least[name], time.perf_counter() - started)
    return least


def floors_of(model, batch: Batch) -> tuple[dict[str, float], str]:
    """FLOPs of each part that has matrix products, and a word on what was counted."""
    tokens = int((np.asarray(batch.rows.documents) > 0).sum())
    asked = int((np.asarray(batch.predictions.completions) >= 0).sum())
    attended = int(jax.vmap(lambda rows: rows_mask(rows, None))(batch.rows).sum())
    blocks = forward_flops(model.config, tokens, attended, 0)
    head = forward_flops(model.config, 0, 0, asked)
    floors: dict[str, float] = {
        "whole step": 3 * (blocks + head),
        "reference": blocks + head,
        "loss and gradient": 3 * (blocks + head),
        "blocks forward": blocks,
        "blocks forward and backward": 3 * blocks,
        "head forward": head,
        "head forward and backward": 3 * head,
    }
    return floors, f"{tokens} tokens, {asked} predictions, {attended} attended pairs"


if __name__ == "__main__":
    main()
