"""Training a part of the parameters: the rest is a collection of its own, which `Model.apply` puts together again.

    {"params": all}   ->   {"params": what trains, "frozen": the rest, "rows": which layers of a stacked leaf train}

Layers are stacked, so where some layers of a leaf train and others do not, its rows are parted: `params` and `frozen`
hold some rows each, and `rows` says in which order they lie one after the other. Nothing is kept for frozen rows, no
gradient and no optimiser state; what it costs is that each pass puts such leaves together, a copy of them at a time,
and that the backward pass runs through all the layers of the scan.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign.models.config import ModelConfig
from jaxalign.models.families import tensors
from jaxalign.models.projections import at, put
from jaxalign.models.quantized import is_quantized
from jaxalign.types import Variables

# What trains fully beside an adapter, and is no part of the language model.
HEADS = ("score",)


def freeze(config: ModelConfig, variables: Variables, patterns: Sequence[str]) -> Variables:
    """Variables of which only some parameters train.

    Args:
      config: the model's.
      variables: `{"params": ...}`; the result shares the arrays of leaves that are not parted.
      patterns: of what trains: names of tensors in the family's checkpoints, with `*`, `?` and `[...]` as in file names
        (`model.embed_tokens.weight`, `model.layers.2[89].*`). A new score head is `score.weight`.

    Raises:
      ValueError: a pattern that matches no tensor (the nearest name is given), or a quantised one.
    """
    known = tensors(config)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(tensor.name, pattern) for tensor in known):
            near = difflib.get_close_matches(pattern, [tensor.name for tensor in known], 1, cutoff=0.0)
            raise ValueError(f"{pattern!r} matches no parameter of this model; the nearest is {near[0]!r}")
    chosen: dict[tuple[str, ...], list[bool]] = {}
    for tensor in sorted(known, key=lambda tensor: tensor.repeat or 0):
        found = [pattern for pattern in patterns if fnmatch.fnmatchcase(tensor.name, pattern)]
        chosen.setdefault(tensor.path, []).append(bool(found))
        if found and is_quantized(at(variables["params"], tensor.path[:-1])) and tensor.path[-1] == "kernel":
            raise ValueError(f"{found[0]!r} matches {tensor.name}, which is quantised: quantised weights cannot train")
    parts: dict[str, dict] = {"params": {}, "frozen": {}, "rows": {}}
    for path, leaf in _leaves(variables["params"]):
        trains = np.array(chosen.get(path, [False]))
        if trains.all() or not trains.any():
            put(parts["params" if trains.all() else "frozen"], path, leaf)
            continue
        order = np.argsort(np.concatenate([np.flatnonzero(~trains), np.flatnonzero(trains)]))
        put(parts["params"], path, leaf[np.flatnonzero(trains)])
        put(parts["frozen"], path, leaf[np.flatnonzero(~trains)])
        put(parts["rows"], path, jnp.asarray(order, jnp.int32))
    return {**variables, **parts}


def whole(variables: Variables) -> Variables:
    """The inverse of `freeze`: all parameters under `params`; other variables as they are."""
    if "frozen" not in variables:
        return variables
    rest = {name: tree for name, tree in variables.items() if name not in ("frozen", "rows")}
    return {**rest, "params": _join(variables["params"], variables["frozen"], variables.get("rows", {}))}


def split(variables: Variables) -> tuple[Variables, Variables]:
    """The trainable part of variables and the frozen rest, both nested alike.

    With an adapter it is the adapter, and a score head; after `freeze` what that chose; else all of `params`.
    """
    chosen = "frozen" in variables
    if "lora" not in variables or chosen:
        trained = {name: tree for name, tree in variables.items() if name in ("params", "lora")}
        return trained, {name: tree for name, tree in variables.items() if name not in trained}
    heads = {name: tree for name, tree in variables["params"].items() if name in HEADS}
    base = {name: tree for name, tree in variables["params"].items() if name not in HEADS}
    rest = {name: tree for name, tree in variables.items() if name not in ("params", "lora")}
    return {"lora": variables["lora"], **({"params": heads} if heads else {})}, {**rest, "params": base}


def join(params: Variables, frozen: Variables) -> Variables:
    """The inverse of `split`."""
    return _join(params, frozen, {})


def check_trainable(params: Variables) -> None:
    """Raises ValueError where the trainable part has quantised weights."""
    for path, _ in _leaves(params):
        if path[-1] == "scales":
            raise ValueError(
                f"{'/'.join(path[:-1])} is quantised, and quantised weights cannot train: train an adapter beside them "
                "(the section lora, models.add_lora), or leave model.quantization away"
            )


def _join(first: Any, second: Any, rows: Any) -> Any:
    if not isinstance(first, dict):
        return jnp.concatenate([second, first])[rows]
    names = dict.fromkeys([*second, *first])
    both = {name for name in names if name in first and name in second}
    return {
        name: _join(first[name], second[name], rows.get(name, {})) if name in both else {**second, **first}[name]
        for name in names
    }


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for name, part in tree.items() for leaf in _leaves(part, (*path, name))]
