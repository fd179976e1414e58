"""Several data sets as one: their examples end to end, and an order in which each has its share."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from jaxalign.data.examples import Examples, Ragged
from jaxalign.data.formats import DataConfig
from jaxalign.data.reading import Rows
from jaxalign.data.settings import MixturePart

ORDER, CONTENT = 0, 1  # what a random generator is for


@dataclass(frozen=True)
class JoinedRows:
    """The rows of several data sets, end to end; see `Rows`.

    Attributes:
      parts: the data sets.
      starts: number of each one's first row.
    """

    parts: tuple[Rows, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return self.starts[-1] + len(self.parts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        part = bisect_right(self.starts, i) - 1
        return self.parts[part][i - self.starts[part]]

    def where(self, i: int) -> tuple[str, int]:
        """File and line of row `i`."""
        part = bisect_right(self.starts, i) - 1
        return self.parts[part].where(i - self.starts[part])

    @property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 by file."""
        return {path: digest for part in self.parts for path, digest in part.hashes.items()}


@dataclass(frozen=True)
class Share:
    """One part of a mixture, counted.

    Attributes:
      rows: rows read.
      used: those that are trained on.
      weight: its share of the examples that training sees.
      per_epoch: examples that it gives to an epoch; None where an epoch is unknown.
    """

    rows: int
    used: int
    weight: float
    per_epoch: int | None


def part_config(config: DataConfig, part: MixturePart) -> DataConfig:
    """How a part is read: as the section says, but for what the part says itself."""
    return replace(
        config,
        path=part.path,
        mixture=(),
        mixture_temperature=1.0,
        name=part.name,
        split=part.split,
        format=part.format or config.format,
        columns=config.columns if part.columns is None else part.columns,
    )


def join(parts: Sequence[Examples], titles: Sequence[str]) -> Examples:
    """The examples of several data sets, end to end; each remembers in `columns["part"]` where it is from.

    Args:
      parts: of one kind, from `encode_rows`.
      titles: of the parts.
    """
    sizes = [len(part.columns["bad"]) for part in parts]
    starts = np.cumsum([0, *sizes[:-1]])
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Examples(
        arrays={name: _ragged([part.arrays[name] for part in parts], starts) for name in parts[0].arrays},
        columns={**columns, "part": np.repeat(np.arange(len(parts)), sizes)},
        reasons={
            int(start) + i: why for start, part in zip(starts, parts, strict=True) for i, why in part.reasons.items()
        },
        index=np.concatenate([part.index + start for start, part in zip(starts, parts, strict=True)]),
        rows=JoinedRows(tuple(part.rows for part in parts if isinstance(part.rows, Rows)), tuple(starts.tolist())),
        parts=tuple(titles),
    )


def _ragged(parts: Sequence[Ragged], starts: np.ndarray) -> Ragged:
    chunks = tuple(chunk for part in parts for chunk in part.chunks)
    return Ragged(chunks, np.concatenate([part.starts + start for part, start in zip(parts, starts, strict=True)]))


class MixtureOrder:
    """Which example comes at which place of training: a pure function of the place, the seed and the sizes.

    An epoch has so many examples of each part as `epoch_counts` says, mixed at random. A part is read through anew, in
    another order, when all its examples have been given out; what an epoch leaves of it the next one takes.

    Args:
      part_of: int `[examples]`, the part of each example.
      weights: share of each part, in any unit; None: by size, see `temperature`.
      temperature: T; shares are proportional to `n ** (1 / T)`.
      epoch: `first` or `all`, see `epoch_counts`.
      seed: of the order.
      shuffle: else parts alternate evenly, each in its own order.
    """

    def __init__(
        self,
        part_of: np.ndarray,
        weights: Sequence[float] | None,
        *,
        temperature: float = 1.0,
        epoch: str = "all",
        seed: int = 42,
        shuffle: bool = True,
    ):
        parts = int(part_of.max()) + 1 if weights is None else len(weights)
        self._members = [np.flatnonzero(part_of == part) for part in range(parts)]
        self._seed, self._shuffle = seed, shuffle
        sizes = [len(members) for members in self._members]
        self.shares = shares(sizes, weights, temperature)
        self.counts = epoch_counts(sizes, self.shares, epoch)
        self._length = sum(self.counts)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        """Examples per epoch."""
        return self._length

    def __getitem__(self, place: int) -> int:
        """The example at a place of training, epochs counted through."""
        epoch, within = divmod(place, self._length)
        return int(self._epoch(epoch)[within])

    def _make_epoch(self, epoch: int) -> np.ndarray:
        labels = np.repeat(np.arange(len(self.counts)), self.counts)
        if self._shuffle:
            labels = np.random.default_rng([self._seed, ORDER, epoch]).permutation(labels)
        else:
            turns = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts if count])
            labels = labels[np.argsort(turns, kind="stable")]
        order = np.zeros(self._length, np.int64)
        for part, count in enumerate(self.counts):
            order[labels == part] = self._taken(part, epoch * count, count)
        return order

    def _taken(self, part: int, start: int, count: int) -> np.ndarray:
        """Examples `start` to `start + count` of a part that is read through again and again."""
        members = self._members[part]
        size = len(members)
        passes = range(start // size, -(-(start + count) // size))
        read = [members[self._pass(part, number, size)] for number in passes]
        return np.concatenate(read)[start - passes.start * size :][:count] if read else np.zeros(0, np.int64)

    def _pass(self, part: int, number: int, size: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(size)
        return np.random.default_rng([self._seed, CONTENT, part, number]).permutation(size)


def shares(sizes: Sequence[int], weights: Sequence[float] | None, temperature: float) -> list[Fraction]:
    """The parts' shares p_i: `weights`, or `n_i ** (1 / T)`, over their sum; exact where weights are decimals."""
    if weights is None:
        raw = [Fraction(n if temperature == 1 else n ** (1 / temperature)) for n in sizes]
    else:
        raw = [Fraction(str(weight)) for weight in weights]
    total = sum(raw)
    return [each / total for each in raw]


def epoch_counts(sizes: Sequence[int], shares: Sequence[Fraction], epoch: str) -> list[int]:
    """Examples of each part in an epoch.

    `first`: the epoch has `min_i n_i / p_i` examples, rounded down: no part is repeated, and the scarcest is used up.
    `all`: `max_i n_i / p_i`, rounded up: every part is used up at least once, and the others are repeated. A part gets
    its share of them, whole numbers by the largest remainders.
    """
    ends = [Fraction(n) / share for n, share in zip(sizes, shares, strict=True)]
    length = math.floor(min(ends)) if epoch == "first" else math.ceil(max(ends))
    counts = [math.floor(length * share) for share in shares]
    left = sorted(range(len(shares)), key=lambda i: (counts[i] - length * shares[i], i))
    for i in left[: length - sum(counts)]:
        counts[i] += 1
    if length < 1:
        raise ValueError(f"mixture_epoch=first: an epoch of parts of {', '.join(map(str, sizes))} examples is empty")
    return counts
