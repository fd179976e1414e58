"""Batches of a stream: prefetched, and continued from any place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grain
import numpy as np

from jaxalign.data.filters import Removed
from jaxalign.data.pipeline import HostBatch
from jaxalign.data.stream import PASS, Place, Stream, Window

T = TypeVar("T")
Transform = Callable[[Sequence[Mapping[str, np.ndarray]]], T]


@dataclass(frozen=True)
class StreamBatch(HostBatch[T], Generic[T]):
    """What `StreamBatches` gives out; `indices` count the examples of the stream, `epoch` whole passes over it.

    Attributes:
      removed: rows that were left out on the way to this batch.
      dropped: how many there were since the stream began.
    """

    removed: tuple[Removed, ...] = field(default=())
    dropped: int = 0


class StreamBatches(Generic[T]):
    """An iterator without end over global batches of a stream, see `Batches`; it remembers a few whole numbers.

    Every process reads the same stream and takes its own share of each batch, `indices[process::processes]`.

    Args:
      stream: what is read.
      batch_size: examples per global batch.
      transform: the examples of the global batch -> `HostBatch.data`; runs in a background thread.
      check: raises `Bad` for an example that cannot be used.
      process: number of this process.
      processes: number of processes.
      prefetch: batches made ahead; 0 makes each when asked, in the caller's thread.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        transform: Transform[T],
        *,
        check: Callable[[Mapping[str, np.ndarray]], None] = lambda arrays: None,
        process: int = 0,
        processes: int = 1,
        prefetch: int = 2,
    ):
        if batch_size < 1 or prefetch < 0:
            raise ValueError(f"batch_size={batch_size} and prefetch={prefetch} must be positive")
        if not 0 <= process < processes:
            raise ValueError(f"process={process} is not one of {processes} processes")
        made = _Dataset(lambda: _Batches(stream, batch_size, transform, check, process, processes))
        batches = iter(grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=prefetch))
        self._open: grain.DatasetIterator | None = batches

    def __iter__(self) -> StreamBatches[T]:
        return self

    def __next__(self) -> StreamBatch[T]:
        before, batches = self.state(), self._batches
        try:
            return next(batches)
        except BaseException:
            self.restore(before)  # an error or an interrupt must not skip the batch that was being waited for
            raise

    @property
    def _batches(self) -> grain.DatasetIterator:
        if self._open is None:
            raise ValueError("these batches are closed")
        return self._open

    def state(self) -> dict[str, Any]:
        """`position` (global batches given out), the window, how much of it was taken, where it began."""
        return dict(self._batches.get_state())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` gave: the batches that follow are those that would have followed.

        Raises:
          ValueError: it is the state of another stream, or of data that were not streamed.
        """
        self._batches.set_state(dict(state))

    def close(self) -> None:
        """Ends the thread, once it has finished the batch it is at; no batches come after that."""
        if self._open is not None:
            self._open.close()
            self._open = None  # grain's iterator closes itself again when it goes, which must not be at the very end

    def __enter__(self) -> StreamBatches[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Dataset(grain.IterDataset):
    """What grain wants to prefetch from."""

    def __init__(self, make: Callable[[], grain.DatasetIterator]):
        super().__init__()
        self._make = make

    def __iter__(self) -> grain.DatasetIterator:
        return self._make()


class _Batches(grain.DatasetIterator, Generic[T]):
    """Batches one by one; the state is that after the last one."""

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        transform: Transform[T],
        check: Callable[[Mapping[str, np.ndarray]], None],
        process: int,
        processes: int,
    ):
        super().__init__()
        self._stream, self._batch_size, self._transform, self._check = stream, batch_size, transform, check
        self._process, self._processes = process, processes
        self._position = self._number = self._taken = self._dropped = 0
        self._places = stream.start
        self._windows: Iterator[Window] | None = None
        self._window: Window | None = None

    def __next__(self) -> StreamBatch[T]:
        removed: list[Removed] = []
        examples = [self._example(removed) for _ in range(self._batch_size)]
        indices = np.arange(self._position * self._batch_size, (self._position + 1) * self._batch_size)
        self._position += 1
        self._dropped += len(removed)
        # The part that has been read through the fewest times says how many epochs are done.
        reached = self._places if self._window is None else self._window.after
        return StreamBatch(
            data=self._transform(examples),
            indices=indices,
            own=indices[self._process :: self._processes],
            epoch=float(min(place[PASS] for place in reached)),
            tokens=sum(len(ids) for each in examples for name, ids in each.items() if name.endswith("_ids")),
            removed=tuple(removed),
            dropped=self._dropped,
        )

    def get_state(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "window": self._number,
            "taken": self._taken,
            "dropped": self._dropped,
            "places": np.asarray(self._places, np.int64),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        missing = [name for name in self.get_state() if name not in state]
        if missing:
            raise ValueError(f"this is not the state of a stream: it lacks {', '.join(missing)}")
        places = np.asarray(state["places"], np.int64)
        if places.shape != np.asarray(self._stream.start).shape:
            raise ValueError(f"the state is of a stream of {len(places)} parts; this one has {len(self._stream.start)}")
        self._position, self._number = int(state["position"]), int(state["window"])
        self._taken, self._dropped = int(state["taken"]), int(state["dropped"])
        self._places: tuple[Place, ...] = tuple(tuple(place) for place in places.tolist())
        self._windows = self._window = None

    def _example(self, removed: list[Removed]) -> Mapping[str, np.ndarray]:
        if self._windows is None:
            self._windows = self._stream.windows(self._number, self._places, self._check)
        if self._window is None:
            self._window = next(self._windows)
            # What was left out on the way to a window is told with its first example, so that it is told once.
            removed += self._window.removed if not self._taken else ()
        example = self._window.examples[self._taken]
        self._taken += 1
        if self._taken == len(self._window.examples):
            self._places, self._number, self._taken = self._window.after, self._number + 1, 0
            self._window = None
        return example
