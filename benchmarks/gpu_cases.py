"""What gpu.py measures: model shapes as config.json contents, and how many tokens a step or a call has.

Needs only the standard library, so that it runs unchanged in each library's own environment.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import NamedTuple

QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}
SHAPES = {
    "tiny": QWEN
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    # Qwen2.5-0.5B
    "0.5b": QWEN
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    # Qwen2.5-1.5B
    "1.5b": QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    # Llama-3.1-8B
    "8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "pad_token_id": 128004,
    },
}
TASKS = ("sft", "dpo", "decode")


class Work(NamedTuple):
    """How much a step trains on or a call draws, and what the parameters are kept in.

    Attributes:
      length: tokens of a document: an SFT row, or a prompt with both completions of a pair (DPO).
      documents: of a step.
      params: dtype of the weights; what is computed is bfloat16 everywhere.
      optimizer: in the libraries' own dtype: `adamw`, or `adafactor`, whose state is small.
      remat: as `model.remat`; TRL checkpoints gradients where it is not `none`.
      prompt: tokens of a prompt (DPO, decode).
      slots: completions drawn at the same time.
      new: tokens drawn for each.
    """

    length: int = 1024
    documents: int = 32
    params: str = "float32"
    optimizer: str = "adamw"
    remat: str = "dots"
    prompt: int = 512
    slots: int = 64
    new: int = 256


# 8B: float32 weights, gradients and two moments are 128 GB, more than a card with 139 GiB leaves beside activations.
# bfloat16 weights and Adafactor take 34 GB, gradients included; DPO's reference 16 GB more.
WORK = {
    "tiny": Work(length=96, documents=4, prompt=32, slots=4, new=16, remat="none"),
    "0.5b": Work(),
    "1.5b": Work(documents=16),
    "8b": Work(documents=16, params="bfloat16", optimizer="adafactor"),
}


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line that each library's script shares."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--work", default="{}", help="JSON: fields of Work that are other than usual")
    parser.add_argument("--steps", type=int, default=10, help="measured steps; of decode calls, a third of them")
    return parser


def chosen(shape: str, changes: str) -> Work:
    """The work for a shape, with changes as JSON."""
    return WORK[shape]._replace(**json.loads(changes))


def sft_rows(shape: str, work: Work, steps: int) -> list[list[list[int]]]:
    """Random token ids by step and document, all of the same length: what is timed is arithmetic, not padding."""
    draw = random.Random(0)
    return [[_ids(draw, shape, work.length) for _ in range(work.documents)] for _ in range(steps)]


def pair_sizes(work: Work) -> dict[str, int]:
    """Tokens of a pair's prompt and completions: half a document at most, and what is left in two."""
    prompt = min(work.prompt, work.length // 2)
    completion = (work.length - prompt) // 2
    return {"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion}


def dpo_pairs(shape: str, work: Work, steps: int) -> list[list[dict[str, list[int]]]]:
    """Random pairs by step."""
    draw = random.Random(0)
    return [
        [{name: _ids(draw, shape, size) for name, size in pair_sizes(work).items()} for _ in range(work.documents)]
        for _ in range(steps)
    ]


def prompts(shape: str, work: Work) -> list[list[int]]:
    """Random prompts, one per slot."""
    draw = random.Random(0)
    return [_ids(draw, shape, work.prompt) for _ in range(work.slots)]


def _ids(draw: random.Random, shape: str, count: int) -> list[int]:
    # Ends and padding lie at the beginning or at the end of a vocabulary.
    return draw.choices(range(3, SHAPES[shape]["vocab_size"] * 4 // 5), k=count)
