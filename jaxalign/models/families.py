"""Model families as data: how a Hugging Face config and its tensors map onto our one decoder."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxalign.models.config import ModelConfig, locate
from jaxalign.models.heads import read_heads, write_heads
from jaxalign.models.rope_windows import all_windowed, late_windowed, read_rope, write_late_windows, write_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint and its place in ours.

    Attributes:
      name: name in the checkpoint.
      path: leaf in `variables["params"]`.
      repeat: index on the leaf's leading (stacked) axis, or None for an unstacked leaf.
      layout: `linear` = `[out, in]`, transposed to `[in, out]`; `plain` = the same order of numbers. Either is then
        reshaped to the leaf's shape.
      part: `(i, n)`: the leaf is the i-th of n equal parts of the tensor's last axis.
    """

    name: str
    path: tuple[str, ...]
    repeat: int | None = None
    layout: Literal["linear", "plain"] = "plain"
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
      architecture: class name that transformers loads.
      classifier: class name of the same decoder with a score head.
      keys: our field -> name in Hugging Face's config.json.
      defaults: our field -> value, or function of the config.json, when that key is missing or null.
      fixed: fields that are the same for the whole family.
      windows: reads the windows of all layers from a config.json.
      names: our leaf -> (tensor name, layout[, part]); `{}` is the layer.
      refuses: config.json key -> the only value that we compute rightly.
      write: extra config.json keys from our config.
    """

    architecture: str
    classifier: str
    keys: Mapping[str, str]
    names: Mapping[str, tuple]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    windows: Callable[[Mapping, int], tuple[int | None, ...]] = lambda hf, layers: (None,) * layers
    refuses: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[ModelConfig], dict] = lambda config: {}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Our config from the content of a config.json.

    Raises:
      ValueError: unknown family, a missing key, or a setting that we would compute wrongly; the key is named.
    """
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"config.json: {_unknown(name)}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    for key, only in family.refuses.items():
        if hf.get(key, only) != only:
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported for {name}; only {only!r} is")
    values: dict[str, Any] = {"family": name}
    for ours, theirs in family.keys.items():
        value = hf.get(theirs)
        if value is None:
            if ours not in family.defaults:
                raise ValueError(f"config.json: {name} needs the key {theirs!r}")
            default = family.defaults[ours]
            value = default(hf) if callable(default) else default
        values[ours] = value
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"config.json: activation {values['activation']!r} is unknown; known: {', '.join(ACTIVATIONS)}"
        )
    values["activation"] = ACTIVATIONS[values["activation"]]
    values["windows"] = family.windows(hf, values["num_layers"])
    values |= {key: value(hf) if callable(value) else value for key, value in family.fixed.items()}
    return ModelConfig(**values, **read_heads(hf), **_token_ids(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json that transformers (and `from_hf`) read back as the same model.

    Raises:
      ValueError: both an LM head and a score head; no class of transformers has both.
    """
    family = FAMILIES[config.family]
    hf = {theirs: getattr(config, ours) for ours, theirs in family.keys.items()}
    hf[family.keys["activation"]] = ACTIVATION_NAMES[config.activation]
    eos = list(config.eos_ids)
    ids = {"bos_token_id": config.bos_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    return {
        "model_type": config.family,
        **write_heads(config, family.architecture, family.classifier),
        **hf,
        **({} if config.rope is None else write_rope(config.rope)),
        **family.write(config),
        **ids,
        "pad_token_id": config.pad_id,
    }


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of the family's checkpoint for this config, in layer order."""
    family, found = FAMILIES[config.family], []
    for leaf, (name, layout, *part) in family.names.items():
        rest = {"layout": layout, "part": part[0] if part else None}
        path = tuple(leaf.split("/"))
        if not _exists(config, path):
            continue
        if path[0] != "block":
            found.append(Tensor(name, path, None, **rest))
            continue
        for layer in range(config.num_layers):
            segment, repeat, place = locate(config, layer)
            where = (f"segment_{segment}", f"block_{place}", *path[1:])
            found.append(Tensor(name.format(layer), where, repeat, **rest))
    return found


def _unknown(name: Any) -> str:
    if name is None:
        return "model_type is missing"
    near = difflib.get_close_matches(str(name), FAMILIES, 1, cutoff=0.0)
    return f"model_type {name!r} is not a known family; the nearest by name is {near[0]!r}"


def _exists(config: ModelConfig, path: tuple[str, ...]) -> bool:
    leaf = "/".join(path[-3:])
    if path[0] == "head":
        return config.lm_head and not config.tie_embeddings
    if path[0] == "score":
        return config.score_head and (path[-1] == "kernel" or config.score_labels == 2)
    if "attention/output/bias" in leaf:
        return config.output_bias
    if leaf.startswith("attention/") and leaf.endswith("/bias"):
        return config.qkv_bias
    if leaf.startswith("mlp/") and leaf.endswith("/bias"):
        return config.mlp_bias
    if leaf.endswith(("query_norm/scale", "key_norm/scale")):
        return config.qk_norm
    return config.gated_mlp or "mlp/gate" not in leaf


def _token_ids(hf: Mapping[str, Any]) -> dict[str, Any]:
    eos = hf.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return {"bos_id": hf.get("bos_token_id"), "eos_ids": eos_ids, "pad_id": hf.get("pad_token_id")}


_LLAMA_KEYS = {
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
_LLAMA_DEFAULTS = {
    "num_kv_heads": lambda hf: hf["num_attention_heads"],
    "head_dim": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
    "norm_eps": 1e-6,
    "activation": "silu",
    "tie_embeddings": False,
    "attention_dropout": 0.0,
    "max_position": 2048,
}
_LLAMA_NAMES = {
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
_GPT2_NAMES = {
    "embed/embedding": ("transformer.wte.weight", "plain"),
    "positions/embedding": ("transformer.wpe.weight", "plain"),
    "block/attention_norm/scale": ("transformer.h.{}.ln_1.weight", "plain"),
    "block/attention_norm/bias": ("transformer.h.{}.ln_1.bias", "plain"),
    "block/attention/query/kernel": ("transformer.h.{}.attn.c_attn.weight", "plain", (0, 3)),
    "block/attention/query/bias": ("transformer.h.{}.attn.c_attn.bias", "plain", (0, 3)),
    "block/attention/key/kernel": ("transformer.h.{}.attn.c_attn.weight", "plain", (1, 3)),
    "block/attention/key/bias": ("transformer.h.{}.attn.c_attn.bias", "plain", (1, 3)),
    "block/attention/value/kernel": ("transformer.h.{}.attn.c_attn.weight", "plain", (2, 3)),
    "block/attention/value/bias": ("transformer.h.{}.attn.c_attn.bias", "plain", (2, 3)),
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
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        keys={**_LLAMA_KEYS, "qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={**_LLAMA_DEFAULTS, "qkv_bias": False, "mlp_bias": False},
        fixed={"rope": read_rope(10000.0), "output_bias": lambda hf: bool(hf.get("attention_bias"))},
        names=_LLAMA_NAMES,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        classifier="MistralForSequenceClassification",
        keys=_LLAMA_KEYS,
        defaults={**_LLAMA_DEFAULTS, "num_kv_heads": 8},
        fixed={"rope": read_rope(10000.0)},
        windows=all_windowed(None),
        write=lambda config: {"sliding_window": config.windows[0]},
        names=_LLAMA_NAMES,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        classifier="Qwen2ForSequenceClassification",
        keys={ours: theirs for ours, theirs in _LLAMA_KEYS.items() if ours != "head_dim"},
        defaults=_LLAMA_DEFAULTS,
        fixed={
            "head_dim": lambda hf: hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            "rope": read_rope(10000.0),
            "qkv_bias": True,
        },
        windows=late_windowed,
        write=write_late_windows,
        names=_LLAMA_NAMES,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        classifier="Qwen3ForSequenceClassification",
        keys={**_LLAMA_KEYS, "qkv_bias": "attention_bias"},
        defaults={**_LLAMA_DEFAULTS, "head_dim": 128, "qkv_bias": False},
        fixed={
            "rope": read_rope(10000.0),
            "qk_norm": True,
            "output_bias": lambda hf: bool(hf.get("attention_bias")),
        },
        windows=late_windowed,
        write=write_late_windows,
        names=_LLAMA_NAMES,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        classifier="GPT2ForSequenceClassification",
        keys={
            "vocab_size": "vocab_size",
            "embed_dim": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "mlp_dim": "n_inner",
            "max_position": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "tie_embeddings": "tie_word_embeddings",
            "dropout": "resid_pdrop",
            "attention_dropout": "attn_pdrop",
        },
        defaults={
            "mlp_dim": lambda hf: 4 * hf["n_embd"],
            "norm_eps": 1e-5,
            "activation": "gelu_new",
            "tie_embeddings": True,
            "dropout": 0.1,
            "attention_dropout": 0.1,
        },
        fixed={
            "num_kv_heads": lambda hf: hf["n_head"],
            "head_dim": lambda hf: hf["n_embd"] // hf["n_head"],
            "norm": "layer",
            "gated_mlp": False,
            "learned_positions": True,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        refuses={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        write=lambda config: {"embd_pdrop": config.dropout},
        names=_GPT2_NAMES,
    ),
}
