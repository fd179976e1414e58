"""Reference log-probs computed once over a data set and kept on disk."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Callable
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

VERSION = "1"  # raise it when the same rows and reference give other numbers


@dataclass(frozen=True)
class WithReference:
    """Examples that carry `ref_<branch>_logps`, float32 per token.

    Attributes:
      examples: without them.
      logps: float32, of all completions of all examples, end to end, an example's in the order of its branches.
      starts: int64 `[examples]`, where each example begins in `logps`.
      branches: their names: `chosen` and `rejected`, or `completion`.
    """

    examples: Examples
    logps: np.ndarray
    starts: np.ndarray
    branches: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        example = self.examples[i]
        ends = int(self.starts[i]) + np.cumsum([0, *(len(example[f"{name}_ids"]) for name in self.branches)])
        spans = zip(self.branches, itertools.pairwise(ends), strict=True)
        return {**example, **{f"ref_{name}_logps": self.logps[start:end] for name, (start, end) in spans}}


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
    path: Path,
) -> WithReference:
    """Log-probs of all completions, read from `path` or computed and written there.

    Args:
      method: a module of `METHODS` with `BRANCHES`.
      config: its Config.
      examples: what it learns from.
      layout: of the batches that the reference runs on.
      mesh: where it runs.
      reference: adds `ref_logps` to a batch on the mesh.
      path: of the cache file, named by `cache_key`; a file of another size is computed anew.

    Raises:
      OSError: the file cannot be written.
    """
    sizes = np.sum([examples.lengths[name] for name in method.BRANCHES], axis=0)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    if not path.exists() or np.load(path, mmap_mode="r").shape != (int(sizes.sum()),):
        logger.info("running the reference over %d examples", len(examples))
        logps = _run(method, config, examples, layout, mesh, reference, sizes, starts)
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            with partial.open("wb") as file:
                np.save(file, logps)
            partial.replace(path)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("reference log-probs")
            return WithReference(examples, logps, starts, method.BRANCHES)
    return WithReference(examples, np.load(path, mmap_mode="r"), starts, method.BRANCHES)


def _run(method, config, examples, layout, mesh, reference, sizes, starts) -> np.ndarray:
    logps = np.zeros(int(sizes.sum()), np.float32)
    lengths = [examples.lengths[name] for name in method.BRANCHES]
    before = np.cumsum([np.zeros_like(sizes), *lengths[:-1]], axis=0)
    with make_batches(method, config, examples, layout, shuffle=False) as batches:
        for host in batches:
            filled = reference(place_batch(mesh, host.data.batch))
            arrays = [filled.fields["ref_logps"], filled.predictions.completions, filled.predictions.steps]
            if layout.processes > 1:
                arrays = multihost_utils.process_allgather(arrays, tiled=True)
            values, completions, steps = (np.asarray(array) for array in arrays)
            for micro in range(values.shape[0]):
                real = completions[micro] >= 0
                place, branch = np.divmod(completions[micro][real], method.COMPLETIONS)
                which = host.indices[micro * layout.micro_batch_size + place]
                logps[starts[which] + before[branch, which] + steps[micro][real]] = values[micro][real]
    return logps
