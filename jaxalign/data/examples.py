"""Encoded examples: one pass over the rows, cached on disk, read back through the memory map without copies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets
import datasets.config as datasets_config
import numpy as np
import transformers
from transformers import PreTrainedTokenizerFast

from jaxalign.data.adapters import ADAPTERS
from jaxalign.data.chat import Encoded, encode_batch
from jaxalign.data.formats import Bad, DataConfig
from jaxalign.data.reading import Rows, quiet
from jaxalign.data.tokenizer import digest

ENCODING = "1"  # part of every cache key: raise it when the same row gives other tokens than before
ARRAYS = {
    "sft": ("input_ids", "loss_mask"),
    "preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "ranking": ("prompt_ids", "completion_ids", "sizes", "ranks", "margins"),
    "stepwise": ("prompt_ids", "completion_ids", "ends", "labels", "steps"),
    "unpaired": ("prompt_ids", "completion_ids", "sizes", "labels"),
    "prompt": ("prompt_ids",),
}
# What decides the tokens of a row, besides the row and the tokenizer.
OPTIONS = (
    *("max_length", "max_prompt_length", "truncation_mode", "completion_only_loss", "assistant_only_loss"),
    "step_separator",
)


@dataclass(frozen=True)
class Ragged:
    """Arrays of different lengths, end to end in a few buffers.

    Attributes:
      chunks: per buffer its values and int offsets `[arrays + 1]`.
      starts: int `[chunks]`, number of the first array of each buffer.
    """

    chunks: tuple[tuple[np.ndarray, np.ndarray], ...]
    starts: np.ndarray

    def __getitem__(self, i: int) -> np.ndarray:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        values, offsets = self.chunks[part]
        row = i - self.starts[part]
        return values[offsets[row] : offsets[row + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 `[arrays]`."""
        return np.concatenate([np.diff(offsets) for _, offsets in self.chunks]).astype(np.int64)


class RowsLike(Protocol):
    """Rows with the file and line of each, see `Rows`."""

    @property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 by file."""
        ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...

    def where(self, i: int, /) -> tuple[str, int]:
        """File and line of row `i`."""
        ...


@dataclass(frozen=True)
class Examples:
    """Encoded examples: `examples[i]` is a dict of arrays as `chat.encode` gives them (views, not to be written to).

    Attributes:
      arrays: by name, for all rows, the bad ones (empty arrays) among them.
      columns: int or bool arrays over all rows: `targets`, `cut`, `key`, `bad`.
      reasons: kind and detail of the problem, by row, for bad rows.
      index: int64 `[examples]`, the rows that are examples, in order.
      rows: the rows as found, if they came from a data set: `examples.row(i)` has the columns that were not encoded.
      parts: titles of the parts of a mixture, which `columns["part"]` counts; empty for a single data set.
      members: int64 `[examples]`, which of its row's completions an example has, where each is an example of its own
        (`unpaired`: see `take_apart`); None: an example is a row.
    """

    arrays: Mapping[str, Ragged]
    columns: Mapping[str, np.ndarray]
    reasons: Mapping[int, tuple[str, str]]
    index: np.ndarray
    rows: RowsLike | None = None
    parts: tuple[str, ...] = ()
    members: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        row = int(self.index[i])
        arrays = {name: _as_mask(name, ragged[row]) for name, ragged in self.arrays.items()}
        return arrays if self.members is None else _one_completion(arrays, int(self.members[i]))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens per example, int64 `[examples]`: `prompt`, `completion` or `chosen` and `rejected`, `total`.

        `sft`: `completion` counts the targets and `prompt` the rest. `ranking`: `completion` counts all completions.
        `total` counts a shared prompt once.
        """
        tokens = {name: ragged for name, ragged in self.arrays.items() if name.endswith("_ids")}
        parts = {name.removesuffix("_ids"): ragged.lengths[self.index] for name, ragged in tokens.items()}
        if "input" in parts:
            targets = self.columns["targets"][self.index].astype(np.int64)
            return {"prompt": parts["input"] - targets, "completion": targets, "total": parts["input"]}
        if self.members is not None:
            parts["completion"] = self._of_member("sizes")
        return {**parts, "total": np.sum(list(parts.values()), axis=0)}

    @property
    def labels(self) -> np.ndarray:
        """int64 `[examples]`, 1 for those whose completion is desirable; only of `unpaired` examples."""
        return self._of_member("labels") if self.members is not None else self._of_row("label")

    @property
    def bad(self) -> np.ndarray:
        """bool `[examples]`, True for those that cannot be used."""
        return self.columns["bad"][self.index]

    @property
    def cut(self) -> np.ndarray:
        """int `[examples]`, tokens that truncation removed."""
        return self.columns["cut"][self.index]

    @property
    def keys(self) -> np.ndarray:
        """int64 `[examples]`, hashes of the prompts."""
        return self.columns["key"][self.index]

    @property
    def part_of(self) -> np.ndarray:
        """int `[examples]`, number of the part of a mixture; 0 for a single data set."""
        return self.columns["part"][self.index] if self.parts else np.zeros(len(self), np.int64)

    def good(self) -> Examples:
        """Without the bad ones."""
        return self.select(np.flatnonzero(~self.bad))

    def select(self, which: np.ndarray) -> Examples:
        """Some of the examples, by number."""
        return replace(self, index=self.index[which], members=None if self.members is None else self.members[which])

    def reason(self, i: int) -> tuple[str, str]:
        """Kind and detail of a bad example's problem."""
        return self.reasons[int(self.index[i])]

    def where(self, i: int) -> tuple[str, int]:
        """File and line of example `i`; its number, 1-based, in no file, if it was made in memory."""
        row = int(self.index[i])
        return ("", row + 1) if self.rows is None else self.rows.where(row)

    def row(self, i: int) -> dict[str, Any]:
        """The row of example `i` as found, all columns; raises ValueError if it was made in memory."""
        if self.rows is None:
            raise ValueError("these examples were made in memory: there are no rows behind them")
        return self.rows[int(self.index[i])]

    def _of_member(self, name: str) -> np.ndarray:
        """int64 `[examples]`: each example's own number among those of its row; 0 for bad ones."""
        assert self.members is not None
        ragged = self.arrays[name]
        flat = np.concatenate([*(values[offsets[0] : offsets[-1]] for values, offsets in ragged.chunks), [0]])
        starts = np.cumsum([0, *ragged.lengths[:-1]])
        there = ragged.lengths[self.index] > 0
        return np.where(there, flat[np.where(there, starts[self.index] + self.members, -1)], 0).astype(np.int64)

    def _of_row(self, name: str) -> np.ndarray:
        return np.asarray([int(self.arrays[name][int(row)][0]) for row in self.index])


def hold_out(examples: Examples, ratio: float, seed: int) -> tuple[Examples, Examples]:
    """Splits examples in two, the second with a share of `ratio`; a function of their number and the seed alone."""
    held = round(len(examples) * ratio)
    if not 0 < held < len(examples):
        raise ValueError(f"eval_ratio={ratio} of {len(examples)} examples leaves one side without any")
    order = np.random.default_rng(seed).permutation(len(examples))
    return examples.select(np.sort(order[held:])), examples.select(np.sort(order[:held]))


def take_apart(examples: Examples) -> Examples:
    """Of `unpaired` rows, an example per completion: two of a pair, one of a bad row.

    The second completions of pairs come last: neighbours in this order have different prompts.
    """
    second = examples.index[examples.arrays["sizes"].lengths[examples.index] > 1]
    members = np.repeat([0, 1], [len(examples.index), len(second)])
    return replace(examples, index=np.concatenate([examples.index, second]), members=members)


def encode_rows(rows: Rows, tokenizer: PreTrainedTokenizerFast, kind: str, config: DataConfig) -> Examples:
    """All rows as tokens, bad ones marked. Done once: the result is kept in the cache folder of `datasets`.

    Args:
      rows: from `reading.read`.
      tokenizer: prepared, see `tokenizer.prepare`.
      kind: `sft`, `preference`, `ranking`, `unpaired` or `prompt`.
      config: lengths, truncation and what to train on.

    Raises:
      ValueError: no row can be encoded this way, see `chat.encode`.
    """
    key = cache_key(rows, tokenizer, kind, config)
    path = Path(datasets_config.HF_DATASETS_CACHE) / "jaxalign" / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = len(rows.index) == len(rows.dataset) and bool((np.diff(rows.index) == 1).all())
    with quiet():
        table = (rows.dataset if whole else rows.dataset.select(rows.index)).map(
            lambda batch: _encode_columns(rows, batch, tokenizer, kind, config),
            batched=True,
            batch_size=500,
            remove_columns=rows.dataset.column_names,
            features=_features(kind),
            cache_file_name=str(path),
            new_fingerprint=key[:32],
        )
    return _from_table(table, kind, rows)


def cache_key(rows: Rows, tokenizer: PreTrainedTokenizerFast, kind: str, config: DataConfig) -> str:
    """SHA-256 of all that decides the encoded examples: rows, tokenizer, options and the version of the encoding."""
    chosen = {name: value for name, value in asdict(config).items() if name in OPTIONS}
    source = [rows.dataset._fingerprint, list(rows.hashes.values()), hashlib.sha256(rows.index.tobytes()).hexdigest()]
    adapter = [rows.format, ADAPTERS, dict(rows.columns)]
    parts = [ENCODING, transformers.__version__, kind, chosen, source, adapter, digest(tokenizer)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def from_list(examples: Sequence[Mapping[str, Any]]) -> Examples:
    """Examples from dicts of token ids in memory, all with the same names (see `chat.encode`)."""
    names = list(examples[0])
    arrays = {name: _ragged([np.atleast_1d(example[name]) for example in examples], name) for name in names}
    targets = [int(np.sum(example["loss_mask"])) if "loss_mask" in names else 0 for example in examples]
    zeros = np.zeros(len(examples), np.int64)
    columns = {"targets": np.asarray(targets), "cut": zeros, "key": zeros, "bad": zeros.astype(bool)}
    return Examples(arrays, columns, {}, np.arange(len(examples)))


def from_results(results: Sequence[Encoded | Bad], kind: str, rows: RowsLike) -> Examples:
    """Examples from what `encode_batch` gave of these rows, the bad ones among them."""
    records = [_record(result, kind) for result in results]
    reasons = {i: (result.kind, result.detail) for i, result in enumerate(results) if isinstance(result, Bad)}
    columns = {name: np.asarray([record[name] for record in records]) for name in ("targets", "cut", "key")}
    columns["bad"] = np.asarray([isinstance(result, Bad) for result in results])
    arrays = {name: _ragged([record[name] for record in records], name) for name in ARRAYS[kind]}
    return Examples(arrays, columns, reasons, np.arange(len(results)), rows)


def _encode_columns(
    rows: Rows, batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerFast, kind: str, config: DataConfig
) -> dict[str, list[Any]]:
    """One batch of the pass: columns in, columns out."""
    names = list(batch)
    stored = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    results = encode_batch(tokenizer, [_parse(rows, row) for row in stored], kind, config)
    columns: dict[str, list[Any]] = {name: [] for name in _features(kind)}
    for result in results:
        for name, value in _record(result, kind).items():
            columns[name].append(value)
    return columns


def _one_completion(arrays: Mapping[str, np.ndarray], part: int) -> dict[str, np.ndarray]:
    """An example with one of its row's completions, and that one's label."""
    completion = np.split(arrays["completion_ids"], np.cumsum(arrays["sizes"])[:-1])[part]
    return {
        "prompt_ids": arrays["prompt_ids"],
        "completion_ids": completion,
        "label": arrays["labels"][part : part + 1],
    }


def _record(result: Encoded | Bad, kind: str) -> dict[str, Any]:
    if isinstance(result, Bad):
        empty = {name: np.zeros(0, _stored_type(name)) for name in ARRAYS[kind]}
        return {**empty, "targets": 0, "cut": 0, "key": 0, "problem": result.kind, "detail": result.detail}
    numbers = {"targets": result.targets, "cut": result.cut, "key": result.key}
    arrays = {name: result.arrays[name].astype(_stored_type(name)) for name in ARRAYS[kind]}
    return {**arrays, **numbers, "problem": "", "detail": ""}


def _parse(rows: Rows, stored: Mapping[str, Any]) -> dict[str, Any] | Bad:
    try:
        return rows.parse(stored)
    except Bad as bad:
        return bad


def _features(kind: str) -> datasets.Features:
    # A mask as bytes: Arrow packs booleans to bits, which numpy cannot view.
    arrays = {name: datasets.List(datasets.Value(_stored_type(name))) for name in ARRAYS[kind]}
    numbers = {name: datasets.Value("int64") for name in ("targets", "cut", "key")}
    return datasets.Features(
        {**arrays, **numbers, "problem": datasets.Value("string"), "detail": datasets.Value("string")}
    )


def _stored_type(name: str) -> str:
    return "uint8" if name.endswith("mask") else "float32" if name == "margins" else "int32"


def _as_mask(name: str, values: np.ndarray) -> np.ndarray:
    return values.view(bool) if name.endswith("mask") else values


def _from_table(table: datasets.Dataset, kind: str, rows: Rows) -> Examples:
    arrays = {}
    for name in ARRAYS[kind]:
        parts = [part for part in table.data.column(name).chunks if len(part)]
        chunks = tuple((part.values.to_numpy(), part.offsets.to_numpy()) for part in parts)
        arrays[name] = Ragged(chunks, np.cumsum([0, *map(len, parts[:-1])]))
    columns = {name: table.data.column(name).to_numpy() for name in ("targets", "cut", "key")}
    kinds, details = (table.data.column(name).to_pylist() for name in ("problem", "detail"))
    reasons = {i: (kind, detail) for i, (kind, detail) in enumerate(zip(kinds, details, strict=True)) if kind}
    bad = np.zeros(len(table), bool)
    bad[list(reasons)] = True
    return Examples(arrays, {**columns, "bad": bad}, reasons, np.arange(len(table)), rows)


def _ragged(values: list[np.ndarray], name: str) -> Ragged:
    offsets = np.cumsum([0, *map(len, values)])
    return Ragged(((np.concatenate(values).astype(_stored_type(name)), offsets),), np.zeros(1, np.int64))
