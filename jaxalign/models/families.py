"""Model families as data: how a Hugging Face config and its tensors map onto our one decoder."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import ModelConfig, locate
from jaxalign.models.dense_families import DENSE_FAMILIES
from jaxalign.models.family import Family, Part, Tensor
from jaxalign.models.family_names import GPT2_NAMES, LLAMA_DEFAULTS, LLAMA_KEYS, LLAMA_NAMES
from jaxalign.models.gemma_families import COMPOSITES
from jaxalign.models.heads import read_heads, write_heads
from jaxalign.models.rope_windows import all_windowed, late_windowed, read_rope, write_late_windows, write_rope
from jaxalign.models.sparse_families import SPARSE_FAMILIES, in_layer

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Our config from the content of a config.json.

    Raises:
      ValueError: unknown family, a missing key, or a setting that we would compute wrongly; the key is named.
    """
    hf = _text_part(hf)
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"config.json: {_unknown(name)}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _refuse(hf, family.refuses, name)
    values: dict[str, Any] = {"family": name}
    for ours, theirs in family.keys.items():
        value = hf.get(theirs)
        if value is None:
            if ours not in family.defaults:
                raise ValueError(f"config.json: {name} needs the key {theirs!r}")
            default = family.defaults[ours]
            value = default(hf) if callable(default) else default
        values[ours] = value
    values["windows"] = family.windows(hf, values["num_layers"])
    values |= {key: value(hf) if callable(value) else value for key, value in family.fixed.items()}
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"config.json: activation {values['activation']!r} is unknown; known: {', '.join(ACTIVATIONS)}"
        )
    values["activation"] = ACTIVATIONS[values["activation"]]
    return ModelConfig(**values, **read_heads(hf), **_token_ids(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json that transformers (and `from_hf`) read back as the same model.

    Raises:
      ValueError: both an LM head and a score head; no class of transformers has both.
    """
    family = FAMILIES[config.family]
    hf = {theirs: getattr(config, ours) for ours, theirs in family.keys.items()}
    hf[family.keys["activation"]] = family.activations[config.activation]
    eos = list(config.eos_ids)
    ids = {"bos_token_id": config.bos_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    return {
        "model_type": config.family,
        **write_heads(config, family.architecture, family.classifier),
        **hf,
        **_write_rope(config),
        **family.write(config),
        **ids,
        "pad_token_id": config.pad_id,
    }


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of the family's checkpoint for this config, in layer order."""
    family, found = FAMILIES[config.family], []
    for leaf, (name, layout, *part) in family.names.items():
        rest = {"layout": layout, "part": _part(config, *part[0]) if part else None}
        path = tuple(leaf.split("/"))
        if not _exists(config, path):
            continue
        if path[0] != "block":
            found.append(Tensor(name, path, None, **rest))
            continue
        for layer in range(config.num_layers):
            if not in_layer(config, path[1], layer):
                continue
            segment, repeat, place = locate(config, layer)
            where = (f"segment_{segment}", f"block_{place}", *path[1:])
            experts = range(config.num_experts) if name.count("{}") > 1 else (None,)
            found += [Tensor(name.format(layer, e), where, repeat, expert=e, **rest) for e in experts]
    return found


def _unknown(name: Any) -> str:
    if name is None:
        return "model_type is missing"
    near = difflib.get_close_matches(str(name), FAMILIES, 1, cutoff=0.0)
    return f"model_type {name!r} is not a known family; the nearest by name is {near[0]!r}"


def stored_name(name: str, family: str | None) -> str | None:
    """The family's name of a tensor of a checkpoint; None: of another model in it (images).

    A base model's tensors lack the prefix (`model.`, `transformer.`) under which the language model holds them.
    """
    if family in COMPOSITES:
        renames = COMPOSITES[family].renames
        return next((new + name.removeprefix(old) for old, new in renames.items() if name.startswith(old)), None)
    if family not in FAMILIES:
        return name
    for old, new in FAMILIES[family].renames.items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
    prefix = FAMILIES[family].names["embed/embedding"][0].split(".")[0] + "."
    return name if name.startswith((prefix, "lm_head.", "score.")) else prefix + name


def _text_part(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the language model in a composite one; others as they are."""
    composite = COMPOSITES.get(hf.get("model_type", ""))
    if composite is None:
        return hf
    text = hf.get(composite.key) or {}
    _refuse(text, composite.refuses, hf["model_type"])
    ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "architectures") if key in hf}
    return {**text, **ids, "model_type": composite.family}


def _refuse(hf: Mapping[str, Any], refuses: Mapping[str, Any], name: str) -> None:
    for key, only in refuses.items():
        if hf.get(key) not in (None, only):
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported for {name}; only {only!r} is")


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """The rope of the layers that have one."""
    return next((write_rope(rope) for rope in config.layer_ropes if rope is not None), {})


def _part(config: ModelConfig, index: int, sizes: tuple, per_head: bool = False) -> Part:
    return Part(index, tuple(getattr(config, size) if isinstance(size, str) else size for size in sizes), per_head)


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
        return config.mlp_bias and (config.gated_mlp or "mlp/gate" not in leaf)
    if leaf.endswith(("query_norm/scale", "key_norm/scale")):
        return config.qk_norm
    if leaf.startswith("block/mlp_norm/"):
        return not config.shared_norm
    return config.gated_mlp or "mlp/gate" not in leaf


def _token_ids(hf: Mapping[str, Any]) -> dict[str, Any]:
    eos = hf.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return {"bos_id": hf.get("bos_token_id"), "eos_ids": eos_ids, "pad_id": hf.get("pad_token_id")}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        keys={**LLAMA_KEYS, "qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        defaults={**LLAMA_DEFAULTS, "qkv_bias": False, "mlp_bias": False},
        fixed={"rope": read_rope(10000.0), "output_bias": lambda hf: bool(hf.get("attention_bias"))},
        names=LLAMA_NAMES,
        checkpoints=(
            "meta-llama/Llama-3.2-1B-Instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "tiiuae/Falcon3-1B-Instruct",
        ),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        classifier="MistralForSequenceClassification",
        keys=LLAMA_KEYS,
        defaults={**LLAMA_DEFAULTS, "num_kv_heads": 8},
        fixed={"rope": read_rope(10000.0)},
        windows=all_windowed(None),
        write=lambda config: {"sliding_window": config.windows[0]},
        names=LLAMA_NAMES,
        checkpoints=("mistralai/Mistral-7B-Instruct-v0.3",),
        features="windows",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        classifier="Qwen2ForSequenceClassification",
        keys={ours: theirs for ours, theirs in LLAMA_KEYS.items() if ours != "head_dim"},
        defaults=LLAMA_DEFAULTS,
        fixed={
            "head_dim": lambda hf: hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            "rope": read_rope(10000.0),
            "qkv_bias": True,
        },
        windows=late_windowed,
        write=write_late_windows,
        names=LLAMA_NAMES,
        checkpoints=("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        features="biases of query, key and value; windows in late layers",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        classifier="Qwen3ForSequenceClassification",
        keys={**LLAMA_KEYS, "qkv_bias": "attention_bias"},
        defaults={**LLAMA_DEFAULTS, "head_dim": 128, "qkv_bias": False},
        fixed={
            "rope": read_rope(10000.0),
            "qk_norm": True,
            "output_bias": lambda hf: bool(hf.get("attention_bias")),
        },
        windows=late_windowed,
        write=write_late_windows,
        names=LLAMA_NAMES,
        checkpoints=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
        features="QK norm, windows in late layers",
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
        names=GPT2_NAMES,
        activations={"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"},
        checkpoints=("openai-community/gpt2", "distilbert/distilgpt2"),
        features="learned positions, layer norms, biases, fused QKV",
    ),
    **DENSE_FAMILIES,
    **SPARSE_FAMILIES,
}
