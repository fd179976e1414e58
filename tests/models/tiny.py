"""Tiny checkpoints of every family, as Hugging Face folders and as GGUF files, with weights that make a difference.

Weights are normal with standard deviation 0.2 and more, norms are not 1, biases not 0, and epsilons are large: with
the usual initialisation half of a config could be misread and no logit would show it.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import save_file

from jaxalign.models.config import ModelConfig
from jaxalign.models.families import from_hf, tensors
from jaxalign.models.gguf import ARCHITECTURES
from jaxalign.models.tensors import file_shape
from jaxalign.models.transformer import build
from tests.models.dense import DENSE

LLAMA = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 3e-2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN = LLAMA | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0}}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 160,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "layer_norm_epsilon": 3e-2,
    "activation_function": "gelu_new",
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MIXTRAL = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"} | {
    "model_type": "mixtral",
    "head_dim": 24,
    "sliding_window": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
}
QWEN_MOE = QWEN | {
    "num_hidden_layers": 5,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
}

# name -> config.json
CONFIGS: dict[str, dict] = {
    "llama2": LLAMA | {"num_key_value_heads": 4},
    "llama3": LLAMA | {"eos_token_id": [2, 3]},
    "llama3.1": LLAMA | {"tie_word_embeddings": True, "head_dim": 32, "rope_parameters": LLAMA3_ROPE},
    "llama-linear": LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 16, "head_dim": 24},
    "qwen2": QWEN | {"model_type": "qwen2"},
    "qwen2-windows": QWEN
    | {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
        "tie_word_embeddings": False,
    },
    "qwen3": QWEN | {"model_type": "qwen3", "head_dim": 24},
    "qwen3-biases": QWEN | {"model_type": "qwen3", "head_dim": 24, "attention_bias": True, "hidden_act": "gelu"},
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN_MOE
    | {"model_type": "qwen3_moe", "head_dim": 24, "norm_topk_prob": True, "mlp_only_layers": [0], "hidden_act": "gelu"},
    "qwen2_moe": QWEN_MOE
    | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2},
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"n_inner": 96, "tie_word_embeddings": False, "activation_function": "gelu"},
    **DENSE,
}


def arrays(hf: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors under Hugging Face's names, in its shapes."""
    config, rng = from_hf(hf), np.random.default_rng(seed)
    shapes = leaf_shapes(config)
    found = {}
    for tensor in tensors(config):
        shape = file_shape(tensor, shapes[tensor.path][len(tensor.place) :])
        mean = 1.0 if tensor.path[-1] == "scale" else 0.0
        found[tensor.name] = (mean + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    return found


def leaf_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every leaf of the model's parameters by its path."""
    params = jax.eval_shape(build(config).init, jax.random.key(0))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def write_folder(folder: Path, hf: dict, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """A Hugging Face folder with one safetensors file; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    content = {name: array.astype(kinds[dtype]) for name, array in arrays(hf, seed).items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return content


def write_gguf(
    path: Path, hf: dict, content: dict[str, np.ndarray], kind: str = "F32", extra: dict | None = None
) -> dict[str, np.ndarray]:
    """A GGUF file with these tensors, as llama.cpp writes it; returns them as they are after quantisation.

    Args:
      path: the file.
      hf: config.json; its family must be an architecture of llama.cpp.
      content: float32 tensors under Hugging Face's names.
      kind: type of the matrices, norms and biases stay F32.
      extra: further metadata.
    """
    architecture = hf["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_metadata(hf), **(extra or {})}.items():
        _add(writer, key, value)
    config = from_hf(hf)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_layers)
    quantised = {}
    for name, array in content.items():
        known = names.get_name(name, (".weight", ".bias"))
        assert known is not None, name
        stored, restore = _as_stored(name, array, config)
        number = gguf.GGMLQuantizationType[kind if stored.ndim == 2 and "wpe" not in name else "F32"]
        raw = quantize(np.ascontiguousarray(stored), number)
        writer.add_tensor(known, raw, raw_dtype=number)
        quantised[name] = restore(gguf.quants.dequantize(raw, number).reshape(stored.shape))
    if config.rope is not None and config.rope.kind == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(hf["rope_parameters"], config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantised


def rope_factors(rope: dict, head_dim: int) -> np.ndarray:
    """Llama 3.1's divisors of the rotary frequencies, from the definition: by wavelength, one at a time."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        blended = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wavelength < original / high else factor if wavelength > original / low else blended)
    return np.array(found, np.float32)


def _as_stored(name: str, array: np.ndarray, config: ModelConfig):
    """llama.cpp's layout of a tensor and the way back, written as llama.cpp's converter writes it."""
    if config.family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return array.T, lambda stored: stored.T
    if config.family == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_heads if ".q_proj." in name else config.num_kv_heads
        half = array.shape[0] // heads // 2
        order = np.arange(array.shape[0]).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)
        return array[order], lambda stored: stored[np.argsort(order)]
    return array, lambda stored: stored


def _metadata(hf: dict) -> dict:
    config, family = from_hf(hf), hf["model_type"]
    found: dict = {
        f"{family}.block_count": config.num_layers,
        f"{family}.context_length": config.max_position,
        f"{family}.embedding_length": config.embed_dim,
        f"{family}.feed_forward_length": config.mlp_dim,
        f"{family}.attention.head_count": config.num_heads,
        "tokenizer.ggml.bos_token_id": config.bos_id,
        "tokenizer.ggml.eos_token_id": config.eos_ids[0],
    }
    if family == "gpt2":
        return found | {"gpt2.attention.layer_norm_epsilon": config.norm_eps}
    assert config.rope is not None
    found |= {
        f"{family}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{family}.attention.head_count_kv": config.num_kv_heads,
        f"{family}.attention.key_length": config.head_dim,
        f"{family}.attention.value_length": config.head_dim,
        f"{family}.rope.dimension_count": config.head_dim,
        f"{family}.rope.freq_base": config.rope.theta,
    }
    if config.rope.kind == "linear":
        found |= {f"{family}.rope.scaling.type": "linear", f"{family}.rope.scaling.factor": config.rope.factor}
    return found


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
