"""The parts of a config.json that take more than a key: rope, and which layers see only a window."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jaxalign.models.config import ModelConfig, Rope

KINDS = ("default", "linear", "llama3")


def read_rope(
    default_theta: float,
    *,
    kinds: tuple[str, ...] = KINDS,
    theta_key: str = "rope_theta",
    partial: float | None = None,
    partial_key: str = "partial_rotary_factor",
    interleaved: bool = False,
) -> Callable[[Mapping], Rope]:
    """Reads the rope from a config.json; the reader raises ValueError on a kind that we do not compute.

    Args:
      default_theta: where the config.json has none.
      kinds: that transformers computes for this family.
      theta_key: its name before transformers 5.
      partial: the part of a head that is rotated where the config.json does not say; None: the family rotates all.
      partial_key: its name before transformers 5.
      interleaved: see `Rope`.
    """

    def read(hf: Mapping[str, Any]) -> Rope:
        # transformers 5 keeps everything in rope_parameters, version 4 in rope_theta and rope_scaling.
        rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        theta = float(rope.get("rope_theta") or hf.get(theta_key) or default_theta)
        part = rope.get("partial_rotary_factor", hf.get(partial_key))
        if partial is None and part not in (None, 1.0):
            raise ValueError("config.json: partial_rotary_factor other than 1.0 is not supported")
        part = partial if part is None else part
        return scaled_rope(hf, rope, Rope(theta, partial=float(part or 1.0), interleaved=interleaved), kinds)

    return read


def scaled_rope(hf: Mapping[str, Any], rope: Mapping[str, Any], base: Rope, kinds: tuple[str, ...] = KINDS) -> Rope:
    """A rope scaled as an entry of a config.json says.

    Args:
      hf: the config.json.
      rope: the entry: the kind and its parameters.
      base: without scaling.
      kinds: that are known.

    Raises:
      ValueError: another kind, or a parameter that is missing.
    """
    kind = rope.get("rope_type", rope.get("type", "default")) or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in kinds:
        raise ValueError(f"config.json: rope type {kind!r} is not supported; known: {', '.join(kinds)}")
    if kind == "default":
        return base
    if kind == "linear":
        return replace(base, kind="linear", factor=float(rope["factor"]))
    sources = (hf, rope) if kind == "longrope" else (rope, hf)
    original = next((each[key] for each in sources if each.get(key := "original_max_position_embeddings")), None)
    if original is None:
        raise ValueError(f"config.json: rope type {kind!r} needs original_max_position_embeddings")
    base = replace(base, kind=kind, original_max_position=int(original))
    if kind == "longrope":
        return _longrope(hf, rope, base)
    return replace(
        base,
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
    )


def _longrope(hf: Mapping[str, Any], rope: Mapping[str, Any], base: Rope) -> Rope:
    longest, original = int(hf["max_position_embeddings"]), base.original_max_position
    factor = float(rope.get("factor") or longest / original)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return replace(
        base,
        short_factors=tuple(map(float, rope["short_factor"])),
        long_factors=tuple(map(float, rope["long_factor"])),
        max_position=longest,
        attention_factor=float(attention),
    )


def original_context(hf: Mapping[str, Any]) -> int:
    """The context that a model is read with: under longrope, the one of its short factors (see `extend_context`)."""
    longest = int(hf.get("max_position_embeddings", 4096))
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    scaled = rope.get("rope_type", rope.get("type")) in ("longrope", "su")
    return min(longest, int(hf.get("original_max_position_embeddings", longest))) if scaled else longest


def write_rope(rope: Rope, theta_key: str = "rope_theta", partial_key: str = "partial_rotary_factor") -> dict[str, Any]:
    """The keys of a config.json that `read_rope` reads, in the style of transformers 4 and 5."""
    scaling = write_scaling(rope)
    old = {theta_key: rope.theta, "rope_scaling": None if rope.kind == "default" else scaling}
    whole = {**scaling, "rope_theta": rope.theta}
    if rope.partial != 1.0:
        old[partial_key] = whole["partial_rotary_factor"] = rope.partial
    if rope.kind == "longrope":
        old |= {"original_max_position_embeddings": rope.original_max_position}
        old |= {"max_position_embeddings": rope.max_position}
    return {**old, "rope_parameters": whole}


def write_scaling(rope: Rope) -> dict[str, Any]:
    """The entry that `scaled_rope` reads."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind in ("linear", "llama3"):
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "longrope":
        scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        scaling |= {"attention_factor": rope.attention_factor}
    if rope.kind in ("llama3", "longrope"):
        scaling |= {"original_max_position_embeddings": rope.original_max_position}
    return scaling


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


def typed_windows(pattern: int, default: int | None = 4096) -> Callable[[Mapping, int], tuple[int | None, ...]]:
    """Reads windows of the layers that `layer_types` names, or else of all but each `pattern`-th layer."""

    def read(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        every = hf.get("sliding_window_pattern") or pattern
        kinds = hf.get("layer_types") or [
            "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)
        ]
        window = hf.get("sliding_window", default)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    return read


def write_typed_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `typed_windows`."""
    windowed = [window for window in config.windows if window is not None]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    return {"sliding_window": windowed[0] if windowed else None, "layer_types": kinds}


def windows_without_rope(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Reads windows as SmolLM3 has them: none, or in the layers without rotary embedding."""
    ropes = rope_flags(hf, layers)
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types") or ["full_attention" if rope else "sliding_attention" for rope in ropes]
    if window is None and hf.get("layer_types") and "sliding_attention" in kinds:
        raise ValueError("config.json: layer_types names sliding_attention, but use_sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rope_flags(hf: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers have a rotary embedding, as SmolLM3 says it."""
    every = hf.get("no_rope_layer_interval", 4)
    flags = hf.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in range(layers)]
    return tuple(bool(flag) for flag in flags[:layers])


def local_and_global(hf: Mapping[str, Any], windows: tuple[int | None, ...]) -> tuple[Rope, ...]:
    """Reads the ropes as Gemma 3 has them: one of the layers with a window, one (scaled) of the others."""
    new = hf.get("rope_parameters") or {}
    entries = {"full_attention": hf.get("rope_scaling") or {}, "sliding_attention": {}}
    entries = {kind: {**entry, **(new.get(kind) or {})} for kind, entry in entries.items()}
    old = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
    ropes = {}
    for kind, (key, default) in old.items():
        theta = float(entries[kind].get("rope_theta") or hf.get(key) or default)
        ropes[kind] = scaled_rope(hf, entries[kind], Rope(theta))
    return tuple(ropes["full_attention" if window is None else "sliding_attention"] for window in windows)


def write_local_and_global(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `local_and_global`, in the style of transformers 4 and 5."""
    ropes = {"full_attention": Rope(1e6), "sliding_attention": Rope(1e4)}
    for window, rope in zip(config.windows, config.layer_ropes, strict=True):
        ropes["full_attention" if window is None else "sliding_attention"] = rope or Rope()
    new = {kind: {**write_scaling(rope), "rope_theta": rope.theta} for kind, rope in ropes.items()}
    old = write_rope(ropes["full_attention"]) | {"rope_local_base_freq": ropes["sliding_attention"].theta}
    return {**old, "rope_parameters": new}
