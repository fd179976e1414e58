"""Reference log-probs computed once over a data set and kept on disk."""

from __future__ import annotations

import hashlib
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
from jaxalign.exchange import from_all
from jaxalign.methods.common import Example
from jaxalign.methods.offline import Layout, make_batches
from jaxalign.sharding import place_batch
from jaxalign.types import Batch

logger = logging.getLogger("jaxalign")

VERSION = "1"  # raise it when the same rows and reference give other numbers


@dataclass(frozen=True)
class WithReference:
    """Preference examples that carry `ref_chosen_logps` and `ref_rejected_logps`, float32 per token.

    Attributes:
      examples: the pairs.
      logps: float32, of all completions of all examples, end to end, chosen before rejected.
      starts: int64 `[examples]`, where each example begins in `logps`.
    """

    examples: Examples
    logps: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        example = self.examples[i]
        start, chosen, rejected = int(self.starts[i]), len(example["chosen_ids"]), len(example["rejected_ids"])
        values = self.logps[start : start + chosen + rejected]
        return {**example, "ref_chosen_logps": values[:chosen], "ref_rejected_logps": values[chosen:]}


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
      method: a module of `METHODS` for pairs.
      config: its Config.
      examples: the pairs.
      layout: of the batches that the reference runs on.
      mesh: where it runs.
      reference: adds `ref_logps` to a batch on the mesh.
      path: of the cache file, named by `cache_key`; a file of another size is computed anew.

    Raises:
      OSError: the file cannot be written.
    """
    sizes = examples.lengths["chosen"] + examples.lengths["rejected"]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    known = path.exists() and np.load(path, mmap_mode="r").shape == (int(sizes.sum()),)
    # All or none: the reference runs on all processes together, and their disks may differ.
    if not from_all(np.asarray(known)).all():
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
            return WithReference(examples, logps, starts)
    return WithReference(examples, np.load(path, mmap_mode="r"), starts)


def _run(method, config, examples, layout, mesh, reference, sizes, starts) -> np.ndarray:
    logps = np.zeros(int(sizes.sum()), np.float32)
    with make_batches(method, config, examples, layout, shuffle=False) as batches:
        for host in batches:
            filled = reference(place_batch(mesh, host.data.batch))
            arrays = [filled.fields["ref_logps"], filled.predictions.completions, filled.predictions.steps]
            if layout.processes > 1:
                arrays = multihost_utils.process_allgather(arrays, tiled=True)
            values, completions, steps = (np.asarray(array) for array in arrays)
            for micro in range(values.shape[0]):
                real = completions[micro] >= 0
                pair, second = np.divmod(completions[micro][real], 2)
                which = host.indices[micro * layout.micro_batch_size + pair]
                chosen = examples.lengths["chosen"][which]
                logps[starts[which] + second * chosen + steps[micro][real]] = values[micro][real]
    return logps
