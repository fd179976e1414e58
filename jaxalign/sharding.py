"""The mesh, and the one table that says which parameter lies where."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxalign.types import PyTree, TokenRows

AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
# Decoding has no long rows to split: there the devices of `context` have rows of their own.
DECODE_AXES = (*BATCH_AXES, "context")

# Parameter path (regular expression) -> mesh axis per dimension; the first match counts. Leading dimensions that a
# rule does not name (the stacked layers of a segment) stay whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"positions/embedding$", (None, "fsdp")),
    (r"head/kernel$", ("fsdp", "tensor")),
    (r"score/kernel$", ("fsdp", None)),
    (r"score/bias$", (None,)),
    (r"attention/(query|key|value)/(kernel|values|scales)$", ("fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", ("tensor", None)),
    (r"attention/output/(kernel|values|scales)$", ("tensor", None, "fsdp")),
    (r"attention/output/bias$", (None,)),
    (r"experts/(router|shared_switch)/kernel$", ("fsdp", None)),
    (r"experts/(gate|up)/kernel$", ("expert", "fsdp", "tensor")),
    (r"experts/down/kernel$", ("expert", "tensor", "fsdp")),
    (r"experts/shared_(gate|up)/kernel$", ("fsdp", "tensor")),
    (r"experts/shared_down/kernel$", ("tensor", "fsdp")),
    (r"mlp/(gate|up)/(kernel|values|scales)$", ("fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", ("tensor",)),
    (r"mlp/down/(kernel|values|scales)$", ("tensor", "fsdp")),
    (r"mlp/down/bias$", (None,)),
    # Small: every device has them.
    (r"_norm/(scale|bias)$", (None,)),
    (r"lora/.*/(a|b)$", (None, None)),
    (r"(^|/)rows/", (None,)),  # which rows of a stack train, see `models.freezing`
)


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has.

    Attributes:
      data: replicas of the parameters; -1 = whatever the other axes leave.
      fsdp: devices over which parameters, gradients and optimiser state are split; each also gets its own rows.
      tensor: devices over which heads and feed-forward width are split.
      expert: devices over which the experts of a sparse model are split; each also gets its own rows.
      context: devices over which the length of every row is split, for rows too long for one device.
      dcn: on several slices, over how many of them each axis goes, -1 = all that are left; empty: `data` over all.
        The sizes above include it.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    dcn: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        """Raises ValueError, naming the key, on sizes that no devices can have."""
        _check_sizes({axis: getattr(self, axis) for axis in AXES}, "mesh")
        if unknown := sorted(set(self.dcn) - set(AXES)):
            raise ValueError(f"mesh.dcn.{unknown[0]}: not an axis; they are {', '.join(AXES)}")
        _check_sizes(self.dcn, "mesh.dcn")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `AXES` over all devices, neighbours in the network along the axes that talk most.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `dcn` to the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(arrange(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array with an axis per name in `AXES`; of several slices, `config.dcn` names the outer parts.

    Raises:
      ValueError: as `make_mesh`.
    """
    sizes = fit_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})  # CPU devices know of none
    if slices == 1 and not config.dcn:
        return _arrange_slice(sizes, devices)
    outer = _over_slices(config, sizes, slices)
    inner = tuple(size // parts for size, parts in zip(sizes, outer, strict=True))
    if slices == 1:
        return _arrange_slice(inner, devices)
    return _or_split_axes(mesh_utils.create_hybrid_device_mesh, inner, outer, devices)


def fit_sizes(config: MeshConfig, count: int, key: str = "mesh") -> tuple[int, ...]:
    """The size of each axis of `AXES` on so many devices.

    Raises:
      ValueError: they do not multiply to the number of devices; names `key`.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    elif -1 in sizes:
        free = AXES[sizes.index(-1)]
        raise ValueError(
            f"{key}: {_describe(config)} needs a multiple of {known} devices for {free}=-1 to be what is left, but "
            f"there are {count}: choose sizes whose product divides {count}"
        )
    if math.prod(sizes) != count:
        raise ValueError(
            f"{key}: {_describe(config)} needs {math.prod(sizes)} devices, but there are {count}"
            f" (set {key}.data=-1 to use what is left)"
        )
    return tuple(sizes)


def remesh(mesh: Mesh, config: MeshConfig | None, key: str) -> Mesh:
    """The same devices in the same order under other sizes; None = the mesh as it is.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `dcn` is given; names `key`.
    """
    if config is None:
        return mesh
    if config.dcn:
        raise ValueError(f"{key}.dcn: the devices keep the order that mesh.dcn gives them; leave it away")
    sizes = fit_sizes(config, mesh.size, key)
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rows_stay_in_processes(devices: np.ndarray) -> bool:
    """Whether devices that share rows, those of `context` and `tensor`, belong to one process each time."""
    groups = devices.reshape(-1, math.prod(devices.shape[len(BATCH_AXES) :]))
    return all(len({device.process_index for device in group}) == 1 for group in groups)


def process_count(mesh: Mesh) -> int:
    """How many processes own the mesh's devices: those of this run, or the hosts of a slice that is not here."""
    return len({device.process_index for device in mesh.devices.flat})


def _arrange_slice(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    found = _or_split_axes(mesh_utils.create_device_mesh, sizes, devices)
    if rows_stay_in_processes(found):
        return found
    # Along the torus, devices that share rows may belong to two processes: then process by process.
    own = np.array(sorted(devices, key=lambda device: device.process_index), dtype=object).reshape(sizes)
    return own if rows_stay_in_processes(own) else found


def _or_split_axes(make: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
    """Gives mesh axes whole axes of the TPU's torus where that is possible, else parts of them."""
    try:
        return make(*arguments)
    except NotImplementedError:
        return make(*arguments, allow_split_physical_axes=True)


def _over_slices(config: MeshConfig, sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """Over how many slices each axis goes."""
    outer = {axis: 1 for axis in AXES} | dict(config.dcn or {"data": slices})
    free = [axis for axis, size in outer.items() if size == -1]
    known = math.prod(size for size in outer.values() if size != -1)
    if free and slices % known == 0:
        outer[free[0]] = slices // known
    asked = " ".join(f"{axis}={size}" for axis, size in config.dcn.items())
    if math.prod(outer.values()) != slices:
        raise ValueError(f"mesh.dcn: {asked} does not multiply to the {slices} slice(s) that there are")
    for axis, size in zip(AXES, sizes, strict=True):
        if size % outer[axis]:
            why = f"mesh.dcn: {asked}" if config.dcn else f"all {slices}, as mesh.dcn is empty"
            raise ValueError(
                f"mesh.{axis}={size} cannot go over {outer[axis]} slices ({why}): make it a multiple, or name another "
                "axis in mesh.dcn"
            )
    return tuple(outer[axis] for axis in AXES)


def _check_sizes(sizes: Mapping[str, int], key: str) -> None:
    described = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{key}: axes must be positive, and at most one of them -1; got {described}")


def data_shards(mesh: Mesh) -> int:
    """Over how many shards the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def decode_shards(mesh: Mesh) -> int:
    """Over how many shards the prompts of a rollout are split."""
    return math.prod(mesh.shape[axis] for axis in DECODE_AXES)


def param_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """A `NamedSharding` per leaf, by its path; works on parameters, gradients and optimiser states alike.

    Args:
      mesh: the mesh.
      tree: pytree whose leaves have a shape; a path that ends like a parameter's follows that parameter's rule.

    Raises:
      ValueError: no rule of `RULES` matches a leaf's path; numbers without axes need none.
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
    """Shardings of a `Batch`: leaves with a rows axis (`[micro, rows, ...]`) are split by rows, others replicated.

    `TokenRows` are split along their length too, over `context`, where that divides it.
    """

    def rows(part: TokenRows) -> TokenRows:
        split = "context" if part.tokens.shape[2] % mesh.shape["context"] == 0 else None
        sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, split))
        return jax.tree.map(lambda _: sharding, part)

    def one(part: Any) -> Any:
        if isinstance(part, TokenRows):
            return rows(part)
        return rows_sharding(mesh) if part.ndim == 3 else replicated(mesh)

    return jax.tree.map(one, batch, is_leaf=lambda part: isinstance(part, TokenRows))


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Puts a host batch on the mesh; each process gives its own rows."""

    def place(leaf, sharding):
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch, batch_shardings(mesh, batch))


def path_name(path) -> str:
    """A pytree path as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclass(frozen=True)
class Placed:
    """Where one array lies.

    Attributes:
      path: `a/b/c`.
      shape: of the whole array.
      dtype: its name.
      spec: mesh axes per dimension, as `(fsdp, tensor, -)`; `()` = on every device.
      total_bytes: of the whole array.
      device_bytes: of a device's part.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    total_bytes: int
    device_bytes: int


@dataclass(frozen=True)
class Placement:
    """Where the arrays of a tree lie, with the sums over them."""

    arrays: tuple[Placed, ...]
    total_bytes: int
    device_bytes: int


def describe_shardings(shapes: PyTree, mesh: Mesh, axes: Sequence[str] = AXES) -> Placement:
    """What of parameters, gradients or optimiser states lies where, and how much each device holds.

    Args:
      shapes: pytree of arrays or `jax.ShapeDtypeStruct`s.
      mesh: the mesh.
      axes: those that anything is split over; whole along the others.

    Raises:
      ValueError: as `param_shardings`.
    """
    arrays = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = path_name(path)
        found = [axis if axis in axes else None for axis in _sharding(mesh, name, leaf.shape).spec]
        sharding = NamedSharding(mesh, PartitionSpec(*found))
        spec = f"({', '.join(axis or '-' for axis in found)})" if any(found) else "()"
        size = leaf.dtype.itemsize
        part = math.prod(sharding.shard_shape(leaf.shape)) * size
        arrays.append(Placed(name, tuple(leaf.shape), str(leaf.dtype), spec, math.prod(leaf.shape) * size, part))
    totals = (sum(each.total_bytes for each in arrays), sum(each.device_bytes for each in arrays))
    return Placement(tuple(arrays), *totals)


def undivided(mesh: Mesh, tree: PyTree) -> list[tuple[str, str, int]]:
    """Path, mesh axis and bytes of each array with a dimension that its axis does not divide: it stays whole there."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        axes = next((axes for pattern, axes in RULES if re.search(pattern, name)), ())
        if len(axes) > len(leaf.shape):
            continue
        for axis, length in zip(axes, leaf.shape[len(leaf.shape) - len(axes) :], strict=True):
            if axis and length % mesh.shape[axis]:
                found.append((name, axis, math.prod(leaf.shape) * leaf.dtype.itemsize))
    return found


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    axes = next((axes for pattern, axes in RULES if re.search(pattern, name)), None)
    if axes is None and shape:
        raise ValueError(
            f"no rule says how {name} of shape {list(shape)} lies on the mesh: add one to RULES in jaxalign/sharding.py"
        )
    if axes is None or len(axes) > len(shape):
        # Adafactor keeps a row and a column vector under the parameter's name.
        return replicated(mesh)
    axes = (None,) * (len(shape) - len(axes)) + axes
    fitting = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*fitting))


def _describe(config: MeshConfig) -> str:
    rare = "".join(f" {axis}={getattr(config, axis)}" for axis in ("expert", "context") if getattr(config, axis) != 1)
    return f"data={config.data} fsdp={config.fsdp} tensor={config.tensor}{rare}"
