"""Trees in a form that can be written to disk and read back: nested names, or a JSON skeleton with arrays beside it."""

from __future__ import annotations

import base64
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxalign.types import PyTree

KEY_KINDS = ("threefry2x32", "rbg", "unsafe_rbg")


def to_names(tree: PyTree, *, abstract: bool = False) -> dict:
    """Nested dicts of a tree's leaves, by the names on their paths; typed keys become their uint32 data.

    Args:
      tree: arrays; with `abstract`, `jax.ShapeDtypeStruct`s are allowed too.
      abstract: give `jax.ShapeDtypeStruct`s, on the leaf's sharding (else the first device).

    Returns:
      The same dict for a dataclass, a dict or a named tuple of the same field names.
    """
    names: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *folders, last = _parts(path)
        place = names
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = _abstract(leaf) if abstract else _data(leaf)
    return names


def from_names(names: dict, like: PyTree) -> PyTree:
    """The inverse of `to_names`, in the structure of `like`."""

    def find(path: tuple, leaf: Any) -> jax.Array:
        found: Any = names
        for part in _parts(path):
            found = found[part]
        return jax.random.wrap_key_data(found, impl=_key_kind(leaf)) if _is_key(leaf) else found

    return jax.tree_util.tree_map_with_path(find, like)


def check_fits(wanted: dict, saved: dict, where: object) -> None:
    """Raises a ValueError that names the first leaf that was not saved, or not with this shape and dtype.

    Args:
      wanted: nested names of leaves with `shape` and `dtype`; top-level names may be fewer than saved.
      saved: the same of what was saved.
      where: named in the error.
    """
    there = _flat({name: saved[name] for name in wanted if name in saved})
    for name, leaf in _flat(wanted).items():
        if name not in there:
            raise ValueError(f"{where} does not fit this run: it has no {name}")
        kept = there.pop(name)
        if tuple(kept.shape) != tuple(leaf.shape) or np.dtype(kept.dtype) != np.dtype(leaf.dtype):
            found, needed = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (kept, leaf))
            raise ValueError(f"{where} does not fit this run: {name} is {found} there, {needed} here")
    if there:
        raise ValueError(f"{where} does not fit this run: it has {next(iter(there))}, which the run has not")


def pack(tree: Any) -> tuple[Any, dict[str, Any]]:
    """Splits a tree into a JSON skeleton and its arrays.

    Args:
      tree: dicts with string keys, lists, tuples, None, bool, int, float, str, bytes, numpy arrays and numbers, and
        arrays on devices (typed keys too).

    Returns:
      The skeleton, exact for Python's numbers; and the arrays by number. numpy's are copied.

    Raises:
      ValueError: something else is in the tree; names where.
    """
    arrays: dict[str, Any] = {}
    return _pack(tree, arrays, "state"), arrays


def unpack(skeleton: Any, arrays: dict[str, Any]) -> Any:
    """The inverse of `pack`."""
    (kind, value), *rest = skeleton.items()
    if kind == "dict":
        return {name: unpack(part, arrays) for name, part in value.items()}
    if kind in ("list", "tuple"):
        parts = [unpack(part, arrays) for part in value]
        return parts if kind == "list" else tuple(parts)
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "key":
        return jax.random.wrap_key_data(arrays[value], impl=dict(rest)["impl"])
    if kind == "empty":
        return np.empty(value, dict(rest)["dtype"])
    if kind == "number":
        return np.asarray(arrays[value])[()]
    return arrays[value] if kind == "array" else value


def everywhere() -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())


def _pack(tree: Any, arrays: dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(tree, dict):
        if wrong := [name for name in tree if not isinstance(name, str)]:
            raise ValueError(f"{where}: dict keys must be strings to be saved, got {wrong[0]!r}")
        return {"dict": {name: _pack(part, arrays, f"{where}[{name!r}]") for name, part in tree.items()}}
    if type(tree) in (list, tuple):
        parts = [_pack(part, arrays, f"{where}[{i}]") for i, part in enumerate(tree)]
        return {type(tree).__name__: parts}
    if tree is None or type(tree) in (bool, int, float, str):
        return {"value": tree}
    if isinstance(tree, bytes):
        return {"bytes": base64.b64encode(tree).decode()}
    if isinstance(tree, np.ndarray | np.generic | jax.Array):
        return _pack_array(tree, arrays, where)
    raise ValueError(f"{where}: a {type(tree).__name__} cannot be saved; use dicts, lists, tuples, numbers and arrays")


def _pack_array(array: Any, arrays: dict[str, Any], where: str) -> dict[str, Any]:
    number = str(len(arrays))
    if _is_key(array):
        arrays[number] = jax.random.key_data(array)
        return {"key": number, "impl": str(jax.random.key_impl(array))}
    if array.dtype.kind in "OSUMm":
        raise ValueError(f"{where}: an array of {array.dtype} cannot be saved; use a list")
    if array.size == 0:
        return {"empty": list(array.shape), "dtype": array.dtype.name}
    arrays[number] = array if isinstance(array, jax.Array) else np.array(array)
    return {"number" if isinstance(array, np.generic) else "array": number}


def _parts(path: tuple) -> list[str]:
    return [jax.tree_util.keystr((part,), simple=True) for part in path]


def _flat(names: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in names.items():
        flat |= _flat(part, f"{prefix}{name}/") if isinstance(part, dict) else {f"{prefix}{name}": part}
    return flat


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_kind(leaf: Any) -> str:
    return next(kind for kind in KEY_KINDS if jax.random.key_dtype(kind) == leaf.dtype)


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    shape = jax.eval_shape(_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    sharding = None if isinstance(leaf, np.ndarray) else leaf.sharding
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
