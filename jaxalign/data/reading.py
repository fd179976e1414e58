"""Reading data sets: JSON lines, JSON, Parquet and Arrow files, folders written by `save_to_disk`, and the Hub."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import hashlib
import json
import lzma
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import numpy as np
from datasets.config import HF_DATASETS_DISABLE_PROGRESS_BARS
from datasets.exceptions import DatasetGenerationError

from jaxalign.buckets import expand, fetch, is_url
from jaxalign.data.formats import FORMS, NEEDS, Bad, DataConfig

READER = "1"  # part of every cache key: raise it when what is stored for a row changes
RAW, LINE = "__json__", "__line__"
BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PEEKED_ROWS = 100


@dataclass(frozen=True)
class Rows:
    """A data set as found, with the file and line of every row.

    Attributes:
      dataset: the rows of all files. JSON rows are kept as their text, so that Arrow's one-type-per-column does not
        change them; `rows[i]` decodes.
      paths: the files (or the one folder or Hub name).
      starts: number of each file's first row in `dataset`.
      index: int64 `[rows]`, the rows of `dataset` that are used, in order.
      columns: our column name -> the data set's.
      hashes: SHA-256 by file; empty for the Hub.
    """

    dataset: datasets.Dataset
    paths: tuple[str, ...]
    starts: tuple[int, ...]
    index: np.ndarray
    columns: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row `i` as a dict, extra columns included; raises `Bad` where its line is no JSON object."""
        return self.parse(self.dataset[int(self.index[i])])

    def where(self, i: int) -> tuple[str, int]:
        """File and line of row `i`; the line is 1-based, a row number for files that have no lines."""
        row = int(self.index[i])
        part = bisect_right(self.starts, row) - 1
        line = self.dataset[row][LINE] if RAW in self.dataset.column_names else row - self.starts[part] + 1
        return self.paths[part], int(line)

    def parse(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """A stored row as a dict under our column names."""
        row = _parse_json(stored[RAW]) if RAW in stored else {name: _drop_none(value) for name, value in stored.items()}
        return {**row, **{ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}}

    def found(self, part: int) -> list[str]:
        """Columns of a file, under our names; for JSON, those of its first rows."""
        stop = self.starts[part + 1] if part + 1 < len(self.starts) else len(self.dataset)
        names: dict[str, None] = {}
        if RAW not in self.dataset.column_names:
            return [*self.dataset.column_names, *(o for o, t in self.columns.items() if t in self.dataset.column_names)]
        for i in range(self.starts[part], min(stop, self.starts[part] + PEEKED_ROWS)):
            with contextlib.suppress(Bad):  # broken lines are reported with all other problems
                names.update(dict.fromkeys(self.parse(self.dataset[i])))
        return list(names)


def read(config: DataConfig, kind: str, *, evaluation: bool = False) -> Rows:
    """The rows of `config.path`, or with `evaluation` those of `eval_path` / `eval_split`.

    Args:
      config: what to read.
      kind: `sft`, `preference`, `ranking` or `prompt`: decides which columns must be there.
      evaluation: read the evaluation data.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file without rows, of unknown type or damaged; an unknown split; columns that do not serve `kind`.
    """
    if evaluation:
        split = config.eval_split or ("train" if config.eval_path else config.split)
        config = replace(config, path=config.eval_path or config.path, split=split, eval_path=None, eval_split=None)
    columns = dict(config.columns)
    if config.dataset_text_field != "text":
        columns = {"text": config.dataset_text_field, **columns}
    rows = replace(_read(config), columns=columns)
    for part, path in enumerate(rows.paths):
        _check_columns(path, rows.found(part), kind)
    return rows


def _read(config: DataConfig) -> Rows:
    given = [config.path] if isinstance(config.path, str) else list(config.path)
    if any(is_url(each) for each in given):
        return _read_bucket(given, config.split)
    if len(given) == 1 and Path(given[0]).is_dir():
        return _read_folder(given[0], config.split)
    files = [file for pattern in given for file in _expand(pattern)]
    if files:
        return _read_files(files, config.split)
    if len(given) > 1:
        raise FileNotFoundError(f"no files: {', '.join(given)}")
    return _read_hub(given[0], config.name, config.split)


def _read_bucket(given: Sequence[str], split: str) -> Rows:
    """Files in buckets (and others), read from copies on this machine, under the names that they have there."""
    names = [name for each in given for name in (expand(each) if is_url(each) else _expand(each))]
    if not names:
        raise FileNotFoundError(f"{', '.join(given)}: no file matches")
    copies = {str(fetch(name)) if is_url(name) else name: name for name in names}
    if folder := next((name for copy, name in copies.items() if not Path(copy).is_file()), None):
        raise ValueError(f"{folder}: a folder; name its files, for example {folder.rstrip('/')}/*.jsonl")
    rows = _read_files(list(copies), split)
    hashes = {copies[copy]: digest for copy, digest in rows.hashes.items()}
    return replace(rows, paths=tuple(copies[path] for path in rows.paths), hashes=hashes)


def _expand(pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    if re.search(r"[*?\[]", pattern):
        files = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
        if not files:
            raise FileNotFoundError(f"{pattern}: no file matches")
        return files
    # "owner/name" or "name" may be a data set on the Hub; whatever looks like a path must exist.
    if _suffix(pattern) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", pattern) or pattern.startswith("."):
        raise FileNotFoundError(f"{pattern}: no such file or folder")
    return []


def _suffix(path: str) -> str:
    """The suffix that says what is in a file, or "" where it is unknown; only JSON is read compressed."""
    name = Path(path.lower())
    if name.suffix in OPENERS:
        return name.with_suffix("").suffix if BUILDERS.get(name.with_suffix("").suffix) == "json" else ""
    return name.suffix if name.suffix in BUILDERS else ""


def _read_files(files: Sequence[str], split: str) -> Rows:
    parts, hashes = [], {}
    for path in files:
        suffix = _suffix(path)
        if not suffix:
            raise ValueError(
                f"{path}: unknown type of file; known are {', '.join(BUILDERS)}, JSON also as .gz/.bz2/.xz"
            )
        with open(path, "rb") as file:
            hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
        parts.append(_read_file(path, BUILDERS[suffix], hashes[path]))
        if not len(parts[-1]):
            raise ValueError(f"{path}: no rows")
    try:
        dataset = datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(f"files whose columns differ cannot be read together ({', '.join(files)}): {error}") from error
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return Rows(dataset, tuple(files), tuple(starts.tolist()), _slice(split, {"train": len(dataset)})[1], hashes=hashes)


def _read_file(path: str, builder: str, digest: str) -> datasets.Dataset:
    with quiet():
        if builder != "json":
            return cast(datasets.Dataset, datasets.load_dataset(builder, data_files=[path], split="train"))
        features = datasets.Features({RAW: datasets.Value("binary"), LINE: datasets.Value("int64")})
        fingerprint = hashlib.sha256(f"{READER} {digest}".encode()).hexdigest()[:32]
        try:
            return cast(
                datasets.Dataset,
                datasets.Dataset.from_generator(
                    json_rows, features=features, gen_kwargs={"path": path}, fingerprint=fingerprint
                ),
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None  # ours, from json_rows, says which file and line


def json_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file, or of a JSON file that holds one list, each with the line it starts in.

    Lines are not parsed here. A list is read into memory whole.
    """
    try:
        with _open(path) as file:
            start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if not start:
            raise ValueError(f"{path}: no rows")
        with _open(path) as file:
            if start == b"[":
                yield from _elements(path, file.read().decode("utf-8-sig"))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield {RAW: line.strip(), LINE: number}
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged file: {error}") from error


def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, OPENERS.get(Path(path).suffix.lower(), open)(path, "rb"))


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


def _read_folder(path: str, split: str) -> Rows:
    folder = Path(path)
    if not (folder / "dataset_dict.json").exists() and not (folder / "state.json").exists():
        raise ValueError(f"{path}: not a folder written by save_to_disk; name files, for example {path}/*.jsonl")
    with quiet():
        found = datasets.load_from_disk(path)
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    try:
        name, index = _slice(split, {str(key): len(part) for key, part in splits.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not len(splits[name]):
        raise ValueError(f"{path}: no rows in {name}")
    hashes = {}
    for file in sorted(folder.rglob("*.arrow")):
        with open(file, "rb") as stream:
            hashes[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return Rows(splits[name], (path if len(splits) == 1 else f"{path} ({name})",), (0,), index, hashes=hashes)


def _read_hub(path: str, name: str | None, split: str) -> Rows:
    try:
        with quiet():
            dataset = cast(datasets.Dataset, datasets.load_dataset(path, name, split=split))
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{path!r} is no file or folder here, and the Hub did not give it: {error}") from error
    if not len(dataset):
        raise ValueError(f"{path} ({split}): no rows")
    return Rows(dataset, (f"{path} ({split})",), (0,), np.arange(len(dataset)))


def _slice(split: str, lengths: dict[str, int]) -> tuple[str, np.ndarray]:
    """The split's name and the rows that a `datasets` split expression takes of it."""
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    names = {part.splitname for part in parts}
    if len(names) > 1:
        raise ValueError(f"split {split!r} joins several splits; take one")
    index = np.concatenate([np.arange(lengths[part.splitname])[part.from_ : part.to] for part in parts])
    if not len(index):
        raise ValueError(f"split {split!r} takes no rows")
    return names.pop(), index


def _check_columns(path: str, found: Sequence[str], kind: str) -> None:
    if found and not any(set(columns) <= set(found) for columns in FORMS[kind].values()):
        raise ValueError(
            f"{path}: columns {', '.join(found)} do not serve; needed: {NEEDS[kind]} "
            "(`columns` renames, for example {prompt: question, completion: answer})"
        )


def _parse_json(line: bytes) -> dict[str, Any]:
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


def _drop_none(value: Any) -> Any:
    """Without the None that Arrow fills in where the fields of nested structures differ between rows."""
    if isinstance(value, dict):
        return {key: _drop_none(part) for key, part in value.items() if part is not None}
    return [_drop_none(part) for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`datasets` without its progress bars: a library prints nothing."""
    if HF_DATASETS_DISABLE_PROGRESS_BARS is not None or datasets.are_progress_bars_disabled():
        yield  # the user's environment decides, or nothing to do
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
