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

from jaxalign.models.families import Tensor

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
    if tensor.layout == "linear":
        sizes.reverse()
    if tensor.part:
        sizes[-1] *= tensor.part[1]
    return tuple(sizes)


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
    if tensor.layout == "linear":
        ranges.reverse()
    if tensor.part:
        offset = tensor.part[0] * math.prod(groups[-1])
        ranges[-1] = slice(ranges[-1].start + offset, ranges[-1].stop + offset)
    matrix = source.read(tensor.name, tuple(ranges))
    matrix = matrix.T if tensor.layout == "linear" else matrix
    folded = [size for group, n in zip(groups, matrix.shape, strict=True) for size in _unfold(group, n)]
    return matrix.reshape(folded)[tuple(inner)]


def join(parts: Iterable[tuple[Tensor, np.ndarray]]) -> np.ndarray:
    """The inverse of `read`: a checkpoint's tensor from its leaves (one repeat of each; several where it is split)."""
    matrices = []
    for tensor, leaf in sorted(parts, key=lambda pair: pair[0].part or (0, 1)):
        matrix = leaf.reshape([math.prod(group) for group in _groups(tensor.path, leaf.shape)])
        matrices.append(matrix.T if tensor.layout == "linear" else matrix)
    return matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=-1)


def _groups(path: tuple[str, ...], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """How the leaf's axes fold into the matrix's: inputs and outputs for a kernel, all outputs for a bias."""
    shape = tuple(shape)
    if path[-1] == "kernel":
        inputs = 2 if path[-2] == "output" else 1
        return [shape[:inputs], shape[inputs:]]
    return [shape] if path[-1] == "bias" else [(size,) for size in shape]


def _unfold(group: tuple[int, ...], size: int) -> tuple[int, ...]:
    return (size // math.prod(group[1:]), *group[1:])
