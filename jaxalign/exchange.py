"""Small values between processes: what one has found, or what each has, known to all; a no-op for one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process writes what is written once: logs, exports, the run's folder."""
    return jax.process_index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first process, on all; the others do not call it, and wait.

    Args:
      make: gives plain data that JSON can hold. An error that it raises is raised on the first process alone.
    """
    if jax.process_count() == 1:
        return make()
    text = np.frombuffer(json.dumps(make()).encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = text
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def from_all(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, `[processes, ...]`, bit for bit; they have the same shape and dtype everywhere."""
    array = np.ascontiguousarray(array)
    if jax.process_count() == 1:
        return array[None]
    # As bytes: on the devices float64 would become float32.
    parts = np.asarray(multihost_utils.process_allgather(array.reshape(-1).view(np.uint8)))
    return parts.reshape(jax.process_count(), -1).view(array.dtype).reshape(jax.process_count(), *array.shape)
