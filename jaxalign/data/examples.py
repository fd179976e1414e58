"""Encoded examples: one pass over the rows, cached on disk, read back through the memory map without copies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import datasets.config as datasets_config
import numpy as np
import transformers
from transformers import PreTrainedTokenizerFast

from jaxalign.data.chat import Encoded, encode_batch
from jaxalign.data.checks import Report, admit, check
from jaxalign.data.formats import Bad, DataConfig
from jaxalign.data.reading import Rows, quiet, read
from jaxalign.data.tokenizer import digest, prepare

ENCODING = "1"  # part of every cache key: raise it when the same row gives other tokens than before
ARRAYS = {
    "sft": ("input_ids", "loss_mask"),
    "preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "ranking": ("prompt_ids", "completion_ids", "sizes", "ranks", "margins"),
    "unpaired": ("prompt_ids", "completion_ids", "sizes", "labels"),
    "prompt": ("prompt_ids",),
}
# What decides the tokens of a row, besides the row and the tokenizer.
OPTIONS = ("max_length", "max_prompt_length", "truncation_mode", "completion_only_loss", "assistant_only_loss")


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


@dataclass(frozen=True)
class Examples:
    """Encoded examples: `examples[i]` is a dict of arrays as `chat.encode` gives them (views, not to be written to).

    Attributes:
      arrays: by name, for all rows, the bad ones (empty arrays) among them.
      columns: int or bool arrays over all rows: `targets`, `cut`, `key`, `bad`.
      reasons: kind and detail of the problem, by row, for bad rows.
      index: int64 `[examples]`, the rows that are examples, in order.
      rows: the rows as found, if they came from a data set: `examples.row(i)` has the columns that were not encoded.
      parts: int64 `[examples]`, which of its row's completions an example has, where each is an example of its own
        (`unpaired`: see `part`); None: an example is a row.
    """

    arrays: Mapping[str, Ragged]
    columns: Mapping[str, np.ndarray]
    reasons: Mapping[int, tuple[str, str]]
    index: np.ndarray
    rows: Rows | None = None
    parts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        row = int(self.index[i])
        arrays = {name: _as_mask(name, ragged[row]) for name, ragged in self.arrays.items()}
        return arrays if self.parts is None else _one_completion(arrays, int(self.parts[i]))

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
        if self.parts is not None:
            parts["completion"] = self._of_part("sizes")
        return {**parts, "total": np.sum(list(parts.values()), axis=0)}

    @property
    def labels(self) -> np.ndarray:
        """int64 `[examples]`, 1 for those whose completion is desirable; only of `unpaired` examples."""
        return self._of_part("labels") if self.parts is not None else self._of_row("label")

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

    def good(self) -> Examples:
        """Without the bad ones."""
        return self.select(np.flatnonzero(~self.bad))

    def select(self, which: np.ndarray) -> Examples:
        """Some of the examples, by number."""
        return replace(self, index=self.index[which], parts=None if self.parts is None else self.parts[which])

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

    def _of_part(self, name: str) -> np.ndarray:
        """int64 `[examples]`: each example's own number among those of its row; 0 for bad ones."""
        assert self.parts is not None
        ragged = self.arrays[name]
        flat = np.concatenate([*(values[offsets[0] : offsets[-1]] for values, offsets in ragged.chunks), [0]])
        starts = np.cumsum([0, *ragged.lengths[:-1]])
        there = ragged.lengths[self.index] > 0
        return np.where(there, flat[np.where(there, starts[self.index] + self.parts, -1)], 0).astype(np.int64)

    def _of_row(self, name: str) -> np.ndarray:
        return np.asarray([int(self.arrays[name][int(row)][0]) for row in self.index])


@dataclass(frozen=True)
class Data:
    """Everything a run needs of its data.

    Attributes:
      train: examples; from `load` the good ones, from `inspect` all.
      eval: likewise, to evaluate on.
      report: what was found, for the user.
      tokenizer: with the chat template and EOS that were used; export this one.
    """

    train: Examples
    eval: Examples | None
    report: Report
    tokenizer: PreTrainedTokenizerFast


Packing = Callable[[Mapping[str, np.ndarray]], Mapping[str, float]]


def load(config: DataConfig, tokenizer: PreTrainedTokenizerFast, kind: str, packing: Packing | None = None) -> Data:
    """Reads, encodes and checks the data; bad rows stop the run or are left out, as `config.on_bad` says.

    Args:
      config: what to read and how to encode it.
      tokenizer: left as it is; see `tokenizer.prepare`.
      kind: `sft`, `preference`, `ranking`, `unpaired` or `prompt`.
      packing: measures of packing for the report, see `checks.check`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: bad rows, with file and line; wrong columns; nothing left; options that cannot work.
    """
    data = inspect(config, tokenizer, kind, packing)
    evaluation = None if data.eval is None else admit(data.eval, config.on_bad, "evaluation")
    return replace(data, train=admit(data.train, config.on_bad, "training"), eval=evaluation)


def inspect(config: DataConfig, tokenizer: PreTrainedTokenizerFast, kind: str, packing: Packing | None = None) -> Data:
    """Like `load`, but keeps bad rows, whatever `config.on_bad` says: for a report on the data."""
    tokenizer = prepare(tokenizer, chat_template_path=config.chat_template_path, eos_token=config.eos_token)
    train, evaluation = encode_rows(read(config, kind), tokenizer, kind, config), None
    if config.eval_ratio is not None:
        train, evaluation = hold_out(train, config.eval_ratio, config.seed)
    elif config.eval_path is not None or config.eval_split is not None:
        evaluation = encode_rows(read(config, kind, evaluation=True), tokenizer, kind, config)
    if kind == "unpaired":  # after holding out: both completions of a pair stay on one side
        train, evaluation = take_apart(train), None if evaluation is None else take_apart(evaluation)
    return Data(train, evaluation, check(train, evaluation, packing), tokenizer)


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
    parts = np.repeat([0, 1], [len(examples.index), len(second)])
    return replace(examples, index=np.concatenate([examples.index, second]), parts=parts)


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
    parts = [ENCODING, transformers.__version__, kind, chosen, source, dict(rows.columns), digest(tokenizer)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def from_list(examples: Sequence[Mapping[str, Any]]) -> Examples:
    """Examples from dicts of token ids in memory, all with the same names (see `chat.encode`)."""
    names = list(examples[0])
    arrays = {name: _ragged([np.atleast_1d(example[name]) for example in examples], name) for name in names}
    targets = [int(np.sum(example["loss_mask"])) if "loss_mask" in names else 0 for example in examples]
    zeros = np.zeros(len(examples), np.int64)
    columns = {"targets": np.asarray(targets), "cut": zeros, "key": zeros, "bad": zeros.astype(bool)}
    return Examples(arrays, columns, {}, np.arange(len(examples)))


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
