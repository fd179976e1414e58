"""Which tensor of a checkpoint is which leaf of ours, and the keys that most families share."""

from __future__ import annotations


def without(names: dict, *endings: str) -> dict:
    """The entries whose leaf ends with none of these."""
    return {leaf: entry for leaf, entry in names.items() if not leaf.endswith(endings)}


LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "max_position": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    "attention_dropout": "attention_dropout",
}
LLAMA_DEFAULTS = {
    "num_kv_heads": lambda hf: hf["num_attention_heads"],
    "head_dim": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
    "norm_eps": 1e-6,
    "activation": "silu",
    "tie_embeddings": False,
    "attention_dropout": 0.0,
    "max_position": 2048,
}
LLAMA_NAMES = {
    "embed/embedding": ("model.embed_tokens.weight", "plain"),
    "block/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", "plain"),
    "block/attention/query/kernel": ("model.layers.{}.self_attn.q_proj.weight", "linear"),
    "block/attention/query/bias": ("model.layers.{}.self_attn.q_proj.bias", "plain"),
    "block/attention/key/kernel": ("model.layers.{}.self_attn.k_proj.weight", "linear"),
    "block/attention/key/bias": ("model.layers.{}.self_attn.k_proj.bias", "plain"),
    "block/attention/value/kernel": ("model.layers.{}.self_attn.v_proj.weight", "linear"),
    "block/attention/value/bias": ("model.layers.{}.self_attn.v_proj.bias", "plain"),
    "block/attention/query_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", "plain"),
    "block/attention/key_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", "plain"),
    "block/attention/output/kernel": ("model.layers.{}.self_attn.o_proj.weight", "linear"),
    "block/attention/output/bias": ("model.layers.{}.self_attn.o_proj.bias", "plain"),
    "block/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "plain"),
    "block/mlp/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", "linear"),
    "block/mlp/gate/bias": ("model.layers.{}.mlp.gate_proj.bias", "plain"),
    "block/mlp/up/kernel": ("model.layers.{}.mlp.up_proj.weight", "linear"),
    "block/mlp/up/bias": ("model.layers.{}.mlp.up_proj.bias", "plain"),
    "block/mlp/down/kernel": ("model.layers.{}.mlp.down_proj.weight", "linear"),
    "block/mlp/down/bias": ("model.layers.{}.mlp.down_proj.bias", "plain"),
    "final_norm/scale": ("model.norm.weight", "plain"),
    "head/kernel": ("lm_head.weight", "linear"),
    "score/kernel": ("score.weight", "linear"),
    "score/bias": ("score.bias", "plain"),
}
GPT2_NAMES = {
    "embed/embedding": ("transformer.wte.weight", "plain"),
    "positions/embedding": ("transformer.wpe.weight", "plain"),
    "block/attention_norm/scale": ("transformer.h.{}.ln_1.weight", "plain"),
    "block/attention_norm/bias": ("transformer.h.{}.ln_1.bias", "plain"),
    "block/attention/query/kernel": ("transformer.h.{}.attn.c_attn.weight", "plain", (0, (1, 1, 1))),
    "block/attention/query/bias": ("transformer.h.{}.attn.c_attn.bias", "plain", (0, (1, 1, 1))),
    "block/attention/key/kernel": ("transformer.h.{}.attn.c_attn.weight", "plain", (1, (1, 1, 1))),
    "block/attention/key/bias": ("transformer.h.{}.attn.c_attn.bias", "plain", (1, (1, 1, 1))),
    "block/attention/value/kernel": ("transformer.h.{}.attn.c_attn.weight", "plain", (2, (1, 1, 1))),
    "block/attention/value/bias": ("transformer.h.{}.attn.c_attn.bias", "plain", (2, (1, 1, 1))),
    "block/attention/output/kernel": ("transformer.h.{}.attn.c_proj.weight", "plain"),
    "block/attention/output/bias": ("transformer.h.{}.attn.c_proj.bias", "plain"),
    "block/mlp_norm/scale": ("transformer.h.{}.ln_2.weight", "plain"),
    "block/mlp_norm/bias": ("transformer.h.{}.ln_2.bias", "plain"),
    "block/mlp/up/kernel": ("transformer.h.{}.mlp.c_fc.weight", "plain"),
    "block/mlp/up/bias": ("transformer.h.{}.mlp.c_fc.bias", "plain"),
    "block/mlp/down/kernel": ("transformer.h.{}.mlp.c_proj.weight", "plain"),
    "block/mlp/down/bias": ("transformer.h.{}.mlp.c_proj.bias", "plain"),
    "final_norm/scale": ("transformer.ln_f.weight", "plain"),
    "final_norm/bias": ("transformer.ln_f.bias", "plain"),
    "head/kernel": ("lm_head.weight", "linear"),
    "score/kernel": ("score.weight", "linear"),
    "score/bias": ("score.bias", "plain"),
}

SANDWICH_NAMES = {
    **LLAMA_NAMES,
    "block/attention_post_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "plain"),
    "block/mlp_norm/scale": ("model.layers.{}.pre_feedforward_layernorm.weight", "plain"),
    "block/mlp_post_norm/scale": ("model.layers.{}.post_feedforward_layernorm.weight", "plain"),
}
POST_NAMES = without(SANDWICH_NAMES, "attention_norm/scale", "mlp_norm/scale")
_QKV = ("num_heads", "num_kv_heads", "num_kv_heads")
FUSED_NAMES = {
    **LLAMA_NAMES,
    "block/attention/query/kernel": ("model.layers.{}.self_attn.qkv_proj.weight", "linear", (0, _QKV)),
    "block/attention/key/kernel": ("model.layers.{}.self_attn.qkv_proj.weight", "linear", (1, _QKV)),
    "block/attention/value/kernel": ("model.layers.{}.self_attn.qkv_proj.weight", "linear", (2, _QKV)),
    "block/mlp/gate/kernel": ("model.layers.{}.mlp.gate_up_proj.weight", "linear", (0, (1, 1))),
    "block/mlp/up/kernel": ("model.layers.{}.mlp.gate_up_proj.weight", "linear", (1, (1, 1))),
}
GLM_NAMES = {
    **LLAMA_NAMES,
    "block/attention_post_norm/scale": ("model.layers.{}.post_self_attn_layernorm.weight", "plain"),
    "block/mlp_post_norm/scale": ("model.layers.{}.post_mlp_layernorm.weight", "plain"),
    "block/mlp/gate/kernel": FUSED_NAMES["block/mlp/gate/kernel"],
    "block/mlp/up/kernel": FUSED_NAMES["block/mlp/up/kernel"],
}
# Layer norms with biases.
LAYER_NORM_NAMES = {
    **LLAMA_NAMES,
    "block/attention_norm/bias": ("model.layers.{}.input_layernorm.bias", "plain"),
    "block/mlp_norm/bias": ("model.layers.{}.post_attention_layernorm.bias", "plain"),
    "final_norm/bias": ("model.norm.bias", "plain"),
}
STARCODER2_NAMES = {
    **without(LAYER_NORM_NAMES, "gate/kernel", "gate/bias"),
    "block/mlp/up/kernel": ("model.layers.{}.mlp.c_fc.weight", "linear"),
    "block/mlp/up/bias": ("model.layers.{}.mlp.c_fc.bias", "plain"),
    "block/mlp/down/kernel": ("model.layers.{}.mlp.c_proj.weight", "linear"),
    "block/mlp/down/bias": ("model.layers.{}.mlp.c_proj.bias", "plain"),
}
_HEADS = (1, 1, 1)
NEOX_NAMES = {
    "embed/embedding": ("gpt_neox.embed_in.weight", "plain"),
    "block/attention_norm/scale": ("gpt_neox.layers.{}.input_layernorm.weight", "plain"),
    "block/attention_norm/bias": ("gpt_neox.layers.{}.input_layernorm.bias", "plain"),
    "block/attention/query/kernel": (
        "gpt_neox.layers.{}.attention.query_key_value.weight",
        "linear",
        (0, _HEADS, True),
    ),
    "block/attention/query/bias": ("gpt_neox.layers.{}.attention.query_key_value.bias", "plain", (0, _HEADS, True)),
    "block/attention/key/kernel": ("gpt_neox.layers.{}.attention.query_key_value.weight", "linear", (1, _HEADS, True)),
    "block/attention/key/bias": ("gpt_neox.layers.{}.attention.query_key_value.bias", "plain", (1, _HEADS, True)),
    "block/attention/value/kernel": (
        "gpt_neox.layers.{}.attention.query_key_value.weight",
        "linear",
        (2, _HEADS, True),
    ),
    "block/attention/value/bias": ("gpt_neox.layers.{}.attention.query_key_value.bias", "plain", (2, _HEADS, True)),
    "block/attention/output/kernel": ("gpt_neox.layers.{}.attention.dense.weight", "linear"),
    "block/attention/output/bias": ("gpt_neox.layers.{}.attention.dense.bias", "plain"),
    "block/mlp_norm/scale": ("gpt_neox.layers.{}.post_attention_layernorm.weight", "plain"),
    "block/mlp_norm/bias": ("gpt_neox.layers.{}.post_attention_layernorm.bias", "plain"),
    "block/mlp/up/kernel": ("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "linear"),
    "block/mlp/up/bias": ("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", "plain"),
    "block/mlp/down/kernel": ("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "linear"),
    "block/mlp/down/bias": ("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", "plain"),
    "final_norm/scale": ("gpt_neox.final_layer_norm.weight", "plain"),
    "final_norm/bias": ("gpt_neox.final_layer_norm.bias", "plain"),
    "head/kernel": ("lm_head.weight", "linear"),
    "score/kernel": ("score.weight", "linear"),
    "score/bias": ("score.bias", "plain"),
}
