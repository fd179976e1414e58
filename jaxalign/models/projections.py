"""The blocks' dense projections: where they lie among the parameters, and which of their axes are inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Module -> projection -> how many of its kernel's axes are inputs, and how many outputs.
PROJECTIONS: dict[str, dict[str, tuple[int, int]]] = {
    "attention": {"query": (1, 2), "key": (1, 2), "value": (1, 2), "output": (2, 1)},
    "mlp": {"gate": (1, 1), "up": (1, 1), "down": (1, 1)},
}


def is_projection(path: tuple[str, ...]) -> bool:
    """Whether a path (`segment_0/block_0/attention/query`) is a projection's."""
    return len(path) > 2 and path[-1] in PROJECTIONS.get(path[-2], ())


def axes_of(path: tuple[str, ...]) -> tuple[int, int]:
    """How many axes of a projection's kernel are inputs and outputs; a stacked one has another before them."""
    return PROJECTIONS[path[-2]][path[-1]]


def projections(params: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Path and leaves of every projection among parameters."""
    for name, part in params.items():
        if is_projection((*path, name)):
            yield (*path, name), part
        elif isinstance(part, Mapping):
            yield from projections(part, (*path, name))


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """What lies at a path; an empty dict where there is nothing."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def put(tree: dict, path: tuple[str, ...], value: Any) -> None:
    """Puts a value at a path, in place."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def copy_tree(tree: Any) -> Any:
    """New dicts around the same leaves."""
    return {name: copy_tree(part) for name, part in tree.items()} if isinstance(tree, Mapping) else tree
