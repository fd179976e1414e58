"""Families with experts: what their config.json and tensors say beyond those of the dense families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import ModelConfig
from jaxalign.models.family import Family
from jaxalign.models.family_names import LLAMA_DEFAULTS, LLAMA_KEYS, LLAMA_NAMES, without
from jaxalign.models.rope_windows import all_windowed, read_rope

_KEYS = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_mlp_dim": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_DEFAULTS = {"norm_topk_prob": False, "router_aux_loss_coef": 0.001}
_QWEN_NAMES = {
    "block/experts/router/kernel": ("model.layers.{}.mlp.gate.weight", "linear"),
    "block/experts/gate/kernel": ("model.layers.{}.mlp.experts.{}.gate_proj.weight", "linear"),
    "block/experts/up/kernel": ("model.layers.{}.mlp.experts.{}.up_proj.weight", "linear"),
    "block/experts/down/kernel": ("model.layers.{}.mlp.experts.{}.down_proj.weight", "linear"),
}
_SHARED_NAMES = {
    "block/experts/shared_switch/kernel": ("model.layers.{}.mlp.shared_expert_gate.weight", "linear"),
    "block/experts/shared_gate/kernel": ("model.layers.{}.mlp.shared_expert.gate_proj.weight", "linear"),
    "block/experts/shared_up/kernel": ("model.layers.{}.mlp.shared_expert.up_proj.weight", "linear"),
    "block/experts/shared_down/kernel": ("model.layers.{}.mlp.shared_expert.down_proj.weight", "linear"),
}


def in_layer(config: ModelConfig, part: str, layer: int) -> bool:
    """Whether a layer has this part of a block: `mlp` where it is dense, experts where it is sparse."""
    sparse = bool(config.sparse_layers) and config.sparse_layers[layer]
    return {"mlp": not sparse, "experts": sparse}.get(part, True)


def _read_sparse_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer, save for those that `mlp_only_layers` names."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    some = hf.get("num_experts", hf.get("num_local_experts", 1)) > 0
    return tuple(some and (i + 1) % step == 0 and i not in dense for i in range(hf["num_hidden_layers"]))


def _write_sparse_layers(config: ModelConfig) -> dict[str, Any]:
    dense = [layer for layer, sparse in enumerate(config.sparse_layers) if not sparse]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense, "output_router_logits": False}


def _switched_window(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """One window for every layer, where it is switched on."""
    return (hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None,) * layers


def _write_switched_window(config: ModelConfig) -> dict[str, Any]:
    window = config.windows[0]
    return {"use_sliding_window": window is not None, "sliding_window": window}


_MIXTRAL = "model.layers.{}.block_sparse_moe."

SPARSE_FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        classifier="MixtralForSequenceClassification",
        keys={
            **LLAMA_KEYS,
            "num_experts": "num_local_experts",
            "experts_per_token": "num_experts_per_tok",
            "router_aux_loss_coef": "router_aux_loss_coef",
        },
        defaults={
            **LLAMA_DEFAULTS,
            **_DEFAULTS,
            "num_kv_heads": 8,
            "norm_eps": 1e-5,
            "max_position": 131072,
            "num_experts": 8,
            "experts_per_token": 2,
        },
        fixed={
            "rope": read_rope(1000000.0),
            "norm_topk_prob": True,
            "expert_mlp_dim": lambda hf: hf["intermediate_size"],
            "sparse_layers": lambda hf: (True,) * hf["num_hidden_layers"],
        },
        windows=all_windowed(None),
        refuses={"router_jitter_noise": 0.0},
        write=lambda config: {"sliding_window": config.windows[0], "output_router_logits": False},
        names={
            **LLAMA_NAMES,
            "block/experts/router/kernel": (_MIXTRAL + "gate.weight", "linear"),
            "block/experts/gate/kernel": (_MIXTRAL + "experts.{}.w1.weight", "linear"),
            "block/experts/up/kernel": (_MIXTRAL + "experts.{}.w3.weight", "linear"),
            "block/experts/down/kernel": (_MIXTRAL + "experts.{}.w2.weight", "linear"),
        },
        checkpoints=("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        features="experts in every layer",
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        classifier="Qwen2MoeForSequenceClassification",
        keys={
            **without(LLAMA_KEYS, "head_dim"),
            **_KEYS,
            "shared_mlp_dim": "shared_expert_intermediate_size",
            "qkv_bias": "qkv_bias",
        },
        defaults={
            **LLAMA_DEFAULTS,
            **_DEFAULTS,
            "num_kv_heads": 16,
            "max_position": 32768,
            "qkv_bias": True,
            "num_experts": 60,
            "experts_per_token": 4,
            "expert_mlp_dim": 1408,
            "shared_mlp_dim": 5632,
        },
        fixed={
            "head_dim": lambda hf: hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            "rope": read_rope(10000.0),
            "sparse_layers": _read_sparse_layers,
        },
        refuses={"use_sliding_window": False},
        write=lambda config: {**_write_sparse_layers(config), "use_sliding_window": False},
        names={**LLAMA_NAMES, **_QWEN_NAMES, **_SHARED_NAMES},
        checkpoints=("Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"),
        features="experts beside a shared one, biases of query, key and value",
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        classifier="Qwen3MoeForSequenceClassification",
        keys={**LLAMA_KEYS, **_KEYS, "qkv_bias": "attention_bias"},
        defaults={
            **LLAMA_DEFAULTS,
            **_DEFAULTS,
            "num_kv_heads": 4,
            "max_position": 32768,
            "qkv_bias": False,
            "num_experts": lambda hf: hf.get("num_local_experts", 128),
            "experts_per_token": 8,
            "expert_mlp_dim": 768,
        },
        fixed={
            "rope": read_rope(10000.0),
            "qk_norm": True,
            "output_bias": lambda hf: bool(hf.get("attention_bias")),
            "sparse_layers": _read_sparse_layers,
        },
        windows=_switched_window,
        write=lambda config: {**_write_sparse_layers(config), **_write_switched_window(config)},
        names={**LLAMA_NAMES, **_QWEN_NAMES},
        checkpoints=("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"),
        features="experts, norms of query and key, windows where switched on",
    ),
}
