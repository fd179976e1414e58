"""Between the tensors of a checkpoint and the leaves of `variables["params"]`, one slice at a time.

A leaf's axes fold into the axes of a matrix (a query kernel `[embed, heads, head_dim]` into
`[embed, heads * head_dim]`); a checkpoint stores that matrix, or its transpose, or it beside others (GPT-2's query, key
and value in one tensor).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxalign.models.family import Part, Tensor

Index = tuple[slice, ...]


class Source(Protocol):
    """A checkpoint on disk under Hugging Face's tensor names."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        ...

    def file(self, name: str) -> str:
        """The file that holds the tensor."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of one tensor, one `slice` per axis; only this much is read."""
        ...


def file_shape(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape in the checkpoint of the tensor behind a leaf of `shape` (one repeat of it)."""
    sizes = [math.prod(group) for group in _groups(tensor.path, shape)]
    if tensor.part:
        sizes[-1] = sizes[-1] // tensor.part.sizes[tensor.part.index] * sum(tensor.part.sizes)
    return tuple(reversed(sizes) if tensor.layout == "linear" else sizes)


def read(source: Source, tensor: Tensor, shape: Sequence[int], index: Index) -> np.ndarray:
    """One slice of (one repeat of) a leaf, in the checkpoint's dtype.

    Args:
      source: the checkpoint; it must hold the tensor in `file_shape(tensor, shape)`.
      tensor: what to read.
      shape: the leaf's shape, without its stacked axis.
      index: one slice per axis of `shape`.
    """
    groups = _groups(tensor.path, shape)
    ranges, inner, axis = [], [], 0
    for group in groups:
        first = index[axis]
        step = math.prod(group[1:])
        start, stop, _ = first.indices(group[0])
        ranges.append(slice(start * step, stop * step))
        inner += [slice(None), *index[axis + 1 : axis + len(group)]]
        axis += len(group)
    part = tensor.part
    if part:
        ranges[-1] = _part_range(part, groups[-1], ranges[-1])
    if tensor.layout == "linear":
        ranges.reverse()
    matrix = source.read(tensor.name, tuple(ranges))
    matrix = matrix.T if tensor.layout == "linear" else matrix
    if part and part.per_head:
        by_head = matrix.reshape(*matrix.shape[:-1], -1, sum(part.sizes), groups[-1][-1])
        matrix = by_head[..., part.index, :].reshape(*matrix.shape[:-1], -1)
    folded = [size for group, n in zip(groups, matrix.shape, strict=True) for size in _unfold(group, n)]
    return matrix.reshape(folded)[tuple(inner)]


def join(parts: Iterable[tuple[Tensor, np.ndarray]]) -> np.ndarray:
    """The inverse of `read`: a checkpoint's tensor from its leaves (one repeat of each; several where it is split)."""
    parts = sorted(parts, key=lambda pair: pair[0].part.index if pair[0].part else 0)
    matrices = [leaf.reshape([math.prod(group) for group in _groups(each.path, leaf.shape)]) for each, leaf in parts]
    tensor, leaf = parts[0]
    if tensor.part and tensor.part.per_head:
        by_head = [matrix.reshape(*matrix.shape[:-1], -1, 1, leaf.shape[-1]) for matrix in matrices]
        joined = np.concatenate(by_head, axis=-2).reshape(*matrices[0].shape[:-1], -1)
    else:
        joined = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=-1)
    return joined.T if tensor.layout == "linear" else joined


def _part_range(part: Part, group: tuple[int, ...], wanted: slice) -> slice:
    """Where in the tensor's output axis a range of a leaf's output axis lies; all of its heads' parts if `per_head`."""
    if part.per_head:
        return slice(wanted.start * sum(part.sizes), wanted.stop * sum(part.sizes))
    offset = math.prod(group) // part.sizes[part.index] * sum(part.sizes[: part.index])
    return slice(wanted.start + offset, wanted.stop + offset)


def _groups(path: tuple[str, ...], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """How the leaf's axes fold into the matrix's: inputs and outputs for a kernel, all outputs for a bias."""
    shape = tuple(shape)
    if path[-1] == "kernel":
        inputs = 2 if path[-2] == "output" else 1
        return [shape[:inputs], shape[inputs:]]
    return [shape] if path[-1] == "bias" else [(size,) for size in shape]


def _unfold(group: tuple[int, ...], size: int) -> tuple[int, ...]:
    return (size // math.prod(group[1:]), *group[1:])
