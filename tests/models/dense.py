"""Tiny configs of the dense families beyond the first ones: each with numbers of its own wherever it has a field."""

from __future__ import annotations

_BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
_RMS = _BASE | {"num_key_value_heads": 2, "rms_norm_eps": 3e-2}
_GEMMA = _RMS | {"head_dim": 24, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 1.9, 2.5],
    "long_factor": [1.2, 1.9, 3.0, 4.5, 6.0, 8.0],
}
_LAYER = _BASE | {"layer_norm_eps": 3e-2, "tie_word_embeddings": False}

DENSE: dict[str, dict] = {
    "falcon3": _RMS
    | {"model_type": "llama", "head_dim": 32, "hidden_act": "silu", "tie_word_embeddings": False}
    # Falcon 3 is a Llama with wide heads and a large theta.
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000042.0}},
    "gemma": _GEMMA | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _GEMMA
    | {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "query_pre_attn_scalar": 40,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 8.0,
    },
    # Two repeats of the pattern and a rest.
    "gemma3": _GEMMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 5,
        "sliding_window_pattern": 2,
        "sliding_window": 16,
        "query_pre_attn_scalar": 20,
        "final_logit_softcapping": 9.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 3.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
    "phi3": _RMS | {"model_type": "phi3", "sliding_window": 16, "tie_word_embeddings": False},
    # Within the original context, and (see EXTENDED) beyond it.
    "phi3-short": _RMS
    | {"model_type": "phi3", "original_max_position_embeddings": 96, "tie_word_embeddings": True}
    | {"rope_parameters": _LONGROPE | {"original_max_position_embeddings": 96}},
    "phi3-long": _RMS
    | {"model_type": "phi3", "original_max_position_embeddings": 32}
    | {"rope_parameters": _LONGROPE | {"original_max_position_embeddings": 32}},
    "pythia": _LAYER
    | {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    },
    "neox-serial": _LAYER
    | {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "olmo2": _RMS | {"model_type": "olmo2", "tie_word_embeddings": False},
    "smollm3": _RMS
    | {
        "model_type": "smollm3",
        "num_hidden_layers": 5,
        "no_rope_layer_interval": 2,
        "tie_word_embeddings": True,
    },
    "smollm3-windows": _RMS
    | {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "granite": _RMS
    | {
        "model_type": "granite",
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.7,
        "tie_word_embeddings": True,
    },
    "starcoder2": _BASE
    | {"model_type": "starcoder2", "num_key_value_heads": 2, "norm_epsilon": 3e-2, "sliding_window": 16},
    "cohere2": _LAYER
    | {
        "model_type": "cohere2",
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "sliding_window_pattern": 2,
        "sliding_window": 16,
        "logit_scale": 1.4,
        "tie_word_embeddings": True,
    },
    "stablelm": _LAYER
    | {
        "model_type": "stablelm",
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    },
    "stablelm-parallel": _LAYER
    | {
        "model_type": "stablelm",
        "num_key_value_heads": 4,
        "use_parallel_residual": True,
        "use_qkv_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "glm4": _RMS
    | {
        "model_type": "glm4",
        "head_dim": 24,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
}
# Read with the long factors of their longrope (`extend_context`).
EXTENDED = {"phi3-long"}
# The same fields as another case of the family.
VARIANTS = {"falcon3", "phi3-short", "neox-serial", "smollm3-windows", "stablelm-parallel"}
