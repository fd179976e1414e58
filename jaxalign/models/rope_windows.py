"""The parts of a config.json that take more than a key: rope, and which layers see only a window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.models.config import ModelConfig, Rope


def read_rope(default_theta: float) -> Callable[[Mapping], Rope]:
    """Reads the rope from a config.json; the reader raises ValueError on a kind that we do not compute."""

    def read(hf: Mapping[str, Any]) -> Rope:
        # transformers 5 keeps everything in rope_parameters, version 4 in rope_theta and rope_scaling.
        rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default")) or "default"
        theta = float(rope.get("rope_theta") or hf.get("rope_theta") or default_theta)
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"config.json: rope type {kind!r} is not supported; known: default, linear, llama3")
        if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
            raise ValueError("config.json: partial_rotary_factor other than 1.0 is not supported")
        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, "linear", float(rope["factor"]))
        original = rope.get("original_max_position_embeddings", hf.get("original_max_position_embeddings"))
        if original is None:
            raise ValueError("config.json: rope type 'llama3' needs original_max_position_embeddings")
        return Rope(
            theta,
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(original),
        )

    return read


def write_rope(rope: Rope) -> dict[str, Any]:
    """The keys of a config.json that `read_rope` reads, in the style of transformers 4 and 5."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        scaling |= {"original_max_position_embeddings": rope.original_max_position}
    old = {"rope_theta": rope.theta, "rope_scaling": None if rope.kind == "default" else scaling}
    return {**old, "rope_parameters": {**scaling, "rope_theta": rope.theta}}


def all_windowed(default: int | None) -> Callable[[Mapping, int], tuple[int | None, ...]]:
    """Reads one window for every layer."""
    return lambda hf, layers: (hf.get("sliding_window", default),) * layers


def late_windowed(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Reads windows as Qwen has them: switched on, in the layers that `layer_types` names, or else in the late ones."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    if window is None:
        return (None,) * layers
    kinds = hf.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = hf.get("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(layers))


def write_late_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `late_windowed`."""
    windowed = [window for window in config.windows if window is not None]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    return {
        "use_sliding_window": bool(windowed),
        "sliding_window": windowed[0] if windowed else None,
        "max_window_layers": kinds.index("sliding_attention") if windowed else config.num_layers,
        "layer_types": kinds,
    }
