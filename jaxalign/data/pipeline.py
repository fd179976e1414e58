"""The order of training: shuffled anew each epoch, the same on every process, prefetched, continued from any place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain
import numpy as np

from jaxalign.data.examples import Examples
from jaxalign.data.mixture import MixtureOrder

T = TypeVar("T")
THREADS = 4


@dataclass(frozen=True)
class HostBatch(Generic[T]):
    """What `Batches` gives out.

    Attributes:
      data: what `transform` made of the batch.
      indices: int64 `[batch]`, the examples of the global batch; the last batch of an epoch may be shorter.
      own: those of them that this process takes, `indices[process::processes]`.
      epoch: epochs done after this batch, for example 1.25.
      tokens: tokens of the global batch's examples, prompts counted once.
    """

    data: T
    indices: np.ndarray
    own: np.ndarray
    epoch: float
    tokens: int


class Batches(Generic[T]):
    """An iterator over global batches that remembers one number, its position.

    The order is a pure function of `seed` and epoch over the global data, and only then split between processes, so
    that the number of processes does not change what is in a batch. `transform` runs in background threads, ahead of
    use, with the indices of the whole global batch (every process plans from all lengths and reads its own share):
    it must depend on nothing else, and be safe to call from several threads.

    Args:
      examples: what is counted and measured; `transform` looks them up itself.
      batch_size: examples per global batch.
      transform: int64 `[batch]` indices of the global batch -> `HostBatch.data`.
      seed: of the order.
      epochs: how often all examples are given out; None for ever.
      shuffle: a new order each epoch; else the order of the data.
      process: number of this process.
      processes: number of processes.
      prefetch: batches made ahead; 0 makes each when asked, in the caller's thread.
      order: of a mixture, which then has its own seed, shuffle and length of an epoch.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        transform: Callable[[np.ndarray], T],
        *,
        seed: int = 42,
        epochs: int | None = 1,
        shuffle: bool = True,
        process: int = 0,
        processes: int = 1,
        prefetch: int = 2,
        order: MixtureOrder | None = None,
    ):
        if not len(examples):
            raise ValueError("no examples to make batches of")
        if batch_size < 1 or prefetch < 0 or (epochs is not None and epochs < 1):
            raise ValueError(f"batch_size={batch_size}, epochs={epochs} and prefetch={prefetch} must be positive")
        if not 0 <= process < processes:
            raise ValueError(f"process={process} is not one of {processes} processes")
        self._count, self._batch_size = len(examples) if order is None else len(order), batch_size
        self._process, self._processes = process, processes
        self._transform = transform
        self._sizes = examples.lengths["total"]
        places = grain.MapDataset.range(self._count)
        if order is not None:
            mixed = order
            places = places.map_with_index(lambda place, _: mixed[place])
        elif shuffle:
            places = places.shuffle(seed=_mixed(seed))
        batches = places.batch(batch_size, drop_remainder=False, batch_fn=_stacked).repeat(epochs)
        self._length = len(batches)
        threads = min(prefetch, THREADS)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        numbered = batches.map_with_index(lambda number, indices: self._make(number, indices))
        self._batches = iter(numbered.to_iter_dataset(options))
        self._position = 0

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in one pass over the examples."""
        return -(-self._count // self._batch_size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Batches[T]:
        return self

    def __next__(self) -> HostBatch[T]:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except BaseException:
            self.restore(self.state())  # an error or an interrupt must not skip the batch that was being waited for
            raise
        self._position += 1
        return batch

    def state(self) -> dict[str, int]:
        """The position: global batches given out so far, on every process the same number."""
        return {"position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a position that `state` gave: the batches that follow are those that would have followed.

        Raises:
          ValueError: the position lies beyond the last batch.
        """
        position = int(state["position"])
        if not 0 <= position <= self._length:
            raise ValueError(f"position {position} of the data does not exist: there are {self._length} batches")
        self._batches.set_state({"next_index": position})
        self._position = position

    def close(self) -> None:
        """Ends the threads, once each has finished the batch it is at; no batches come after that."""
        self._batches.close()

    def __enter__(self) -> Batches[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, number: int, indices: np.ndarray) -> HostBatch[T]:
        done, within = divmod(number, self.batches_per_epoch)
        epoch = done + min((within + 1) * self._batch_size, self._count) / self._count
        own = indices[self._process :: self._processes]
        return HostBatch(self._transform(indices), indices, own, epoch, int(self._sizes[indices].sum()))


def _stacked(indices: Any) -> np.ndarray:
    return np.asarray(indices, np.int64)


def _mixed(seed: int) -> int:
    """Grain shuffles epoch e by seed + e: neighbouring seeds, unmixed, would run through the same orders."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
