"""Gemma 1 to 3: entries of `FAMILIES`, and the checkpoints that hold Gemma 3 beside a model of images."""

from __future__ import annotations

import math
from typing import Any

from jaxalign.models.config import ModelConfig
from jaxalign.models.family import Composite, Family
from jaxalign.models.family_names import LLAMA_DEFAULTS, LLAMA_KEYS, LLAMA_NAMES, SANDWICH_NAMES
from jaxalign.models.rope_windows import (
    local_and_global,
    read_rope,
    typed_windows,
    write_local_and_global,
    write_typed_windows,
)


def _query_scalar(config: ModelConfig) -> dict[str, Any]:
    return {"query_pre_attn_scalar": round(config.attention_scale**-2) if config.attention_scale else config.head_dim}


_GEMMA_KEYS = {**LLAMA_KEYS, "activation": "hidden_activation", "qkv_bias": "attention_bias"}
_GEMMA_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "head_dim": 256,
    "activation": "gelu_pytorch_tanh",
    "tie_embeddings": True,
    "max_position": 8192,
    "qkv_bias": False,
}
_GEMMA = {
    "output_bias": lambda hf: bool(hf.get("attention_bias")),
    "norm_plus_one": True,
    "embedding_multiplier": lambda hf: math.sqrt(hf["hidden_size"]),
}
_GEMMA2 = {
    **_GEMMA,
    "norm_place": "both",
    "attention_scale": lambda hf: hf.get("query_pre_attn_scalar", 256) ** -0.5,
}
GEMMA_FAMILIES: dict[str, Family] = {
    "gemma": Family(
        architecture="GemmaForCausalLM",
        classifier="GemmaForSequenceClassification",
        keys={**_GEMMA_KEYS, "activation": "hidden_act"},
        defaults=_GEMMA_DEFAULTS,
        # The first checkpoints say gelu and mean its approximation.
        fixed={
            **_GEMMA,
            "rope": read_rope(10000.0),
            "activation": lambda hf: {"gelu": "gelu_tanh"}.get(name := hf.get("hidden_act", "gelu_tanh"), name),
        },
        refuses={"use_bidirectional_attention": False},
        names=LLAMA_NAMES,
        checkpoints=("google/gemma-2b-it", "google/gemma-7b-it"),
        features="scaled embeddings, norms with 1 + scale",
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        classifier="Gemma2ForSequenceClassification",
        keys=_GEMMA_KEYS,
        defaults=_GEMMA_DEFAULTS,
        fixed={
            **_GEMMA2,
            "rope": read_rope(10000.0),
            "attention_softcap": lambda hf: hf.get("attn_logit_softcapping", 50.0),
            "logit_softcap": lambda hf: hf.get("final_logit_softcapping", 30.0),
        },
        windows=typed_windows(2),
        refuses={"use_bidirectional_attention": False},
        write=lambda config: {
            **write_typed_windows(config),
            **_query_scalar(config),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        },
        names=SANDWICH_NAMES,
        checkpoints=("google/gemma-2-2b-it", "google/gemma-2-9b-it", "google/gemma-2-27b-it"),
        features="windows in every second layer, soft-caps on scores and logits, norms before and after",
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
        keys=_GEMMA_KEYS,
        # What the released configs leave to transformers' defaults.
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "num_heads": 8,
            "num_kv_heads": 4,
            "max_position": 131072,
        },
        fixed={
            **_GEMMA2,
            "qk_norm": True,
            "ropes": lambda hf: local_and_global(hf, typed_windows(6)(hf, hf["num_hidden_layers"])),
            "logit_softcap": lambda hf: hf.get("final_logit_softcapping"),
        },
        windows=typed_windows(6),
        # transformers reads the key and does nothing with it.
        refuses={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        write=lambda config: {
            **write_typed_windows(config),
            **write_local_and_global(config),
            **_query_scalar(config),
            "final_logit_softcapping": config.logit_softcap,
        },
        names=SANDWICH_NAMES,
        checkpoints=("google/gemma-3-270m-it", "google/gemma-3-1b-it"),
        features="five layers of six with a window and a rope of their own, QK norm, norms before and after",
    ),
}

# The first spelling of a tensor's name is that of the Hub's files, the second that of transformers 5.
COMPOSITES: dict[str, Composite] = {
    "gemma3": Composite(
        family="gemma3_text",
        key="text_config",
        renames={
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
            "lm_head.": "lm_head.",
            "score.": "score.",
        },
        refuses={"final_logit_softcapping": None},
        checkpoints=("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it"),
    ),
}
