"""Training data read as a stream: parts taken in turn, encoded on the fly, shuffled in windows, resumed exactly.

The order is a pure function of the seed and the files: parts take turns by their weights, what they give is cut into
windows of `shuffle_window` examples, and each window is shuffled by itself. So the state is a few whole numbers: where
every part stood when the window began, and how much of the window was given out; resuming reads that window again.
`datasets` keeps the place of its readers but not what is in its shuffle buffer, which is why it serves only to read.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxalign.data.adapters import adapt
from jaxalign.data.chat import Encoded, encode_batch
from jaxalign.data.examples import Examples, from_results
from jaxalign.data.filters import Facts, Judge, Removed, facts_of, judge, make_judges
from jaxalign.data.formats import Bad, DataConfig, normalise
from jaxalign.data.mixture import part_config, shares
from jaxalign.data.reading import PEEKED_ROWS, choose_format, mapping, renamed
from jaxalign.data.streamfiles import StreamFile, find_files

logger = logging.getLogger("jaxalign")

CHUNK = 64  # rows that are encoded together
FILES, WINDOWS = 2, 3  # what a random generator is for
# What is known of a part's place: passes done, file of the pass, place in it, lines read of it, examples of this pass
# that were used, examples taken of the part in all.
PASS, FILE, OFFSET, LINES, USED, TAKEN = range(6)
Place = tuple[int, ...]
START: Place = (0,) * 6


@dataclass(frozen=True)
class ListedRows:
    """Rows in memory, see `Rows`.

    Attributes:
      rows: as found, or why they cannot be read.
      places: file and line of each.
      hashes: size in bytes by file: a stream's files are not read beforehand.
    """

    rows: Sequence[Mapping[str, Any] | Bad]
    places: Sequence[tuple[str, int]]
    hashes: Mapping[str, str]

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        if isinstance(row, Bad):
            raise row
        return dict(row)

    def where(self, i: int) -> tuple[str, int]:
        """File and line of row `i`."""
        return self.places[i]


@dataclass(frozen=True)
class _Item:
    row: Mapping[str, Any] | Bad
    result: Encoded | Bad
    where: tuple[str, int]
    after: Place


@dataclass(frozen=True)
class Window:
    """Some examples in the order in which they are given out.

    Attributes:
      examples: arrays by name, see `chat.encode`.
      after: where each part stands behind the window.
      removed: rows that were left out while it was read.
    """

    examples: Sequence[Mapping[str, np.ndarray]]
    after: tuple[Place, ...]
    removed: tuple[Removed, ...]


@dataclass(frozen=True)
class _Part:
    title: str
    files: tuple[StreamFile, ...]
    columns: Mapping[str, str]
    format: str


@dataclass(frozen=True)
class Stream:
    """Training data that are read while training.

    Attributes:
      config: what is read, and how.
      tokenizer: prepared.
      kind: of example.
      parts: of the mixture, or the one data set.
      weights: whole numbers, the parts' shares over a common denominator.
      judges: filters.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerFast
    kind: str
    parts: tuple[_Part, ...]
    weights: tuple[int, ...]
    judges: Mapping[str, Judge]

    @property
    def start(self) -> tuple[Place, ...]:
        """Where each part stands before the first example."""
        return (START,) * len(self.parts)

    def sample(self) -> Examples:
        """The first `stream_sample` rows, of every part its share; bad ones among them, no filter applied."""
        items: list[_Item] = []
        part_of: list[int] = []
        for number in range(len(self.parts)):
            most = math.ceil(self.config.stream_sample * self.weights[number] / sum(self.weights))
            first_pass = itertools.takewhile(lambda item: not item.after[PASS], self._encoded(number, START))
            items += itertools.islice(first_pass, most)
            part_of += [number] * (len(items) - len(part_of))
        sizes = {file.path: f"{file.size} bytes" for part in self.parts for file in part.files}
        rows = ListedRows([item.row for item in items], [item.where for item in items], sizes)
        found = from_results([item.result for item in items], self.kind, rows)
        if not self.config.mixture:
            return found
        titles = tuple(part.title for part in self.parts)
        return Examples(
            found.arrays,
            {**found.columns, "part": np.asarray(part_of)},
            found.reasons,
            found.index,
            found.rows,
            titles,
        )

    def windows(
        self, number: int, places: Sequence[Place], check: Callable[[Mapping[str, np.ndarray]], None]
    ) -> Iterator[Window]:
        """Windows without end, from the `number`-th, which begins at `places`.

        Args:
          number: of the first window.
          places: where each part stands.
          check: raises `Bad` for an example that cannot be used.

        Raises:
          ValueError: a bad row, if `on_bad` is `stop`; a part of which nothing can be used.
        """
        size, places = self.config.shuffle_window, list(places)
        removed: list[Removed] = []
        readers = [self._good(part, place, check, removed) for part, place in enumerate(places)]
        for window in itertools.count(number):
            examples = []
            for _ in range(size):
                part = self._turn(places)
                example, place = next(readers[part])
                places[part] = (*place[:TAKEN], places[part][TAKEN] + 1)
                examples.append(example)
            order = range(size)
            if self.config.shuffle:
                order = np.random.default_rng([self.config.seed, WINDOWS, window]).permutation(size).tolist()
            yield Window([examples[i] for i in order], tuple(places), tuple(removed))
            removed.clear()

    def _turn(self, places: Sequence[Place]) -> int:
        """The part that is furthest behind its share, the first of several."""
        drawn = sum(place[TAKEN] for place in places) + 1
        behind = [w * drawn - sum(self.weights) * p[TAKEN] for w, p in zip(self.weights, places, strict=True)]
        return behind.index(max(behind))

    def _good(
        self, part: int, place: Place, check: Callable[[Mapping[str, np.ndarray]], None], removed: list[Removed]
    ) -> Iterator[tuple[Mapping[str, np.ndarray], Place]]:
        passes, used = place[PASS], place[USED]
        for item in self._encoded(part, place):
            if item.after[PASS] > passes:
                if not used:
                    raise ValueError(f"{self.parts[part].title}: a whole pass over it gave nothing that can be used")
                passes, used = item.after[PASS], 0
            example = self._admit(item, check, removed)
            if example is not None:
                used += 1
                yield example, (*item.after[:USED], used, 0)

    def _admit(
        self, item: _Item, check: Callable[[Mapping[str, np.ndarray]], None], removed: list[Removed]
    ) -> Mapping[str, np.ndarray] | None:
        try:
            if isinstance(item.row, Bad):
                raise item.row
            if isinstance(item.result, Bad):
                raise item.result
            check(item.result.arrays)
        except Bad as bad:
            if self.config.on_bad == "stop":
                where = "{}:{}".format(*item.where)
                raise ValueError(f"training data: {where}: {bad}; data.on_bad=drop leaves such rows out") from bad
            row = {} if isinstance(item.row, Bad) else item.row
            removed.append(Removed(*item.where, "problem", str(bad), row))
            return None
        if self.judges:
            facts = Facts(item.row, normalise(item.row, self.kind), item.result.arrays, item.where)
            verdict = judge(self.judges, facts)
            if verdict is not None:
                removed.append(verdict)
                return None
        return item.result.arrays

    def _encoded(self, part: int, place: Place) -> Iterator[_Item]:
        rows = self._rows(part, place)
        while chunk := list(itertools.islice(rows, CHUNK)):
            results = encode_batch(self.tokenizer, [row for row, _, _ in chunk], self.kind, self.config)
            for (row, where, after), result in zip(chunk, results, strict=True):
                yield _Item(row, result, where, after)

    def _rows(self, number: int, place: Place) -> Iterator[tuple[Mapping[str, Any] | Bad, tuple[str, int], Place]]:
        """Rows of a part without end, each with its file and line and the place behind it."""
        part = self.parts[number]
        _, first, offset, lines, _, _ = place
        for done in itertools.count(place[PASS]):
            files, given = self._files(number, done), bool(first or offset)
            for at in range(first, len(files)):
                for stored, line, behind, read in files[at].rows(offset, lines):
                    given = True
                    try:
                        row = adapt(renamed(stored, part.columns), self.kind, part.format)
                    except Bad as bad:
                        row = bad
                    yield row, (files[at].path, line), (done, at, behind, read, 0, 0)
                offset = lines = 0
            first = 0
            if not given:
                raise ValueError(f"{part.title}: no rows")

    def _files(self, number: int, done: int) -> Sequence[StreamFile]:
        """A part's files in the order of a pass."""
        files = self.parts[number].files
        if not self.config.shuffle:
            return files
        order = np.random.default_rng([self.config.seed, FILES, number, done]).permutation(len(files))
        return [files[i] for i in order]


def open_stream(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, kind: str, evaluation: Examples | None
) -> Stream:
    """Training data as a stream; of each part, the first rows of the first file are looked at.

    Args:
      config: with `streaming`.
      tokenizer: prepared.
      kind: of example.
      evaluation: encoded evaluation examples, for `filters.decontaminate`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: nothing that can be streamed, or wrong columns.
    """
    configs = [part_config(config, part) for part in config.mixture] or [config]
    titles = [part.title for part in config.mixture] or [
        config.path if isinstance(config.path, str) else ", ".join(config.path or ())
    ]
    parts = tuple(_open_part(title, each, kind) for title, each in zip(titles, configs, strict=True))
    given = [part.weight for part in config.mixture if part.weight is not None]
    exact = shares([1] * len(parts), given or None, 1.0)
    common = math.lcm(*(share.denominator for share in exact))
    held_out = () if evaluation is None else facts_of(evaluation.good(), kind)
    judges = {} if config.filters is None else make_judges(config.filters, kind, held_out)
    return Stream(config, tokenizer, kind, parts, tuple(int(share * common) for share in exact), judges)


def _open_part(title: str, config: DataConfig, kind: str) -> _Part:
    files = find_files(config)
    columns, names = mapping(config), {}
    for stored, _, _, _ in itertools.islice(files[0].rows(0, 0), PEEKED_ROWS):
        try:
            names.update(dict.fromkeys(renamed(stored, columns)))
        except Bad:
            continue  # it is reported with its line when it is read
    chosen = choose_format(files[0].path, list(names), config, kind) if names else config.format or "trl"
    return _Part(title, tuple(files), columns, chosen)
