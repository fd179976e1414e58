"""Between processes: what one has found, or what each has, known to all; for one process nothing is sent.

`from_first`, `from_all` and `gathered` are programs on the devices, for the main thread. `Messages` go beside them, for
threads in the background and for waiting long.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jax._src import distributed  # the coordination service has no public name
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


def gathered(array: Any) -> np.ndarray:
    """An array of the devices on the host, whole on every process; all call this. One of numpy comes back as it is."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


class Messages:
    """Plain data between processes through jax's coordination service.

    All processes make the same calls in the same order. Whatever is raised on process 0 is raised on the others too, as
    an OSError with its text.

    Args:
      name: of what is talked about; one thread at a time talks about it.
    """

    _calls: ClassVar[Counter[str]] = Counter()
    _told: ClassVar[defaultdict[str, list[str]]] = defaultdict(list)

    def __init__(self, name: str):
        self._name = name

    def from_first(self, make: Callable[[], Any], seconds: float) -> Any:
        """What `make` gives on process 0, on all, as JSON brings it over; the others do not call it, and wait.

        Raises:
          TimeoutError: process 0 took longer than so many seconds.
        """
        if jax.process_count() == 1:
            return make()
        key = self._key()
        if not is_first():
            return self._hear(0, key, seconds)
        self._told[self._name].append(key)
        return _say(key, make)

    def through_first(self, make: Callable[[], Any], join: Callable[[list[Any]], Any], seconds: float) -> Any:
        """What `join` gives on process 0 for what `make` gives on each process, by its number; on all.

        Raises:
          TimeoutError: another process took longer than so many seconds.
        """
        if jax.process_count() == 1:
            return join([make()])
        key = self._key()
        if not is_first():
            _say(f"{key}/{jax.process_index()}", make)
            return self._hear(0, key, 2 * seconds)  # process 0 says first who is missing

        def joined() -> Any:
            end, parts = time.monotonic() + seconds, [make()]
            for process in range(1, jax.process_count()):
                parts.append(self._hear(process, f"{key}/{process}", max(end - time.monotonic(), 1)))
            # Whoever has answered has heard all that was said before.
            for old in (key, *self._told.pop(self._name, ())):
                _service().key_value_delete(old)
            return join(parts)

        found = _say(key, joined)
        self._told[self._name].append(key)
        return found

    def _key(self) -> str:
        self._calls[self._name] += 1
        return f"jaxalign/{self._name}/{self._calls[self._name]}"

    def _hear(self, process: int, key: str, seconds: float) -> Any:
        try:
            text = _service().blocking_key_value_get(key, round(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(f"{self._name}: process {process} did not answer within {seconds:.0f} s") from error
        said = json.loads(text)
        if "error" in said:
            raise OSError(f"process {process}: {said['error']}")
        return said["value"]


def _say(key: str, make: Callable[[], Any]) -> Any:
    """Says under `key` what `make` gives, or what it raised."""
    try:
        value = make()
    except BaseException as error:
        _service().key_value_set(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    _service().key_value_set(key, json.dumps({"value": value}))
    return value


def _service() -> Any:
    return distributed.global_state.client
