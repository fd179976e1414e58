"""Orders of examples that are a function of the place alone, and supervised examples for batches of rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxalign.data import MixtureOrder


class ExampleList(Protocol):
    """Examples by number, as dicts of arrays."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]:
        """Example i."""
        ...


@dataclass(frozen=True)
class Order:
    """Which example comes at which place, epoch after epoch; nothing is remembered.

    Attributes:
      count: examples.
      seed: of the order.
      shuffle: a new order each epoch; else the order of the data.
      mixture: the order of a mixture, which then has its own seed, shuffle and length of an epoch.
    """

    count: int
    seed: int = 0
    shuffle: bool = True
    mixture: MixtureOrder | None = None

    @property
    def epoch_size(self) -> int:
        """Places of an epoch."""
        return self.count if self.mixture is None else len(self.mixture)

    def take(self, start: int, count: int) -> np.ndarray:
        """int64 `[count]`, the examples at the places from `start`."""
        total = self.epoch_size
        epochs = range(start // total, (start + count - 1) // total + 1)
        orders = np.concatenate([self._epoch(epoch) for epoch in epochs])
        return orders[start % total :][:count].astype(np.int64)

    def _epoch(self, epoch: int) -> np.ndarray:
        total = self.epoch_size
        if self.mixture is not None:
            return np.asarray([self.mixture[place] for place in range(epoch * total, (epoch + 1) * total)])
        return np.random.default_rng([self.seed, epoch]).permutation(total) if self.shuffle else np.arange(total)


@dataclass(frozen=True)
class Supervised:
    """Supervised examples that are mixed into batches of rollouts.

    Attributes:
      examples: as `sft.to_document` takes them.
      order: of them.
      per_prompt: so many for each prompt of a full batch.
    """

    examples: ExampleList
    order: Order
    per_prompt: int = 1

    def take(self, place: int, batch_size: int) -> list[Mapping[str, Any]]:
        """The examples of a batch of `batch_size` prompts, when `place` of them have been taken before."""
        return [self.examples[int(i)] for i in self.order.take(place, self.per_prompt * batch_size)]
