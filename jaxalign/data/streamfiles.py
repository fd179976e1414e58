"""Files and Hub data sets that are read from any place on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets

from jaxalign.data.files import DAMAGED, LINE, OPENERS, RAW, csv_rows, damaged, open_bytes
from jaxalign.data.formats import DataConfig
from jaxalign.data.reading import BUILDERS, expand, quiet, suffix_of

# (offset, lines read before) -> stored row, its line, offset and lines behind it.
Read = Callable[[int, int], Iterator[tuple[Mapping[str, Any], int, int, int]]]


@dataclass(frozen=True)
class StreamFile:
    """Something that can be read from any place on.

    Attributes:
      path: of the file, or a Hub data set's name.
      size: bytes; -1 for the Hub.
      rows: see `Read`. Offset and lines are 0 at the beginning; else they are what a row before gave.
    """

    path: str
    size: int
    rows: Read


def find_files(config: DataConfig) -> list[StreamFile]:
    """The files of `config.path` in order of their names, or the one Hub data set.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file of unknown type, or a folder.
    """
    given = [config.path] if isinstance(config.path, str) else list(config.path or ())
    folder = next((path for path in given if Path(path).is_dir()), None)
    if folder is not None:
        raise ValueError(f"{folder}: a folder cannot be streamed; name its files, for example {folder}/*.arrow")
    paths = [path for pattern in given for path in expand(pattern)]
    if not paths and len(given) == 1:
        return [StreamFile(f"{given[0]} ({config.split})", -1, _hub(given[0], config.name, config.split))]
    if not paths:
        raise FileNotFoundError(f"no files: {', '.join(given)}")
    found = []
    for path in paths:
        suffix = suffix_of(path)
        if not suffix:
            raise ValueError(f"{path}: unknown type of file; known are {', '.join(BUILDERS)}")
        found.append(StreamFile(path, Path(path).stat().st_size, READS[BUILDERS[suffix]](path)))
    return found


def _json(path: str) -> Read:
    def rows(offset: int, lines: int) -> Iterator[tuple[Mapping[str, Any], int, int, int]]:
        compressed = Path(path).suffix.lower() in OPENERS
        try:
            with open_bytes(path) as file:
                if compressed:  # only by unpacking it again does one come to a place
                    for line in itertools.islice(file, lines):
                        del line
                else:
                    file.seek(offset)
                for number, line in enumerate(file, lines + 1):
                    offset += len(line)
                    if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                        raise ValueError(
                            f"{path}: a JSON list cannot be streamed; write JSON lines, or streaming=false"
                        )
                    if line.strip():
                        yield {RAW: line.strip(), LINE: number}, number, offset, number
        except DAMAGED as error:
            raise damaged(path, error) from error

    return rows


def _csv(path: str) -> Read:
    def rows(offset: int, lines: int) -> Iterator[tuple[Mapping[str, Any], int, int, int]]:
        for number, row in enumerate(itertools.islice(csv_rows(path), offset, None), offset + 1):
            yield row, row[LINE], number, row[LINE]

    return rows


def _builder(builder: str) -> Callable[[str], Read]:
    def make(path: str) -> Read:
        return _streamed(lambda: datasets.load_dataset(builder, data_files=[path], split="train", streaming=True))

    return make


def _hub(path: str, name: str | None, split: str) -> Read:
    def load() -> Any:
        try:
            return datasets.load_dataset(path, name, split=split, streaming=True)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(f"{path!r} is no file or folder here, and the Hub did not give it: {error}") from error

    return _streamed(load)


def _streamed(load: Callable[[], Any]) -> Read:
    def rows(offset: int, lines: int) -> Iterator[tuple[Mapping[str, Any], int, int, int]]:
        del lines
        with quiet():
            found = cast(datasets.IterableDataset, load())
        for number, row in enumerate(found.skip(offset) if offset else found, offset + 1):
            yield cast(dict[str, Any], row), number, number, number

    return rows


READS: dict[str, Callable[[str], Read]] = {
    "json": _json,
    "csv": _csv,
    "parquet": _builder("parquet"),
    "arrow": _builder("arrow"),
}
