"""Dense families beyond the first ones: entries of `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.family import Family
from jaxalign.models.family_names import (
    FUSED_NAMES,
    GLM_NAMES,
    LAYER_NORM_NAMES,
    LLAMA_DEFAULTS,
    LLAMA_KEYS,
    LLAMA_NAMES,
    NEOX_NAMES,
    POST_NAMES,
    STARCODER2_NAMES,
)
from jaxalign.models.gemma_families import GEMMA_FAMILIES
from jaxalign.models.rope_windows import (
    KINDS,
    all_windowed,
    original_context,
    read_rope,
    rope_flags,
    typed_windows,
    windows_without_rope,
    write_rope,
    write_typed_windows,
)

_DERIVED_HEAD = {ours: theirs for ours, theirs in LLAMA_KEYS.items() if ours != "head_dim"}
_BIASES = {"output_bias": lambda hf: bool(hf.get("attention_bias"))}


def _head_dim(hf: Mapping[str, Any]) -> int:
    return hf["hidden_size"] // hf["num_attention_heads"]


def _inverse(value: float) -> float:
    """1 / value, so that the inverse of a config's short number is that number again."""
    return float(f"{1 / value:.12g}")


def _by_layer(read_one, has_rope):
    """Reads the ropes of all layers: one of them, in the layers that `has_rope` names from their config.json."""
    return lambda hf: tuple(read_one(hf) if has else None for has in has_rope(hf, hf["num_hidden_layers"]))


_SHORT_OR_LONG = (*KINDS[:1], "longrope")

DENSE_FAMILIES: dict[str, Family] = {
    **GEMMA_FAMILIES,
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        classifier="Phi3ForSequenceClassification",
        keys={**LLAMA_KEYS, "dropout": "resid_pdrop"},
        defaults={**LLAMA_DEFAULTS, "norm_eps": 1e-5, "dropout": 0.0},
        fixed={
            "rope": read_rope(10000.0, kinds=_SHORT_OR_LONG, partial=1.0),
            "max_position": original_context,
        },
        windows=all_windowed(None),
        write=lambda config: {"sliding_window": config.windows[0]},
        names=FUSED_NAMES,
        checkpoints=("microsoft/Phi-3.5-mini-instruct", "microsoft/Phi-4-mini-instruct", "microsoft/phi-4"),
        features="fused QKV and gate, partial rotary, longrope",
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        classifier="GPTNeoXForSequenceClassification",
        keys={
            **{ours: theirs for ours, theirs in _DERIVED_HEAD.items() if ours != "num_kv_heads"},
            "norm_eps": "layer_norm_eps",
            "dropout": "hidden_dropout",
            "qkv_bias": "attention_bias",
            "parallel_residual": "use_parallel_residual",
        },
        defaults={
            **LLAMA_DEFAULTS,
            "norm_eps": 1e-5,
            "activation": "gelu",
            "dropout": 0.0,
            "qkv_bias": True,
            "parallel_residual": True,
        },
        fixed={
            "rope": read_rope(10000.0, theta_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct"),
            "num_kv_heads": lambda hf: hf["num_attention_heads"],
            "head_dim": _head_dim,
            "norm": "layer",
            "gated_mlp": False,
            "output_bias": lambda hf: hf.get("attention_bias") is not False,
            "mlp_bias": True,
        },
        write=lambda config: {} if config.rope is None else write_rope(config.rope, "rotary_emb_base", "rotary_pct"),
        names=NEOX_NAMES,
        renames={"embed_out.": "lm_head."},
        checkpoints=("EleutherAI/pythia-410m", "EleutherAI/pythia-1b", "EleutherAI/pythia-6.9b"),
        features="attention and MLP side by side, partial rotary, layer norms, biases, QKV fused by head",
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        classifier="Olmo2ForSequenceClassification",
        keys={**LLAMA_KEYS, "qkv_bias": "attention_bias"},
        defaults={**LLAMA_DEFAULTS, "norm_eps": 1e-5, "qkv_bias": False},
        fixed={
            **_BIASES,
            "rope": read_rope(10000.0),
            "norm_place": "post",
            "qk_norm": True,
            "qk_norm_over": "projection",
        },
        names=POST_NAMES,
        checkpoints=("allenai/OLMo-2-0425-1B-Instruct", "allenai/OLMo-2-1124-7B-Instruct"),
        features="norms after attention and MLP, QK norm over all heads at once",
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        classifier="SmolLM3ForSequenceClassification",
        keys={**LLAMA_KEYS, "qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={
            **LLAMA_DEFAULTS,
            "num_kv_heads": 4,
            "tie_embeddings": True,
            "max_position": 32768,
            "qkv_bias": False,
            "mlp_bias": False,
        },
        fixed={**_BIASES, "ropes": _by_layer(read_rope(2000000.0), rope_flags)},
        windows=windows_without_rope,
        write=lambda config: {
            **write_typed_windows(config),
            "use_sliding_window": any(config.windows),
            "no_rope_layers": [int(rope is not None) for rope in config.layer_ropes],
        },
        names=LLAMA_NAMES,
        checkpoints=("HuggingFaceTB/SmolLM3-3B",),
        features="every fourth layer without positions",
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        classifier="GraniteForSequenceClassification",
        keys={
            **LLAMA_KEYS,
            "qkv_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "attention_scale": "attention_multiplier",
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
        },
        defaults={
            **LLAMA_DEFAULTS,
            "qkv_bias": False,
            "mlp_bias": False,
            "attention_scale": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
        },
        fixed={
            **_BIASES,
            "rope": read_rope(10000.0),
            "logit_multiplier": lambda hf: 1 / (hf.get("logits_scaling") or 1.0),
        },
        write=lambda config: {"logits_scaling": _inverse(config.logit_multiplier)},
        names=LLAMA_NAMES,
        checkpoints=("ibm-granite/granite-3.3-2b-instruct", "ibm-granite/granite-3.3-8b-instruct"),
        features="multipliers of embeddings, scores, residuals and logits",
        in_transformers=False,
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        classifier="Starcoder2ForSequenceClassification",
        keys={**_DERIVED_HEAD, "norm_eps": "norm_epsilon", "dropout": "residual_dropout", "qkv_bias": "use_bias"},
        defaults={
            **LLAMA_DEFAULTS,
            "num_kv_heads": 2,
            "norm_eps": 1e-5,
            "activation": "gelu_pytorch_tanh",
            "tie_embeddings": True,
            "max_position": 4096,
            "dropout": 0.0,
            "qkv_bias": True,
        },
        fixed={
            "rope": read_rope(10000.0),
            "head_dim": _head_dim,
            "norm": "layer",
            "gated_mlp": False,
            "output_bias": lambda hf: hf.get("use_bias") is not False,
            "mlp_bias": lambda hf: hf.get("use_bias") is not False,
        },
        windows=all_windowed(None),
        write=lambda config: {"sliding_window": config.windows[0], "embedding_dropout": config.dropout},
        names=STARCODER2_NAMES,
        checkpoints=("bigcode/starcoder2-3b", "bigcode/starcoder2-15b-instruct-v0.1"),
        features="windows, layer norms, biases, no gate",
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        classifier="Cohere2ForSequenceClassification",
        keys={
            **_DERIVED_HEAD,
            "norm_eps": "layer_norm_eps",
            "qkv_bias": "attention_bias",
            "logit_multiplier": "logit_scale",
        },
        defaults={
            **LLAMA_DEFAULTS,
            "norm_eps": 1e-5,
            "tie_embeddings": True,
            "max_position": 8192,
            "qkv_bias": False,
            "logit_multiplier": 0.0625,
        },
        fixed={
            **_BIASES,
            "head_dim": _head_dim,
            "norm": "layer",
            "norm_bias": False,
            "parallel_residual": True,
            "shared_norm": True,
            # Layers with a window have a rope, the others none.
            "ropes": _by_layer(read_rope(10000.0, interleaved=True), typed_windows(4)),
        },
        windows=typed_windows(4),
        refuses={"use_qk_norm": False, "use_parallel_block": True, "use_gated_activation": True},
        write=write_typed_windows,
        names=LLAMA_NAMES,
        checkpoints=("CohereLabs/c4ai-command-r7b-12-2024",),
        features="three layers of four with a window and interleaved rotary, the fourth without positions; attention "
        "and MLP side by side, layer norms without bias, scaled logits",
        in_transformers=False,
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        classifier="StableLmForSequenceClassification",
        keys={
            **_DERIVED_HEAD,
            "norm_eps": "layer_norm_eps",
            "dropout": "hidden_dropout",
            "qkv_bias": "use_qkv_bias",
            "parallel_residual": "use_parallel_residual",
        },
        defaults={
            **LLAMA_DEFAULTS,
            "norm_eps": 1e-5,
            "max_position": 4096,
            "dropout": 0.0,
            "qkv_bias": False,
            "parallel_residual": False,
        },
        fixed={
            "rope": read_rope(10000.0, partial=0.25),
            "head_dim": _head_dim,
            "norm": "layer",
            "shared_norm": lambda hf: bool(hf.get("use_parallel_residual")),
        },
        refuses={"qk_layernorm": False},
        names=LAYER_NORM_NAMES,
        checkpoints=("stabilityai/stablelm-2-1_6b-chat", "stabilityai/stablelm-zephyr-3b"),
        features="partial rotary, layer norms",
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        classifier="Glm4ForSequenceClassification",
        keys={**LLAMA_KEYS, "qkv_bias": "attention_bias"},
        defaults={
            **LLAMA_DEFAULTS,
            "num_kv_heads": 2,
            "head_dim": 128,
            "norm_eps": 1.5625e-07,
            "max_position": 131072,
            "qkv_bias": True,
        },
        fixed={"rope": read_rope(10000.0, partial=0.5, interleaved=True), "norm_place": "both"},
        names=GLM_NAMES,
        checkpoints=("zai-org/GLM-4-9B-0414", "zai-org/GLM-4-32B-0414"),
        features="partial interleaved rotary, norms before and after, fused gate",
    ),
}
