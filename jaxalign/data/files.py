"""Files of rows: JSON lines, JSON lists and CSV, compressed or not; the text of each row and the line it starts in."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from jaxalign.data.formats import Bad
from jaxalign.extras import install

RAW, LINE = "__json__", "__line__"
# Columns of a CSV file, which knows only text, that are numbers or truth values to us.
NUMBERS = ("margin", "chosen_score", "rejected_score", "timestamp")
NO_ROW = b"\0"  # before what is wrong with a row that is none, so that it is reported by its line
FIELD_LIMIT = 1 << 27  # csv's own is 128 KiB, less than a long document


def _open_zstd(path: str, mode: str) -> BinaryIO:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError as error:
        raise ValueError(f"{path}: .zst needs the package zstandard: {install('zstd')}") from error
    return cast(BinaryIO, zstandard.open(path, mode))


OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, UnicodeDecodeError, csv.Error)


def open_bytes(path: str) -> BinaryIO:
    """A file, decompressed by its suffix."""
    return cast(BinaryIO, OPENERS.get(Path(path).suffix.lower(), open)(path, "rb"))


def json_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file, or of a JSON file that holds one list, each with the line it starts in.

    Lines are not parsed here. A list is read into memory whole.
    """
    try:
        with open_bytes(path) as file:
            start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if not start:
            raise ValueError(f"{path}: no rows")
        with open_bytes(path) as file:
            if start == b"[":
                yield from _elements(path, file.read().decode("utf-8-sig"))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield {RAW: line.strip(), LINE: number}
    except DAMAGED as error:
        raise damaged(path, error) from error


def csv_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file with a header (TSV: by its suffix), each as JSON with the line it starts in; all is text."""
    csv.field_size_limit(FIELD_LIMIT)
    tabs = Path(path.removesuffix(Path(path).suffix) if Path(path).suffix.lower() in OPENERS else path)
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if tabs.suffix.lower() == ".tsv" else ",", strict=True)
            header, line = next(rows, None), rows.line_num
            if not header:
                raise ValueError(f"{path}: no rows")
            found = False
            for row in rows:
                started, line = line + 1, rows.line_num
                if row:
                    found = True
                    yield {RAW: _csv_row(header, row), LINE: started}
            if not found:
                raise ValueError(f"{path}: no rows")
    except DAMAGED as error:
        raise damaged(path, error) from error


def damaged(path: str, error: Exception) -> ValueError:
    """What to raise of a file that cannot be read to its end."""
    return ValueError(f"{path}: damaged file: {error}")


def parse_json(line: bytes) -> dict[str, Any]:
    """A stored row; raises `Bad` if it is no JSON object."""
    if line.startswith(NO_ROW):
        raise Bad("wrong CSV", line.removeprefix(NO_ROW).decode())
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Bad("wrong JSON", f"{error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise Bad("wrong JSON", f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists thousands deep
        raise Bad("wrong JSON", str(error)) from error
    if not isinstance(row, dict):
        raise Bad("wrong JSON", f"a {type(row).__name__}, not an object with columns")
    return row


def _csv_row(header: list[str], row: list[str]) -> bytes:
    if len(row) != len(header):
        return NO_ROW + f"{len(row)} fields for {len(header)} columns".encode()
    return json.dumps({name: _csv_value(name, value) for name, value in zip(header, row, strict=True)}).encode()


def _csv_value(name: str, value: str) -> str | float | None:
    if name not in NUMBERS:
        return value
    try:
        return float(value) if value.strip() else None
    except ValueError:
        return value


def _elements(path: str, text: str) -> Iterator[dict[str, Any]]:
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def skip(at: int) -> int:
        return cast(re.Match, blank.match(text, at)).end()

    at, seen, line = skip(text.index("[") + 1), 0, 1
    if text[at : at + 1] == "]":
        raise ValueError(f"{path}: no rows")
    try:
        while text[at : at + 1] != "]":
            _, end = decoder.raw_decode(text, at)
            line, seen = line + text.count("\n", seen, at), at
            yield {RAW: text[at:end].encode(), LINE: line}
            at = skip(end)
            if text[at : at + 1] == ",":
                at = skip(at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if skip(at + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, skip(at + 1))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: wrong JSON: {error.msg} at column {error.colno}") from error
