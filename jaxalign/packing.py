"""Examples -> rows: the plan is made from lengths alone, so that processes agree on it without talking. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxalign.placing import PREDICTIONS_MULTIPLE, Piece, bucket, place
from jaxalign.types import Batch, Predictions, TokenRows


@dataclass(frozen=True)
class Document:
    """One example as token ids: a trunk, and completions that branch off it.

    Attributes:
      trunk: int32 `[trunk tokens]`, a prompt, or a whole plain document.
      branches: int32 `[tokens]` each, the completions of the trunk; every token of a branch is a target.
      targets: bool `[trunk tokens]`, which trunk tokens are targets; index 0 never is. None where there are branches:
        no token of the prompt is. Else the prompt's predictions get a completion number of their own, see `build`.
      fields: values per target by name, one float32 array per completion.
      numbers: a number per completion by name.
      read_last: the completions are read, not predicted: each lies in the row whole, and its one prediction has its
        last token (the trunk's, if it has none) as source and 0 as target.
    """

    trunk: np.ndarray
    branches: tuple[np.ndarray, ...] = ()
    targets: np.ndarray | None = None
    fields: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    numbers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    read_last: bool = False


@dataclass(frozen=True)
class Plan:
    """Where the pieces of a global batch go.

    Attributes:
      rows: rows per micro-batch and process.
      length: tokens per row.
      predictions: predictions per row.
      places: per micro-batch and process, for each row the pieces in it as (document, branch); branch -1 = all of it.
      completions: per document, how many it has.
    """

    rows: int
    length: int
    predictions: int
    places: tuple[tuple[tuple[tuple[tuple[int, int], ...], ...], ...], ...]
    completions: tuple[int, ...]


def measure(
    trunk: int, branches: Sequence[int] = (), last_target: int = 0, targets: int = 0, *, read_last: bool = False
) -> Piece:
    """The piece of a document with shared prompt, from lengths: of branches, or up to a plain trunk's last target."""
    if branches and read_last:
        return Piece(trunk + sum(branches), len(branches) + targets, len(branches))
    if branches:
        return Piece(trunk + sum(max(n - 1, 0) for n in branches), sum(branches) + targets, len(branches))
    return Piece(last_target, targets)


def measure_document(document: Document) -> Piece:
    """The piece of a document with shared prompt."""
    if document.branches:
        sizes = [len(branch) for branch in document.branches]
        return measure(len(document.trunk), sizes, targets=_prompt_targets(document), read_last=document.read_last)
    wanted = np.flatnonzero(_trunk_targets(document))
    return measure(len(document.trunk), (), int(wanted[-1]) if len(wanted) else 0, len(wanted))


def unshare(trunk: int, branches: Sequence[int], targets: int = 0, *, read_last: bool = False) -> list[Piece]:
    """The pieces when every completion gets its own copy of the prompt, the first with its targets."""
    wanted = [targets] + [0] * len(branches)
    return [measure(trunk, [n], targets=wanted[i], read_last=read_last) for i, n in enumerate(branches)]


def plan(
    pieces: Sequence[Sequence[Piece]],
    *,
    micro_batches: int,
    micro_batch_size: int,
    length: int,
    shards: int = 1,
    processes: int = 1,
    predictions_multiple: int = PREDICTIONS_MULTIPLE,
) -> Plan:
    """Plans a global batch.

    Args:
      pieces: per document of the global batch, in its order: one piece, or one per completion (prompt not shared).
      micro_batches: number of micro-batches; the last ones may be partly or wholly empty.
      micro_batch_size: documents per micro-batch.
      length: tokens per row.
      shards: rows per process are a multiple of this (the devices of one process that split the batch).
      processes: document i belongs to process `i % processes`.
      predictions_multiple: predictions per row are rounded up to multiples of it.

    Raises:
      ValueError: a document longer than a row, or more documents than places.
    """
    if len(pieces) > micro_batches * micro_batch_size:
        raise ValueError(f"{len(pieces)} examples do not fit {micro_batches} micro-batches of {micro_batch_size}")
    for index, document in enumerate(pieces):
        longest = max((piece.size for piece in document), default=0)
        if longest > length:
            raise ValueError(f"example {index} of the batch needs {longest} tokens, but a row has {length}")
    places, most_rows, most_predictions = [], 1, 1
    for micro in range(micro_batches):
        members = range(micro * micro_batch_size, min((micro + 1) * micro_batch_size, len(pieces)))
        per_process = []
        for process in range(processes):
            names = _names([i for i in members if i % processes == process], pieces)
            placed = place([_piece(pieces, name) for name in names], length)
            packed = tuple(tuple(names[i] for i in row) for row in placed)
            predictions = [sum(_piece(pieces, name).predictions for name in row) for row in packed]
            most_rows, most_predictions = max(most_rows, len(packed)), max([most_predictions, *predictions])
            per_process.append(packed)
        places.append(tuple(per_process))
    completions = tuple(sum(piece.completions for piece in document) for document in pieces)
    return Plan(
        bucket(most_rows, shards), length, bucket(most_predictions, predictions_multiple), tuple(places), completions
    )


def build(
    plan: Plan, documents: Mapping[int, Document], *, micro_batch_size: int, completions: int, process: int = 0
) -> Batch:
    """The rows of one process.

    Args:
      plan: of the global batch.
      documents: by their index in the global batch; those of other processes are looked up for their `numbers` alone.
      micro_batch_size: documents per micro-batch, as planned.
      completions: most completions of a document; number k of a micro-batch's document i is `i * completions + k`,
        and that of its prompt, where prompts have targets, `micro_batch_size * completions + i`.
      process: which process's rows to build.

    Returns:
      numpy arrays; `present` covers all processes' completions.
    """
    micro = len(plan.places)
    rows = {
        name: np.zeros((micro, plan.rows, plan.length), np.int32)
        for name in ("tokens", "positions", "documents", "branches")
    }
    shape = (micro, plan.rows, plan.predictions)
    predictions = {name: np.zeros(shape, np.int32) for name in ("sources", "targets", "steps")}
    predictions["completions"] = np.full(shape, -1, np.int32)
    present = np.zeros((micro, micro_batch_size * completions), np.float32)
    fields = _numbers(documents, present.shape, micro_batch_size, completions)
    for m, per_process in enumerate(plan.places):
        for document, branch in (name for packed in per_process for row in packed for name in row):
            first = (document % micro_batch_size) * completions
            present[m, first + np.arange(plan.completions[document]) if branch < 0 else first + branch] = 1
        for r, row in enumerate(per_process[process]):
            start = asked = 0
            for number, (index, branch) in enumerate(row, 1):
                local = index % micro_batch_size
                prompt = micro_batch_size * completions + local
                piece = _lay_out(documents[index], branch, local * completions, prompt)
                size, wanted = len(piece["tokens"]), len(piece["targets"])
                for name, values in rows.items():
                    values[m, r, start : start + size] = number if name == "documents" else piece[name]
                for name, values in predictions.items():
                    values[m, r, asked : asked + wanted] = piece[name] + (start if name == "sources" else 0)
                for name, values in piece["fields"].items():
                    fields.setdefault(name, np.zeros(shape, np.float32))[m, r, asked : asked + wanted] = values
                start, asked = start + size, asked + wanted
    return Batch(TokenRows(**rows), Predictions(**predictions), present, fields)


def pack(
    documents: Sequence[Document],
    *,
    completions: int,
    micro_batch_size: int | None = None,
    micro_batches: int | None = None,
    length: int | None = None,
    share_prompt: bool = True,
    shards: int = 1,
) -> Batch:
    """Plans and builds a batch in one process.

    Args:
      documents: the examples of the global batch.
      completions: most completions of a document.
      micro_batch_size: documents per micro-batch; all in one by default.
      micro_batches: as many as are needed by default.
      length: tokens per row; by default the longest document's, rounded up to a multiple of 64.
      share_prompt: one copy of the prompt for all branches of a document, or one for each.
      shards: rows are a multiple of this.
    """
    micro_batch_size = micro_batch_size or max(len(documents), 1)
    micro_batches = micro_batches or max(1, -(-len(documents) // micro_batch_size))
    pieces = [pieces_of(document, share_prompt) for document in documents]
    length = length or -(-max((piece.size for each in pieces for piece in each), default=1) // 64) * 64
    planned = plan(pieces, micro_batches=micro_batches, micro_batch_size=micro_batch_size, length=length, shards=shards)
    return build(planned, dict(enumerate(documents)), micro_batch_size=micro_batch_size, completions=completions)


def pieces_of(document: Document, share_prompt: bool) -> list[Piece]:
    """The pieces of a document, in branch order when the prompt is not shared."""
    if document.branches and not share_prompt:
        sizes = [len(branch) for branch in document.branches]
        return unshare(len(document.trunk), sizes, _prompt_targets(document), read_last=document.read_last)
    return [measure_document(document)]


def efficiency(batch: Batch) -> float:
    """Real tokens over row tokens."""
    documents = np.asarray(batch.rows.documents)
    return float((documents > 0).sum() / documents.size)


def _numbers(
    documents: Mapping[int, Document], shape: tuple[int, int], micro_batch_size: int, completions: int
) -> dict[str, np.ndarray]:
    """Fields `[micro, completions]`."""
    fields: dict[str, np.ndarray] = {}
    for index, document in documents.items():
        micro, first = index // micro_batch_size, (index % micro_batch_size) * completions
        for name, values in document.numbers.items():
            fields.setdefault(name, np.zeros(shape, np.float32))[micro, first : first + len(values)] = values
    return fields


def _trunk_targets(document: Document) -> np.ndarray:
    if document.targets is None:
        raise ValueError("a document without branches needs `targets`: which of its tokens are predicted")
    if len(document.targets) and document.targets[0]:
        raise ValueError("the first token of a document has nothing before it and cannot be a target")
    return document.targets


def _prompt_targets(document: Document) -> int:
    """Targets among the trunk's tokens, in a document with branches."""
    return 0 if document.targets is None else int(_trunk_targets(document).sum())


def _names(members: Sequence[int], pieces: Sequence[Sequence[Piece]]) -> list[tuple[int, int]]:
    return [(i, b if len(pieces[i]) > 1 else -1) for i in members for b in range(len(pieces[i]))]


def _piece(pieces: Sequence[Sequence[Piece]], name: tuple[int, int]) -> Piece:
    return pieces[name[0]][max(name[1], 0)]


def _lay_out(document: Document, branch: int, first_completion: int, prompt: int) -> dict:
    if not document.branches:
        return _lay_out_trunk(document, first_completion)
    chosen = range(len(document.branches)) if branch < 0 else [branch]
    trunk = len(document.trunk)
    parts: dict[str, list] = {
        "tokens": [document.trunk],
        "positions": [np.arange(trunk)],
        "branches": [np.zeros(trunk)],
    }
    asked: dict[str, list] = {"sources": [], "targets": [], "completions": [], "steps": []}
    start = trunk
    for b in chosen:
        tokens = document.branches[b]
        size = len(tokens) if document.read_last else max(len(tokens) - 1, 0)
        parts["tokens"].append(tokens[:size])
        parts["positions"].append(trunk + np.arange(size))
        parts["branches"].append(np.full(size, b + 1))
        # The trunk's last token predicts a branch's first.
        sources = np.concatenate([[trunk - 1], start + np.arange(size)])
        targets = np.zeros(1) if document.read_last else tokens
        asked["sources"].append(sources[-1:] if document.read_last else sources[: len(tokens)])
        asked["targets"].append(targets)
        asked["completions"].append(np.full(len(targets), first_completion + b))
        asked["steps"].append(np.arange(len(targets)))
        start += size
    extra = 0
    if document.targets is not None and 0 in chosen:
        wanted = np.flatnonzero(_trunk_targets(document))
        extra = len(wanted)
        asked["sources"].append(wanted - 1)
        asked["targets"].append(document.trunk[wanted])
        asked["completions"].append(np.full(extra, prompt))
        asked["steps"].append(np.arange(extra))
    joined = {name: np.concatenate(values).astype(np.int32) for name, values in {**parts, **asked}.items()}
    # Fields belong to completions: the prompt's predictions have zeros there.
    none = np.zeros(extra, np.float32)
    fields = {name: np.concatenate([*(values[b] for b in chosen), none]) for name, values in document.fields.items()}
    return {**joined, "fields": fields}


def _lay_out_trunk(document: Document, completion: int) -> dict:
    wanted = np.flatnonzero(_trunk_targets(document))
    size = int(wanted[-1]) if len(wanted) else 0
    return {
        "tokens": document.trunk[:size],
        "positions": np.arange(size),
        "branches": np.zeros(size, np.int32),
        "sources": wanted - 1,
        "targets": document.trunk[wanted],
        "completions": np.full(len(wanted), completion),
        "steps": np.arange(len(wanted)),
        "fields": {name: values[0] for name, values in document.fields.items()},
    }
