"""What every trainer in a comparison shares: the ragged rows, the 5M model, the way to count tokens and memory.

Needs only numpy and safetensors, so that it runs unchanged in each trainer's own environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

LLAMA5M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.05,
    "dtype": "float32",
}
PROMPT_LENGTHS = (60, 140)
COMPLETION_LENGTHS = (20, 120)
SPECIAL_IDS = 3


class Pair(NamedTuple):
    """Token ids of one preference pair; both completions end with the EOS id."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def write_llama5m(folder: Path, seed: int = 0) -> None:
    """Writes a Hugging Face folder with a Llama of 5.0M parameters, normal with deviation 0.05, norms at 1."""
    config = LLAMA5M
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (heads * head_dim, width),
            prefix + "self_attn.k_proj.weight": (kv_heads * head_dim, width),
            prefix + "self_attn.v_proj.weight": (kv_heads * head_dim, width),
            prefix + "self_attn.o_proj.weight": (width, heads * head_dim),
            prefix + "mlp.gate_proj.weight": (inner, width),
            prefix + "mlp.up_proj.weight": (inner, width),
            prefix + "mlp.down_proj.weight": (width, inner),
        }
    draw = np.random.default_rng(seed)
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else draw.normal(0.0, config["initializer_range"], shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def ragged_pairs(
    count: int, vocab_size: int, eos_id: int, seed: int = 0, prompt_lengths: tuple[int, int] = PROMPT_LENGTHS
) -> list[Pair]:
    """Random pairs; lengths are uniform and independent, those of completions 20 to 120 (EOS included)."""
    draw = np.random.default_rng(seed)

    def ids(lengths: tuple[int, int]) -> list[int]:
        length = int(draw.integers(lengths[0], lengths[1] + 1))
        tokens = draw.integers(SPECIAL_IDS, vocab_size, length)
        return np.where(tokens == eos_id, SPECIAL_IDS + (eos_id == SPECIAL_IDS), tokens).tolist()

    return [
        Pair(ids(prompt_lengths), [*ids(COMPLETION_LENGTHS)[:-1], eos_id], [*ids(COMPLETION_LENGTHS)[:-1], eos_id])
        for _ in range(count)
    ]


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    """Writes the pairs as JSONL of `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs))


def read_batches(path: Path, batch_size: int, steps: int) -> list[list[Pair]]:
    """The first `steps` batches of the file, in order.

    Raises:
      ValueError: The file is too short.
    """
    pairs = [Pair(**json.loads(line)) for line in path.read_text().splitlines()]
    if len(pairs) < batch_size * steps:
        raise ValueError(f"{path} holds {len(pairs)} pairs; {steps} batches of {batch_size} were asked for.")
    return [pairs[start : start + batch_size] for start in range(0, batch_size * steps, batch_size)]


def real_tokens(task: str, batch: list[Pair]) -> int:
    """Tokens a batch holds without padding; for DPO the prompt counts with each completion, as TRL counts."""
    if task == "sft":
        return sum(len(pair.prompt_ids) + len(pair.chosen_ids) for pair in batch)
    return sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch)


def compile_seconds(seconds: list[float], warmup: int) -> float:
    """What the warm-up steps took beyond a steady step: tracing and compiling."""
    steady = float(np.median(seconds[warmup:]))
    return sum(max(0.0, step - steady) for step in seconds[:warmup])


def peak_memory_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def use_cores(count: int) -> None:
    """Keeps this process and its thread pools to the first `count` cores it may use (Linux; else no effect)."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def arguments(description: str, tasks: tuple[str, ...] = ("sft", "dpo")) -> argparse.ArgumentParser:
    """The command line that every trainer's script shares."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", choices=tasks, required=True)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of prompt_ids, chosen_ids, rejected_ids")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per step: rows for sft, pairs for dpo")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    return parser


def report(
    args: argparse.Namespace,
    batches: list[list[Pair]],
    *,
    trainer: str,
    versions: dict[str, str],
    settings: dict[str, object],
    seconds: list[float],
    losses: list[float],
    row_tokens: list[int],
    extra: dict[str, object] | None = None,
) -> None:
    """Prints one JSON line: settings, wall seconds of each step, loss of each step, tokens, peak memory.

    `seconds`, `losses`, `row_tokens` (padding included) have one entry per step, warm-up included.
    """
    record = {
        "trainer": trainer,
        "versions": versions,
        "task": args.task,
        "model": args.model.name,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "warmup": args.warmup,
        "settings": settings,
        "seconds": seconds,
        "losses": losses,
        "real_tokens": [real_tokens(args.task, batch) for batch in batches],
        "row_tokens": row_tokens,
        "peak_memory_mib": peak_memory_mib(),
    }
    print(json.dumps(record | (extra or {})))


def main() -> None:
    """Writes the rows for a model folder, and the folder itself when it is the 5M model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True, help="pairs")
    parser.add_argument("--prompt-lengths", type=int, nargs=2, default=PROMPT_LENGTHS, metavar=("LEAST", "MOST"))
    args = parser.parse_args()
    if args.model.name == "llama5m":
        write_llama5m(args.model)
    config = json.loads((args.model / "config.json").read_text())
    least, most = args.prompt_lengths
    pairs = ragged_pairs(args.count, config["vocab_size"], config["eos_token_id"], prompt_lengths=(least, most))
    write_pairs(args.data, pairs)


if __name__ == "__main__":
    main()
