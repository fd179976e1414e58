"""Where the time of a decode step goes: what XLA's profiler says of each operation of the sampler's loop.

    python benchmarks/decode_parts.py [MODEL] [--slots 16] [--new-tokens 64]

MODEL is a Hugging Face folder or a GGUF file; the 5M Llama of `run.py` without. Prompts are as long as `run.py`'s.
Times are of one call, operations by themselves; those of one step are means over the call's steps. The profiler slows
the loop a little, and on a machine that does other things too only the shares mean something.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import cases
import jax
import numpy as np

from jaxalign import sampling
from jaxalign.methods.rollout import padded_width
from jaxalign.models.pretrained import load

# An instruction of the compiled program: its name, what follows, and the operation that it comes from.
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%(\S+) = (.*?)(?:metadata=\{.*?op_name="([^"]*)".*)?$', re.MULTILINE)
PARTS = (
    "feed-forward products",
    "attention's projections",
    "head's product",
    "attention to the cache",
    "random numbers",
    "everything else",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            cases.write_llama5m(Path(folder) / "llama5m")
        model, variables = load(args.model or Path(folder) / "llama5m")
    draw = np.random.default_rng(0)
    lengths = draw.integers(cases.PROMPT_LENGTHS[0], cases.PROMPT_LENGTHS[1] + 1, args.slots).astype(np.int32)
    width = padded_width(int(lengths.max()))
    prompts = draw.integers(cases.SPECIAL_IDS, model.config.vocab_size, (args.slots, width)).astype(np.int32)
    generate = sampling.make_generate(model, sampling.Config(max_new_tokens=args.new_tokens))
    given = (sampling.make_decoding(model)(variables), prompts, lengths)
    program = jax.jit(generate).lower(*given, jax.random.key(0)).compile()
    text = program.as_text()
    assert text is not None
    jax.block_until_ready(program(*given, jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            samples = jax.block_until_ready(program(*given, jax.random.key(1)))
        seconds, calls = times(Path(folder))
    steps = int(cast("dict[str, Any]", samples.counters)["decode_steps"])
    total = Counter[str]()
    parts = parts_of(text, model.config.vocab_size, part_of)
    for name, took in seconds.items():
        if name in parts and calls[name] >= steps:
            total[parts[name]] += took
    operations = sum(calls[name] for name in parts if calls[name] >= steps) / steps
    took = sum(total.values()) / steps * 1e3
    print(f"{steps} steps of {args.slots} slots: {took:.2f} ms each in {operations:.0f} operations\n")
    print("| part | ms a step | share |\n|---|---|---|")
    for part in PARTS:
        print(f"| {part} | {total[part] / steps * 1e3:.2f} | {total[part] / sum(total.values()):.0%} |")


def times(folder: Path) -> tuple[Counter[str], Counter[str]]:
    """Seconds and calls of each operation in a profile."""
    (file,) = folder.rglob("*.xplane.pb")
    seconds, calls = Counter[str](), Counter[str]()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                seconds[event.name] += event.duration_ns / 1e9
                calls[event.name] += 1
    return seconds, calls


def parts_of(text: str, vocab_size: int, part_of: Callable[[str, bool, bool], str]) -> dict[str, str]:
    """What `part_of` makes of each instruction of a compiled program, those inside fusions left out.

    It is told the operation that the instruction comes from, whether it is a product, and whether its result is as wide
    as the vocabulary.
    """
    bodies = dict(re.findall(r"^%(\S+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    fused = set(re.findall(r"calls=%([\w.\-]+)", text))
    parts = {}
    for computation, body in bodies.items():
        if computation in fused:
            continue
        for name, rest, operation in INSTRUCTION.findall(body):
            if re.search(r" (while|conditional|call)\(", rest):
                continue  # what is inside is counted by itself
            called = re.search(r"calls=%([\w.\-]+)", rest)
            inside = rest if called is None else bodies.get(called[1], "")
            parts[name] = part_of(operation, " dot(" in inside, f",{vocab_size}]" in rest.split(" ")[0])
    return parts


def part_of(operation: str, product: bool, over_vocabulary: bool) -> str:
    """One of `PARTS`."""
    if product and over_vocabulary:
        return "head's product"
    if product and "/mlp/" in operation:
        return "feed-forward products"
    if product and re.search(r"/(query|key|value|output)/", operation):
        return "attention's projections"
    if "/attention/" in operation:
        return "attention to the cache"
    if "random" in operation or "gumbel" in operation or "fold_in" in operation:
        return "random numbers"
    return "everything else"


if __name__ == "__main__":
    main()
