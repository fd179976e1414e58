"""Reading data sets: JSON lines, JSON, Parquet and Arrow files, folders written by `save_to_disk`, and the Hub."""

from __future__ import annotations

import contextlib
import difflib
import glob
import hashlib
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from datasets.config import HF_DATASETS_DISABLE_PROGRESS_BARS
from datasets.exceptions import DatasetGenerationError

from jaxalign.buckets import expand as expand_url
from jaxalign.buckets import fetch, is_url
from jaxalign.data.adapters import FORMATS, adapt, detect
from jaxalign.data.files import LINE, OPENERS, RAW, csv_rows, json_rows, parse_json
from jaxalign.data.formats import FORMS, NEEDS, Bad, DataConfig

logger = logging.getLogger("jaxalign")

READER = "1"  # part of every cache key: raise it when what is stored for a row changes
BUILDERS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Builders whose rows are read here, as text: their files may be compressed.
READERS: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {"json": json_rows, "csv": csv_rows}
PEEKED_ROWS = 100
MISSING = object()


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
      format: key of `FORMATS`; `trl` or None: the columns are as they should be.
      kind: of example that the rows are to become.
    """

    dataset: datasets.Dataset
    paths: tuple[str, ...]
    starts: tuple[int, ...]
    index: np.ndarray
    columns: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    format: str | None = None
    kind: str = ""

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
        return adapt(renamed(stored, self.columns), self.kind, self.format)

    def found(self, part: int) -> list[str]:
        """Columns of a file, under our names; for JSON, those of its first rows."""
        stop = self.starts[part + 1] if part + 1 < len(self.starts) else len(self.dataset)
        names = {} if RAW in self.dataset.column_names else dict.fromkeys(self.dataset.column_names)
        for i in range(self.starts[part], min(stop, self.starts[part] + PEEKED_ROWS)):
            with contextlib.suppress(Bad):  # broken lines are reported with all other problems
                names.update(dict.fromkeys(self.parse(self.dataset[i])))
        return list(names)


def renamed(stored: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A stored row as a dict, with the columns that are mapped; raises `Bad` where its line is no JSON object."""
    row = parse_json(stored[RAW]) if RAW in stored else {name: _drop_none(value) for name, value in stored.items()}
    mapped = {ours: look_up(row, theirs) for ours, theirs in columns.items()}
    return {**row, **{ours: value for ours, value in mapped.items() if value is not MISSING}}


def look_up(row: Mapping[str, Any], name: str) -> Any:
    """A column, or what lies below it: `a.b` of an object, `a.0` of a list; `MISSING` if there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for step in name.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", step) and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            return MISSING
    return value


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
        path, whole = (
            config.eval_path or config.path,
            {"mixture": (), "mixture_temperature": 1.0, "mixture_epoch": "all"},
        )
        whole |= {"filters": None, "sort_by": None, "streaming": False, "eval_path": None, "eval_split": None}
        config = replace(config, path=path, split=split, **whole)
    rows = replace(_read(config), columns=mapping(config), kind=kind)
    found = {path: rows.found(part) for part, path in enumerate(rows.paths)}
    formats = {path: choose_format(path, names, config, kind) for path, names in found.items() if names}
    if len(set(formats.values())) > 1:
        listed = ", ".join(f"{path} is {name}" for path, name in formats.items())
        raise ValueError(f"files of one data set have one format: {listed}; name them as parts of data.mixture")
    rows = replace(rows, format=next(iter(formats.values()), config.format))
    if rows.format == "trl" and kind == "preference":
        _hint(rows)
    return rows if config.sort_by is None else replace(rows, index=_sorted(rows, config.sort_by))


def mapping(config: DataConfig) -> dict[str, str]:
    """Our column name -> the data set's."""
    texts = {} if config.dataset_text_field == "text" else {"text": config.dataset_text_field}
    return {**texts, **config.columns}


def choose_format(path: str, found: Sequence[str], config: DataConfig, kind: str) -> str:
    """The format of a file with these columns (under our names); raises ValueError where none serves, or several do."""
    for ours, theirs in mapping(config).items():
        if ours not in found:
            near = difflib.get_close_matches(theirs.split(".")[0], found, 1, 0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{path}: columns: {ours}: {theirs!r} is in none of the first rows; there are {', '.join(found)}{hint}"
            )
    if config.format is not None and config.format not in ("trl", *FORMATS):
        near = difflib.get_close_matches(config.format, FORMATS, 1, 0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"known: trl, {', '.join(FORMATS)}"
        raise ValueError(f"data.format={config.format!r} is no format; {hint}")
    try:
        chosen = config.format or detect(found, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if chosen in (None, "trl"):
        _check_columns(path, found, kind)
    return chosen or "trl"


def _hint(rows: Rows) -> None:
    """Tells of dialogues that are about to be taken for plain texts."""
    with contextlib.suppress(Bad):
        if str(rows.parse(rows.dataset[0]).get("chosen")).lstrip().startswith("Human:"):
            logger.warning("%s: chosen begins with `Human:`; data.format=hh makes messages of it", rows.paths[0])


def _sorted(rows: Rows, column: str) -> np.ndarray:
    """The rows' index by a column, stable; rows that cannot be read come last, and are reported later."""
    values: list[tuple[Any, int]] = []
    unread: list[int] = []
    for i, row in enumerate(rows.index.tolist()):
        try:
            value = look_up(rows.parse(rows.dataset[row]), column)
        except Bad:
            unread.append(row)
            continue
        kinds = (int, float) if not values or isinstance(values[0][0], int | float) else (str,)
        if isinstance(value, bool) or not isinstance(value, (int, float, str) if not values else kinds):
            shown = "nothing" if value is MISSING else repr(value)
            path, line = rows.where(i)
            raise ValueError(
                f"{path}:{line}: data.sort_by={column!r} is {shown} here; all must be numbers, or all text"
            )
        values.append((value, row))
    return np.asarray([row for _, row in sorted(values, key=lambda each: each[0])] + unread, np.int64)


def _read(config: DataConfig) -> Rows:
    if config.path is None:
        raise ValueError("data.path is missing: name what to read")
    given = [config.path] if isinstance(config.path, str) else list(config.path)
    if any(is_url(each) for each in given):
        return _read_bucket(given, config.split)
    if len(given) == 1 and Path(given[0]).is_dir():
        return _read_folder(given[0], config.split)
    files = [file for pattern in given for file in expand(pattern)]
    if files:
        return _read_files(files, config.split)
    if len(given) > 1:
        raise FileNotFoundError(f"no files: {', '.join(given)}")
    return _read_hub(given[0], config.name, config.split)


def _read_bucket(given: Sequence[str], split: str) -> Rows:
    """Files in buckets (and others), read from copies on this machine, under the names that they have there."""
    names = [name for each in given for name in (expand_url(each) if is_url(each) else expand(each))]
    if not names:
        raise FileNotFoundError(f"{', '.join(given)}: no file matches")
    copies = {str(fetch(name)) if is_url(name) else name: name for name in names}
    if folder := next((name for copy, name in copies.items() if not Path(copy).is_file()), None):
        raise ValueError(f"{folder}: a folder; name its files, for example {folder.rstrip('/')}/*.jsonl")
    rows = _read_files(list(copies), split)
    hashes = {copies[copy]: digest for copy, digest in rows.hashes.items()}
    return replace(rows, paths=tuple(copies[path] for path in rows.paths), hashes=hashes)


def expand(pattern: str) -> list[str]:
    """The files that a path or a glob names, sorted; none if it may be a data set on the Hub."""
    if Path(pattern).is_file():
        return [pattern]
    if re.search(r"[*?\[]", pattern):
        files = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
        if not files:
            raise FileNotFoundError(f"{pattern}: no file matches")
        return files
    # "owner/name" or "name" may be a data set on the Hub; whatever looks like a path must exist.
    if suffix_of(pattern) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", pattern) or pattern.startswith("."):
        raise FileNotFoundError(f"{pattern}: no such file or folder")
    return []


def suffix_of(path: str) -> str:
    """The suffix that says what is in a file, or "" where it is unknown; only JSON and CSV are read compressed."""
    name = Path(path.lower())
    if name.suffix in OPENERS:
        return name.with_suffix("").suffix if BUILDERS.get(name.with_suffix("").suffix) in READERS else ""
    return name.suffix if name.suffix in BUILDERS else ""


def _read_files(files: Sequence[str], split: str) -> Rows:
    parts, hashes = [], {}
    for path in files:
        suffix = suffix_of(path)
        if not suffix:
            raise ValueError(
                f"{path}: unknown type of file; known are {', '.join(BUILDERS)}, "
                f"JSON and CSV also as {'/'.join(OPENERS)}"
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
        if builder not in READERS:
            return cast(datasets.Dataset, datasets.load_dataset(builder, data_files=[path], split="train"))
        features = datasets.Features({RAW: datasets.Value("binary"), LINE: datasets.Value("int64")})
        fingerprint = hashlib.sha256(f"{READER} {builder} {digest}".encode()).hexdigest()[:32]
        try:
            return cast(
                datasets.Dataset,
                datasets.Dataset.from_generator(
                    READERS[builder], features=features, gen_kwargs={"path": path}, fingerprint=fingerprint
                ),
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None  # ours, from json_rows, says which file and line


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
