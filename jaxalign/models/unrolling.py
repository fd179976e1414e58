"""Parameters as other than training wants them: every layer by itself, or only what lies outside the layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.config import ModelConfig, segments
from jaxalign.models.freezing import whole
from jaxalign.models.lora import expand, merge_tree
from jaxalign.types import Variables


def repeat_name(segment: int, repeat: int) -> str:
    """Name of one repeat of a segment among unrolled parameters."""
    return f"segment_{segment}_{repeat}"


def outside_segments(variables: Variables) -> Any:
    """The parameters outside the segments, with those that are frozen."""
    apart = {name: tree for name, tree in variables.items() if name in ("params", "frozen")}
    outside = {
        kind: {name: part for name, part in tree.items() if not name.startswith("segment_")}
        for kind, tree in apart.items()
    }
    return whole(outside)["params"]


def unroll(config: ModelConfig, dtype: jnp.dtype, variables: Variables) -> Variables:
    """The layers of each segment apart, in the dtype of computation; norms, which compute wider, stay as they are.

    An adapter is merged into the weights, which costs one pass over them instead of two products more for each token.
    Only what is quantised stays so, with its adapter beside it.
    """

    def cast_leaf(path, x):
        kept = path[-1].key in ("scale", "values", "scales") or any(part.key == "score" for part in path[:-1])
        return x if kept else x.astype(dtype)

    plain = expand(whole(variables))
    apart = {kind: dict(plain[kind]) for kind in ("params", "lora") if kind in plain}
    for tree in apart.values():
        for index, segment in enumerate(segments(config)):
            stacked = tree.pop(f"segment_{index}", {})
            for repeat in range(segment.repeats):
                tree[repeat_name(index, repeat)] = jax.tree.map(lambda x, repeat=repeat: x[repeat], stacked)
    params, left = merge_tree(config, apart["params"], apart.get("lora", {}), quantized=False)
    found = {**plain, "params": params, **({"lora": left} if "lora" in plain else {})}
    return jax.tree.map_with_path(cast_leaf, {name: tree for name, tree in found.items() if tree})
