"""Where the time of a PPO update goes: what XLA's profiler says of each operation of policy's and critic's passes.

    taskset -c 0 python benchmarks/update_parts.py [MODEL] [--remat dots_attention] [--micro-batch-size 4]
        [--length 224]

MODEL is a Hugging Face folder or a GGUF file; the 5M Llama of `run.py` without. 16 prompts as long as `run.py`'s, each
with 64 tokens drawn for it. On one core, as above, operations do not overlap and their times add up. The seconds
of an update are the least of three without the profiler.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cases
import jax
import numpy as np
from decode_parts import parts_of, times

from jaxalign.methods import ppo
from jaxalign.models import Model
from jaxalign.models.pretrained import load
from jaxalign.training import optimizer as optimizers
from jaxalign.types import Batch

PROMPTS, NEW_TOKENS = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--remat", default="dots_attention", help="as model.remat")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="as train.micro_batch_size")
    parser.add_argument("--length", type=int, default=224, help="as train.row_length")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            cases.write_llama5m(Path(folder) / "llama5m")
        model, variables = load(args.model or Path(folder) / "llama5m", remat=args.remat)
    config = ppo.Config(max_completion_length=NEW_TOKENS)
    models, by_role = ppo.add_critic(config, model, variables, jax.random.key(0))
    optimizer, schedule = optimizers.make_optimizer(optimizers.Config(learning_rate=1e-6), 10)
    state, frozen = ppo.init(config, models, by_role, optimizer, jax.random.key(0))
    batch = random_batch(config, model, args.micro_batch_size, args.length)
    step = jax.jit(ppo.make_step(config, models, optimizer, schedule), donate_argnums=0)
    program = step.lower(state, frozen, batch).compile()
    text = program.as_text()
    assert text is not None
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, frozen, batch))
        seconds.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(state, frozen, batch))
        spent, _ = times(Path(folder))
    parts, total = parts_of(text, model.config.vocab_size, part_of), Counter[str]()
    for name, took in spent.items():
        if name in parts:
            total[parts[name]] += took
    micro, rows, length = batch.rows.tokens.shape
    print(
        f"{micro} micro-batches of {rows} rows of {length} tokens, remat {args.remat}: {min(seconds):.2f} s an update\n"
    )
    print("| part | s an update | share |\n|---|---|---|")
    for part, took in total.most_common():
        print(f"| {part} | {took:.2f} | {took / total.total():.0%} |")


def random_batch(config: ppo.Config, model: Model, micro_batch_size: int, length: int) -> Batch:
    """An update's batch of random tokens and estimates."""
    draw = np.random.default_rng(0)

    def tokens(size: int) -> np.ndarray:
        return draw.integers(cases.SPECIAL_IDS, model.config.vocab_size, size).astype(np.int32)

    def group() -> dict[str, Any]:
        prompt = tokens(int(draw.integers(cases.PROMPT_LENGTHS[0], cases.PROMPT_LENGTHS[1] + 1)))
        known = {name: [draw.normal(size=NEW_TOKENS)] for name in ("advantages", "returns", "values")}
        old = np.full(NEW_TOKENS, -np.log(model.config.vocab_size))
        return {"prompt_ids": prompt, "completion_ids": [tokens(NEW_TOKENS)], "old_logps": [old], **known}

    groups = [group() for _ in range(PROMPTS)]
    return ppo.make_batch(config, groups, micro_batch_size=micro_batch_size, length=length)


def part_of(operation: str, product: bool, over_vocabulary: bool) -> str:
    """What an instruction is for, by the operation that it comes from."""
    kind = "products" if product else "the rest"
    if "/mlp/" in operation:
        return f"feed-forward: {kind}"
    if re.search(r"/(query|key|value|output)/", operation):
        return f"attention's projections: {kind}"
    if "/attention/" in operation:
        return f"attention: {kind}"
    if "norm" in operation:
        return "norms"
    if over_vocabulary or "nd,vd" in operation:
        return f"head: {kind}"
    return "the scan over layers, sums of gradients, optimiser"


if __name__ == "__main__":
    main()
