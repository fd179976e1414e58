"""The source of every offline method: packed batches of a data set, with the reference's log-probs filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.data import Bad, Batches, Examples, MixtureOrder, Removed, Stream, StreamBatch, StreamBatches
from jaxalign.methods.common import Example, borrows, to_documents
from jaxalign.methods.row_length import attention_weight, choose_length, prediction_weight
from jaxalign.models import ModelConfig
from jaxalign.models.context import length_multiple
from jaxalign.packing import build, pieces_of, plan
from jaxalign.placing import Piece, share_out
from jaxalign.sharding import data_shards, place_batch, process_count, rows_stay_in_processes
from jaxalign.types import Batch

# How many micro-batches `choose_length` looks at: enough for a steady mean, few enough to take no time.
SAMPLED_MICRO_BATCHES = 64


class ExampleList(Protocol):
    """Examples by number, as dicts of arrays."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, i: int, /) -> Example:
        """Example `i`."""
        ...


class Keep(Protocol):
    """Takes the rows that a stream left out."""

    def __call__(self, number: int, removed: Sequence[Removed], /) -> None:
        """Those left out on the way to batch `number`."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


@dataclass(frozen=True)
class Layout:
    """How a global batch becomes arrays.

    Attributes:
      batch_size: examples per optimiser step, over all processes.
      micro_batch_size: examples per micro-batch, over all processes.
      length: tokens per row.
      shards: devices of this process that split the rows.
      process: number of this process.
      processes: number of processes.
      max_length: most tokens of a prompt with a completion of another example, for methods that join them.
    """

    batch_size: int
    micro_batch_size: int
    length: int
    shards: int = 1
    process: int = 0
    processes: int = 1
    max_length: int | None = None


@dataclass(frozen=True)
class Packed:
    """A batch on the host.

    Attributes:
      batch: the rows of this process.
      num_tokens: of the global batch's examples.
      places: of each example, where it lies in the batch: example i has place `p % micro_batch_size` in micro-batch
        `p // micro_batch_size`, with `p = places[i]`.
    """

    batch: Batch
    num_tokens: int
    places: tuple[int, ...]


class OfflineSource:
    """Batches of a data set; the train state is not looked at.

    Args:
      batches: packed batches, see `make_batches`.
      mesh: where they go.
      fill: adds what the loss needs and the examples do not carry, for example `ref_logps`.
      keep: takes the number of a batch, from 1, and the rows that a stream left out on the way to it.
    """

    def __init__(
        self,
        batches: Batches[Packed] | StreamBatches[Packed],
        mesh: Mesh,
        fill: Callable[[Batch], Batch] | None = None,
        keep: Keep | None = None,
    ):
        self._batches, self._mesh, self._fill, self._keep = batches, mesh, fill, keep
        self._num_tokens = 0

    def next(self, state: Any) -> tuple[Batch, dict[str, float | int]]:
        """The next batch on the mesh, with `epoch` and the `num_tokens` trained on so far."""
        del state
        host = next(self._batches)
        self._num_tokens += host.data.num_tokens
        batch = place_batch(self._mesh, host.data.batch)
        metrics: dict[str, float | int] = {"epoch": host.epoch, "num_tokens": self._num_tokens}
        if isinstance(host, StreamBatch):
            metrics["dropped_rows"] = host.dropped
            if host.removed and self._keep is not None:
                self._keep(self._batches.state()["position"], host.removed)
        return (self._fill(batch) if self._fill else batch), metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with the batch after the last one given."""
        return {**self._batches.state(), "num_tokens": self._num_tokens}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self._batches.restore(state)
        self._num_tokens = int(state["num_tokens"])

    def close(self) -> None:
        """Ends the prefetching threads."""
        self._batches.close()
        if self._keep is not None:
            self._keep.close()


def make_layout(
    method: ModuleType,
    config: Any,
    examples: Sequence[Examples],
    model: ModelConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    row_length: int | str = "auto",
    seed: int = 0,
    least: int = 0,
    max_length: int | None = None,
) -> Layout:
    """The layout that serves all given data sets; with `auto`, the row length that is cheapest for the first.

    Rows are at least `least` tokens long then.

    Raises:
      ValueError: a micro-batch that the processes cannot share evenly, or an example longer than `row_length`.
    """
    micro = micro_batch_size or batch_size
    shards, process, processes = split(mesh, micro)
    longest = max(_longest(method, config, each, max_length) for each in examples)
    if isinstance(row_length, int):
        if row_length < longest:
            raise ValueError(f"train.row_length={row_length}, but the longest example has {longest} tokens")
        length = row_length
    else:
        first = examples[0]
        order = np.random.default_rng(seed).permutation(len(first))[: SAMPLED_MICRO_BATCHES * micro]
        share = getattr(config, "share_prompt", True)
        documents = to_documents(method, config, [first[int(i)] for i in order], max_length)
        pieces = [pieces_of(document, share) for document in documents]
        batches = [pieces[start : start + batch_size] for start in range(0, len(pieces), batch_size)]
        # A tensor core or a systolic array wants multiples of 128; on CPU padding costs more than an odd shape.
        multiple = 32 if mesh.devices.flat[0].platform == "cpu" else 128
        length = choose_length(
            batches,
            micro,
            attention_weight=attention_weight(model),
            prediction_weight=prediction_weight(model),
            multiple=multiple,
            longest=max(longest, least),
        )
    length = split_length(length, mesh)
    return Layout(batch_size, micro, length, shards, process, processes, max_length)


def split_length(length: int, mesh: Mesh) -> int:
    """A row's length rounded up so that the devices of `context` can share it."""
    multiple = length_multiple(mesh, length)
    return -(-length // multiple) * multiple


def split(mesh: Mesh, micro_batch_size: int) -> tuple[int, int, int]:
    """How micro-batches are shared: data shards of a process, number of this process, number of processes.

    A slice that is not here has hosts and one process that plans for them all: it has all shards, but what they could
    not share is refused.

    Raises:
      ValueError: as `check_split`.
    """
    check_split(mesh, micro_batch_size)
    processes = jax.process_count()
    return data_shards(mesh) // processes, jax.process_index(), processes


def check_split(mesh: Mesh, micro_batch_size: int) -> None:
    """Raises ValueError where the processes of the mesh cannot share a micro-batch, or the data shards, evenly."""
    processes = process_count(mesh)
    if micro_batch_size % processes:
        raise ValueError(
            f"train.micro_batch_size={micro_batch_size} must be a multiple of the number of processes ({processes})"
        )
    if data_shards(mesh) % processes or not rows_stay_in_processes(mesh.devices):
        raise ValueError(
            f"mesh: data × fsdp × expert = {data_shards(mesh)} must be a multiple of the {processes} processes: the "
            "devices of `tensor` and `context` that share rows belong to one process"
        )


def make_batches(
    method: ModuleType,
    config: Any,
    examples: Examples,
    layout: Layout,
    *,
    lookup: ExampleList | None = None,
    seed: int = 0,
    epochs: int | None = 1,
    shuffle: bool = True,
    prefetch: int = 2,
    order: MixtureOrder | None = None,
) -> Batches[Packed]:
    """Packed batches in global order, prefetched.

    Args:
      method: a module of `METHODS`.
      config: its Config.
      examples: what is counted and measured.
      layout: see `make_layout`.
      lookup: where the examples are taken from, if they carry more than `examples` does.
      seed: of the order.
      epochs: passes; None for ever.
      shuffle: a new order each epoch.
      prefetch: batches made ahead.
      order: of a mixture, see `Batches`.
    """
    source = examples if lookup is None else lookup

    def pack(indices: np.ndarray) -> Packed:
        return pack_global(method, config, [source[int(i)] for i in indices], layout)

    return Batches(
        examples,
        layout.batch_size,
        pack,
        seed=seed,
        epochs=epochs,
        shuffle=shuffle,
        process=layout.process,
        processes=layout.processes,
        prefetch=prefetch,
        order=order,
    )


def make_stream_batches(
    method: ModuleType, config: Any, stream: Stream, layout: Layout, *, prefetch: int = 2
) -> StreamBatches[Packed]:
    """Packed batches of a stream; an example that does not fit a row is bad data, as `on_bad` says."""

    def check(example: Example) -> None:
        share = getattr(config, "share_prompt", True)
        longest = max(piece.size for piece in pieces_of(method.to_document(config, example), share))
        if longest > layout.length:
            raise Bad("longer than a row", f"{longest} tokens; set train.row_length, which is {layout.length} here")

    def pack(examples: Sequence[Example]) -> Packed:
        return pack_global(method, config, examples, layout)

    return StreamBatches(
        stream,
        layout.batch_size,
        pack,
        check=check,
        process=layout.process,
        processes=layout.processes,
        prefetch=prefetch,
    )


def make_source(
    method: ModuleType,
    config: Any,
    examples: Examples,
    layout: Layout,
    mesh: Mesh,
    *,
    fill: Callable[[Batch], Batch] | None = None,
    **order: Any,
) -> OfflineSource:
    """The source of an offline method; `order` as `make_batches`, the rest as there and in `OfflineSource`."""
    return OfflineSource(make_batches(method, config, examples, layout, **order), mesh, fill)


def pack_global(method: ModuleType, config: Any, examples: Sequence[Example], layout: Layout) -> Packed:
    """This process's rows of a global batch; the micro-batches are always as many as a full batch has."""
    documents = to_documents(method, config, examples, layout.max_length)
    micro_batches, size = layout.batch_size // layout.micro_batch_size, layout.micro_batch_size
    pieces = [pieces_of(document, getattr(config, "share_prompt", True)) for document in documents]
    places = share_out(pieces, micro_batches, size)
    # The last batch of an epoch leaves places empty.
    shared: list[Sequence[Piece]] = [()] * (micro_batches * size)
    for place, each in zip(places, pieces, strict=True):
        shared[place] = each
    planned = plan(
        shared,
        micro_batches=micro_batches,
        micro_batch_size=size,
        length=layout.length,
        shards=layout.shards,
        processes=layout.processes,
    )
    batch = build(
        planned,
        dict(zip(places, documents, strict=True)),
        micro_batch_size=size,
        completions=method.COMPLETIONS,
        process=layout.process,
    )
    return Packed(batch, sum(method.count_tokens(example) for example in examples), tuple(places))


def packing_report(method: ModuleType, config: Any, examples: ExampleList, layout: Layout) -> dict[str, float]:
    """Measures of packing over a data set in its own order: `row_length`, `efficiency`, `shapes` that will compile."""
    used = rows = 0
    shapes = set()
    for batch in _cut(examples, layout.batch_size):
        packed = pack_global(method, config, batch, layout).batch
        used += int((np.asarray(packed.rows.documents) > 0).sum())
        rows += int(np.asarray(packed.rows.tokens).size)
        shapes.add((packed.rows.tokens.shape, packed.predictions.sources.shape))
    return {"row_length": layout.length, "efficiency": used / rows, "shapes": len(shapes)}


def _cut(examples: ExampleList, size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield [examples[i] for i in range(start, min(start + size, len(examples)))]


def _longest(method: ModuleType, config: Any, examples: Examples, max_length: int | None) -> int:
    lengths = examples.lengths
    branches = {name: part for name, part in lengths.items() if name not in ("prompt", "total")}
    if borrows(method, config):
        room = (max_length or np.iinfo(np.int64).max) - lengths["prompt"]
        branches["borrowed"] = np.minimum(lengths["completion"].max(), room)
    if getattr(config, "share_prompt", True):
        return int((lengths["total"] + branches.get("borrowed", 0)).max())
    return int((lengths["prompt"] + np.max(list(branches.values()), axis=0)).max())
