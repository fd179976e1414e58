"""GGUF files as checkpoints under Hugging Face's names: config from the metadata, tensors dequantised slice by slice.

Facts of the format are llama.cpp's (its `convert_hf_to_gguf.py` writes what is undone here): linear weights are
`[out, in]` for every family, the rows of llama's query and key projections are reordered for a rotary embedding of
neighbouring pairs, and Llama 3.1's rope scaling is a tensor of factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, get_tensor_name_map
from gguf.quants import dequantize

from jaxalign.models.config import Rope
from jaxalign.models.families import FAMILIES
from jaxalign.models.rope import rope_frequencies
from jaxalign.models.tensors import Index

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
# The architectures, by llama.cpp's name; mistral's files say llama.
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gpt2": MODEL_ARCH.GPT2,
}
LLAMA_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
GPT2_KEYS = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file as a `Source`.

    Attributes:
      path: the file.
      metadata: its keys and values; arrays are lists.
      config: the config.json that Hugging Face would have for it.
      shapes: shape of each tensor by Hugging Face's name, in Hugging Face's order of axes; tensors that have no such
        name keep llama.cpp's.
      stored: where each of them lies in the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, ReaderTensor]

    def file(self, name: str) -> str:
        """The file."""
        return str(self.path)

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of one tensor, dequantised to float32; whole rows of it are read."""
        transposed = _is_transposed(name)
        index = index[::-1] if transposed else index
        heads = _reordered_heads(name, self.config) if self.metadata["general.architecture"] == "llama" else 0
        rows = self._rows(name, slice(None) if heads else index[0])
        values = (_restore_order(rows, heads)[index[0]] if heads else rows)[(slice(None), *index[1:])]
        return values.T if transposed else values

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        tensor = self.stored[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        total = shape[0] if len(shape) == 2 else 1
        wanted = range(total)[rows] if len(shape) == 2 else range(1)
        width = tensor.n_bytes // total
        # Read, not mapped: the pages of a mapped file would pile up beside the arrays.
        offset = int(tensor.data_offset) + wanted.start * width
        raw = np.fromfile(self.path, np.uint8, count=len(wanted) * width, offset=offset)
        values = dequantize(raw.reshape(len(wanted), width), tensor.tensor_type)
        return values if len(shape) == 2 else values.reshape(shape)[rows]


def open_gguf(path: str | Path) -> GgufFile:
    """Reads a GGUF file's metadata and the table of its tensors.

    Raises:
      ValueError: no whole GGUF file; an architecture, a type of tensor or a setting that is not supported.
    """
    path = Path(path)
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    metadata = {key: _plain(field.contents()) for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not read from GGUF files (known: {', '.join(ARCHITECTURES)}); "
            "give the model's Hugging Face folder or Hub name instead"
        )
    if metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {metadata['split.count']} parts; merge them with llama.cpp's gguf-split first"
        )
    if reader.byte_order != "I":
        raise ValueError(f"{path} was written for machines of the other byte order")
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in TYPES:
            raise ValueError(
                f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}; supported types: "
                f"{', '.join(TYPES)}; take a file in one of these, or the model's Hugging Face folder"
            )
        if tensor.data_offset + tensor.n_bytes > path.stat().st_size:
            raise ValueError(f"{path} is not a whole GGUF file: it ends before the end of tensor {tensor.name}")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, metadata, by_name)
    hf_names = _hf_names(architecture, metadata[f"{architecture}.block_count"])
    dropped = {"rope_freqs.weight"} | ({"output.weight"} if config["tie_word_embeddings"] else set())
    stored = {hf_names.get(name, name): tensor for name, tensor in by_name.items() if name not in dropped}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in stored.items()}
    shapes = {name: shape[::-1] if _is_transposed(name) else shape for name, shape in shapes.items()}
    return GgufFile(path, metadata, config, shapes, stored)


def _plain(value: Any) -> Any:
    """Floats are float32 in the file: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _hf_names(architecture: str, layers: int) -> dict[str, str]:
    """llama.cpp's name of every tensor of the family -> Hugging Face's."""
    names = get_tensor_name_map(ARCHITECTURES[architecture], layers)
    found = {}
    for template, *_ in FAMILIES[architecture].names.values():
        for layer in range(layers if "{}" in template else 1):
            name = template.format(layer)
            known = names.get_name(name, (".weight", ".bias"))
            if known is not None:
                found[known] = name
    return found


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    architecture = metadata["general.architecture"]

    def key(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if isinstance(value, list):
            raise ValueError(f"{path}: {architecture}.{name} differs between layers, which is not supported")
        return value

    if key("expert_count", 0):
        raise ValueError(f"{path}: mixture-of-experts models are not supported ({architecture}.expert_count)")
    config: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": _is_tied(architecture, tensors),
    }
    names = GPT2_KEYS if architecture == "gpt2" else LLAMA_KEYS
    for theirs, name in names.items():
        config[theirs] = key(name)
        if config[theirs] is None:
            raise ValueError(f"{path}: the metadata lacks {architecture}.{name}")
    return config if architecture == "gpt2" else config | _attention_config(path, config, key, tensors)


def _attention_config(
    path: Path, config: Mapping[str, Any], key: Callable, tensors: Mapping[str, ReaderTensor]
) -> dict[str, Any]:
    """What the llama-like architectures have beyond `LLAMA_KEYS`."""
    heads = config["num_attention_heads"]
    head_dim = key("attention.key_length", key("rope.dimension_count", config["hidden_size"] // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if key(name, head_dim) != head_dim:
            raise ValueError(f"{path}: {name}={key(name)} differs from the head's {head_dim}, which is not supported")
    more = {
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    window = key("attention.sliding_window")
    if window is not None:
        if config["model_type"] != "llama":
            raise ValueError(f"{path}: a sliding window is not supported for {config['model_type']} in GGUF files")
        more |= {"model_type": "mistral", "sliding_window": window}
    rope = {"rope_theta": key("rope.freq_base", 10000.0), "rope_type": key("rope.scaling.type", "none")}
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    else:
        rope["factor"] = key("rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in tensors:
        factors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
        rope |= _llama3_scaling(path, factors, rope["rope_theta"], head_dim)
    return {**more, "rope_parameters": rope}


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3.1's rope scaling from its factors, one for each pair of dimensions.

    Between the two bounds, (1 / factors - 1 / F) / (1 - 1 / F) = a x - b with F the largest factor, x turns per token,
    a = original / (high - low), b = low / (high - low): a line. It fixes the three parameters up to a common
    multiple, which changes no frequency; low = 1 is taken, as in every released model.

    Raises:
      ValueError: no such parameters give the factors back.
    """
    largest = float(factors.max())
    if largest <= 1 + 1e-6:
        return {}
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    blend = (1 / factors.astype(np.float64) - 1 / largest) / (1 - 1 / largest)
    between = (blend > 1e-4) & (blend < 1 - 1e-4)
    candidates = [(8192, 4.0)]
    if between.sum() >= 2:
        slope, offset = np.polyfit(turns[between], blend[between], 1)
        candidates.insert(0, (round(-slope / offset), round(1 - 1 / offset, 4)))
    for original, high in candidates:
        rope = Rope(theta, "llama3", largest, 1.0, high, original)
        frequencies = np.asarray(rope_frequencies(rope, head_dim), np.float64)
        if np.allclose(frequencies * factors, 2 * math.pi * turns, rtol=1e-4, atol=0):
            scaling = {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0, "high_freq_factor": high}
            return {**scaling, "original_max_position_embeddings": original}
    raise ValueError(f"{path}: the factors in rope_freqs.weight are not those of Llama 3.1's rope scaling")


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a completion: of the text, of a turn, of a message."""
    names = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    return list(dict.fromkeys(metadata[name] for name in names if name in metadata))


def _is_tied(architecture: str, tensors: Mapping[str, ReaderTensor]) -> bool:
    """No output tensor means a tied head. GPT-2's head is tied, but its files repeat the table as the output tensor."""
    if "output.weight" not in tensors:
        return True
    head, table = tensors["output.weight"], tensors["token_embd.weight"]
    same = head.tensor_type == table.tensor_type and np.array_equal(head.data, table.data)
    return architecture == "gpt2" and same


def _is_transposed(name: str) -> bool:
    """GPT-2's linear layers are `[in, out]` at Hugging Face and `[out, in]` in GGUF."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _reordered_heads(name: str, config: Mapping[str, Any]) -> int:
    """How many heads' rows llama.cpp reordered in this tensor; 0 = it did not."""
    if ".q_proj." in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if ".k_proj." in name else 0


def _restore_order(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows 2i and 2i + 1 of a head, Hugging Face rows i and i + head_dim / 2."""
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
