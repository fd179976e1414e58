"""Reference log-probs computed once over a data set and kept on disk, for this run and all others that ask the same.

A folder per key (rows, their tokens, the reference) holds one file per `PART` examples: a line of JSON that says what
it is, then the float32 log-probs. A part is written when its examples are done, so a run that is killed goes on with
the next one; a file that is not what its name says is reported and computed anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxalign.data import Examples
from jaxalign.methods.common import Example
from jaxalign.methods.offline import Layout, make_batches
from jaxalign.sharding import place_batch
from jaxalign.types import Batch

logger = logging.getLogger("jaxalign")

VERSION = "2"  # raise it when the same rows and reference give other numbers
PART = 1024  # examples per file: a few seconds to a few minutes of work
ALIGNMENT = 64  # bytes; the log-probs begin at a multiple of it


@dataclass(frozen=True)
class WithReference:
    """Examples that carry `ref_<branch>_logps`, float32 per token.

    Attributes:
      examples: without them.
      parts: float32, of all completions of `size` examples each, end to end, an example's in the order of its branches.
      starts: int64 `[examples]`, where each example begins in its part.
      branches: their names: `chosen` and `rejected`, or `completion`.
      size: examples per part.
    """

    examples: Examples
    parts: tuple[np.ndarray, ...]
    starts: np.ndarray
    branches: tuple[str, ...]
    size: int = PART

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        example = self.examples[i]
        values = self.parts[i // self.size]
        ends = int(self.starts[i]) + np.cumsum([0, *(len(example[f"{name}_ids"]) for name in self.branches)])
        spans = zip(self.branches, itertools.pairwise(ends), strict=True)
        return {**example, **{f"ref_{name}_logps": values[start:end] for name, (start, end) in spans}}


def cache_key(examples: Examples, fingerprint: str) -> str:
    """SHA-256 over every token of the examples and the reference's fingerprint."""
    digest = hashlib.sha256(f"{VERSION} {fingerprint} {len(examples)}".encode())
    for i in range(len(examples)):
        for name, ids in sorted(examples[i].items()):
            digest.update(f"{name} {len(ids)} ".encode())
            digest.update(np.ascontiguousarray(ids).tobytes())
    return digest.hexdigest()


def precompute(
    method: ModuleType,
    config: Any,
    examples: Examples,
    layout: Layout,
    mesh: Mesh,
    reference: Callable[[Batch], Batch],
    folder: Path,
    key: str,
    *,
    size: int = PART,
) -> WithReference:
    """Log-probs of all completions, read from `folder` as far as they are there, else computed and written there.

    Args:
      method: a module of `METHODS` with `BRANCHES`.
      config: its Config.
      examples: what it learns from.
      layout: of the batches that the reference runs on.
      mesh: where it runs.
      reference: adds `ref_logps` to a batch on the mesh.
      folder: of the cache; parts lie in `folder/key`. Only process 0 reads and writes it.
      key: see `cache_key`.
      size: examples per part.

    Raises:
      OSError: a part cannot be written.
    """
    lengths = np.sum([examples.lengths[name] for name in method.BRANCHES], axis=0)
    firsts = range(0, len(examples), size)
    starts = np.concatenate([np.cumsum(lengths[i : i + size]) - lengths[i : i + size] for i in firsts])
    tokens = [int(lengths[i : i + size].sum()) for i in firsts]
    names = [folder / key / f"{number:06d}.logps" for number in range(len(tokens))]
    first = jax.process_index() == 0
    found = [_read(name, key, count) if first else None for name, count in zip(names, tokens, strict=True)]
    missing = np.array([part is None for part in found])
    if jax.process_count() > 1:  # process 0 decides for all
        missing = np.asarray(multihost_utils.broadcast_one_to_all(missing))
    if missing.any():
        of = "" if missing.all() else f", those that are not in {folder / key}"
        chosen = np.flatnonzero(np.repeat(missing, size)[: len(examples)])
        logger.info("running the reference over %d of %d examples%s", len(chosen), len(examples), of)
        run = _run(method, config, examples.select(chosen), layout, mesh, reference, size)
        for number, values in zip(np.flatnonzero(missing), run, strict=True):
            if first:
                _write(names[number], key, values)
                values = _read(names[number], key, tokens[number])
            found[number] = values
    if jax.process_count() > 1:
        known = [
            np.zeros(count, np.float32) if part is None else part for part, count in zip(found, tokens, strict=True)
        ]
        found = [np.asarray(each) for each in multihost_utils.broadcast_one_to_all(known)]
    return WithReference(examples, tuple(part for part in found if part is not None), starts, method.BRANCHES, size)


def _run(method, config, examples, layout, mesh, reference, size) -> Iterator[np.ndarray]:
    """The parts of these examples, in order, each as soon as its last example is done."""
    own = [examples.lengths[name] for name in method.BRANCHES]
    lengths, before = np.sum(own, axis=0), np.cumsum([np.zeros_like(own[0]), *own[:-1]], axis=0)
    starts = np.cumsum(lengths) - lengths
    logps, done = np.zeros(int(lengths.sum()), np.float32), 0
    with make_batches(method, config, examples, layout, shuffle=False) as batches:
        for host in batches:
            filled = reference(place_batch(mesh, host.data.batch))
            arrays = [filled.fields["ref_logps"], filled.predictions.completions, filled.predictions.steps]
            if layout.processes > 1:
                arrays = multihost_utils.process_allgather(arrays, tiled=True)
            values, completions, steps = (np.asarray(array) for array in arrays)
            examples_at = np.zeros(layout.batch_size, np.int64)
            examples_at[list(host.data.places)] = host.indices
            for micro in range(values.shape[0]):
                real = completions[micro] >= 0
                place, branch = np.divmod(completions[micro][real], method.COMPLETIONS)
                which = examples_at[micro * layout.micro_batch_size + place]
                logps[starts[which] + before[branch, which] + steps[micro][real]] = values[micro][real]
            complete = int(host.indices.max()) + 1
            while done < len(examples) and min(done + size, len(examples)) <= complete:
                end = min(done + size, len(examples))
                yield logps[starts[done] : starts[end - 1] + lengths[end - 1]]
                done = end


def _header(key: str, values: np.ndarray) -> bytes:
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    line = json.dumps({"key": key, "tokens": len(values), "sha256": digest}).encode()
    return line.ljust(-(-(len(line) + 1) // ALIGNMENT) * ALIGNMENT - 1) + b"\n"


def _write(path: Path, key: str, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(_header(key, values) + values.tobytes())
    temporary.replace(path)


def _read(path: Path, key: str, tokens: int) -> np.ndarray | None:
    """A part through the memory map; None where there is none, or none that can be used, which is reported."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        line = file.readline(1024)
    size = path.stat().st_size - len(line)
    if size != 4 * tokens:
        reason = f"it holds {size} bytes of log-probs instead of {4 * tokens}"
    else:
        values = np.memmap(path, np.float32, "r", len(line), (tokens,))
        if line == _header(key, values):
            return values
        reason = "it is of other rows or another reference, or damaged (key or SHA-256 differ)"
    logger.warning("%s is not used and computed anew: %s", path, reason)
    return None
