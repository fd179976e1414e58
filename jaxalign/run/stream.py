"""What a stage does with rows that are left out, and with data that are streamed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from jaxalign import data
from jaxalign.files import write_text
from jaxalign.methods.offline import OfflineSource, make_stream_batches
from jaxalign.run.inputs import Examples
from jaxalign.run.prepare import Prepared
from jaxalign.training.metrics import JsonLines

REMOVED = "removed.jsonl"


def make_stream_source(ready: Prepared, stream: data.Stream, examples: Examples, folder: Path) -> OfflineSource:
    """The source of a stage whose training data are streamed; what is left out goes to removed.jsonl on the way."""
    prefetch = ready.stage.train.prefetch
    batches = make_stream_batches(ready.method, ready.stage.method, stream, ready.layout, prefetch=prefetch)
    return OfflineSource(batches, ready.mesh, examples.fill, keep=RemovedLog(folder / REMOVED))


class RemovedLog:
    """Appends the rows that a stream left out, each with the step on whose way that happened.

    A resumed run comes by the same rows again: the first line that it writes goes behind those of earlier steps. Of
    several processes, which all meet the same rows, the first one writes.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lines: JsonLines | None = None

    def __call__(self, step: int, removed: Sequence[data.Removed]) -> None:
        """Writes those left out on the way to a step's batch."""
        if jax.process_index() != 0:
            return
        if self._lines is None:
            self._lines = JsonLines(self._path, step - 1 if step > 1 else None)
        for each in removed:
            self._lines.write(step, asdict(each))

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()


def write_removed(path: Path, removed: Sequence[data.Removed]) -> None:
    """Writes rows that were left out as JSON lines: `file`, `line`, `filter`, `reason`, `row`; in the first process."""
    if jax.process_index() != 0:
        return
    write_text(path, "".join(_line(asdict(each)) for each in removed))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"
