"""Which row and which micro-batch takes what: from sizes alone, so that processes agree on it without talking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Predictions per row are rounded up to multiples of it.
PREDICTIONS_MULTIPLE = 32


@dataclass(frozen=True)
class Piece:
    """What is placed in a row without being split, and what it asks for.

    Attributes:
      size: tokens in the row; the last token of a completion is only a target, so it takes no place, save where it is
        read.
      predictions: targets.
      completions: how many there are in it.
    """

    size: int
    predictions: int
    completions: int = 1


def bucket(n: int, multiple: int = 1) -> int:
    """The smallest allowed count >= n: in steps of an eighth of the power of two below, so that few shapes compile."""
    units = -(-max(n, 1) // multiple)
    step = max(1, 1 << max(0, (units - 1).bit_length() - 4))
    return -(-units // step) * step * multiple


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """First-fit decreasing: indices of `sizes` per row; equal sizes keep their order."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, space in enumerate(free) if space >= sizes[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(length)
        rows[row].append(index)
        free[row] -= sizes[index]
    return rows


def place(pieces: Sequence[Piece], length: int) -> list[list[int]]:
    """Indices of `pieces` per row: as few rows as `first_fit` takes, their predictions as even as can be had.

    Every row has room for as many predictions as the row with most. So each piece, the longest first, goes to the row
    with the fewest predictions of those that have space; where that ends with a piece that no row takes, `first_fit`
    stands.
    """
    sizes = [piece.size for piece in pieces]
    packed = first_fit(sizes, length)
    rows: list[list[int]] = [[] for _ in packed]
    free, asked = [length] * len(packed), [0] * len(packed)
    for index in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        fitting = [row for row, space in enumerate(free) if space >= sizes[index]]
        if not fitting:
            return packed
        row = min(fitting, key=asked.__getitem__)
        rows[row].append(index)
        free[row] -= sizes[index]
        asked[row] += pieces[index].predictions
    return rows


def share_out(pieces: Sequence[Sequence[Piece]], micro_batches: int, micro_batch_size: int) -> list[int]:
    """For each document of a global batch its place there, such that micro-batches have about as many tokens each.

    Every micro-batch takes as many rows as the one that needs most. So each document, the longest first, goes to the
    micro-batch with the fewest tokens, then predictions, of those that have a place left.

    Raises:
      ValueError: there are more documents than places.
    """
    if len(pieces) > micro_batches * micro_batch_size:
        raise ValueError(f"{len(pieces)} examples do not fit {micro_batches} micro-batches of {micro_batch_size}")
    sizes = [(sum(each.size for each in document), sum(each.predictions for each in document)) for document in pieces]
    taken, places = [0] * micro_batches, [0] * len(pieces)
    load = [(0, 0)] * micro_batches
    for index in sorted(range(len(pieces)), key=sizes.__getitem__, reverse=True):
        micro = min((m for m in range(micro_batches) if taken[m] < micro_batch_size), key=load.__getitem__)
        places[index] = micro * micro_batch_size + taken[micro]
        load[micro] = (load[micro][0] + sizes[index][0], load[micro][1] + sizes[index][1])
        taken[micro] += 1
    return places
