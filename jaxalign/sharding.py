"""The mesh, and the one table that says which parameter lies where."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxalign.types import PyTree

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# Parameter path (regular expression) -> mesh axis per dimension; the first match counts. Leading dimensions that a
# rule does not name (the stacked layers of a segment) stay whole. Norms, adapters and what has no rule are replicated.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"positions/embedding$", (None, "fsdp")),
    (r"head/kernel$", ("fsdp", "tensor")),
    (r"score/kernel$", ("fsdp", None)),
    (r"score/bias$", (None,)),
    (r"attention/(query|key|value)/(kernel|values|scales)$", ("fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", ("tensor", None)),
    (r"attention/output/(kernel|values|scales)$", ("tensor", None, "fsdp")),
    (r"experts/(router|shared_switch)/kernel$", ("fsdp", None)),
    (r"experts/(gate|up)/kernel$", ("expert", "fsdp", "tensor")),
    (r"experts/down/kernel$", ("expert", "tensor", "fsdp")),
    (r"experts/shared_(gate|up)/kernel$", ("fsdp", "tensor")),
    (r"experts/shared_down/kernel$", ("tensor", "fsdp")),
    (r"mlp/(gate|up)/(kernel|values|scales)$", ("fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", ("tensor",)),
    (r"mlp/down/(kernel|values|scales)$", ("tensor", "fsdp")),
)


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has.

    Attributes:
      data: replicas of the parameters; -1 = whatever the other axes leave.
      fsdp: devices over which parameters, gradients and optimiser state are split; each also gets its own rows.
      tensor: devices over which heads and feed-forward width are split.
      expert: devices over which the experts of a sparse model are split; each also gets its own rows.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `expert`, `tensor` over all devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh: axes must be positive, and at most one of them -1; got {_describe(config)}")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: {_describe(config)} needs {math.prod(sizes)} devices, but there are {len(devices)}"
            " (set mesh.data=-1 to use what is left)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def data_shards(mesh: Mesh) -> int:
    """Over how many shards the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def param_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """A `NamedSharding` per leaf, by its path; works on parameters, gradients and optimiser states alike.

    Args:
      mesh: the mesh.
      tree: pytree whose leaves have a shape; a path that ends like a parameter's follows that parameter's rule.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding(mesh, path_name(path), leaf.shape), tree)


def expert_specs(mesh: Mesh, tree: PyTree) -> PyTree:
    """A `PartitionSpec` per leaf with the axis `expert` alone: what a decoding shard holds of each parameter."""

    def only(sharding: NamedSharding) -> PartitionSpec:
        return PartitionSpec(*(axis if axis == "expert" else None for axis in sharding.spec))

    return jax.tree.map(only, param_shardings(mesh, tree))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays `[micro, rows, ...]`: rows are split over the data axes."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def batch_shardings(mesh: Mesh, batch: PyTree) -> PyTree:
    """Shardings of a `Batch`: leaves with a rows axis (`[micro, rows, ...]`) are split by rows, others replicated."""
    return jax.tree.map(lambda leaf: rows_sharding(mesh) if leaf.ndim == 3 else replicated(mesh), batch)


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Puts a host batch on the mesh; each process gives its own rows."""

    def place(leaf, sharding):
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch, batch_shardings(mesh, batch))


def path_name(path) -> str:
    """A pytree path as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    axes = next((axes for pattern, axes in RULES if re.search(pattern, name)), ())
    if len(axes) > len(shape):
        # Adafactor keeps a row and a column vector under the parameter's name.
        return replicated(mesh)
    axes = (None,) * (len(shape) - len(axes)) + axes
    fitting = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*fitting))


def _describe(config: MeshConfig) -> str:
    expert = f" expert={config.expert}" if config.expert != 1 else ""
    return f"data={config.data} fsdp={config.fsdp} tensor={config.tensor}{expert}"
