"""Context parallelism: each device of the mesh's axis `context` has a stretch of every row.

The decoder runs under `shard_map` on its stretch; attention gathers the row's keys and values and computes its own
queries; everything else is per token. The head runs on equal shares of the predictions, whose hidden states travel
around the ring of stretches. Source: Llama Team, arXiv 2407.21783, section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jaxalign.models import attention
from jaxalign.models.attention import Blocks, Keys
from jaxalign.types import Array, Predictions, PyTree, TokenRows, Variables

AXIS = "context"
GATHERED = "context_keys"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """What this device's queries see of the whole row: the mask of keys that are yet to be gathered.

    Attributes:
      mask: bool `[rows, stretch, length]`, or the `Blocks` of that.
    """

    mask: Array | Blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _PartBlocks(Blocks):
    """`Blocks` of a stretch's queries (`rows`) and a whole row's keys."""

    keys: TokenRows

    def block(self, query: Array, key: Array) -> Array:
        """bool `[rows, size, size]`."""
        queries, keys = jax.tree.map(lambda x: x[:, query], self.rows), jax.tree.map(lambda x: x[:, key], self.keys)
        return attention.visible(queries, keys, self.window)


def shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Over how many devices rows are split here: 1 without a mesh, and inside of a `shard_map` over `context`."""
    if mesh is None or AXIS in jax.sharding.get_abstract_mesh().manual_axes:
        return 1
    return mesh.shape.get(AXIS, 1)


def misfit(attention: str, mesh: Mesh | None) -> str | None:
    """Why rows that are split over this mesh cannot be attended to in this way, or None."""
    if attention == "xla" or mesh is None or mesh.shape.get(AXIS, 1) == 1:
        return None
    return f"rows are split over {AXIS}={mesh.shape[AXIS]} devices, where attention is XLA's"


def length_multiple(mesh: Mesh, length: int) -> int:
    """What a row's length is a multiple of, so that its stretches are alike.

    Long rows are attended to in blocks, of which a stretch has a whole number.
    """
    return mesh.shape[AXIS] * (128 if length >= attention.BLOCKWISE_FROM and mesh.shape[AXIS] > 1 else 1)


def read_rows(
    mesh: Mesh,
    read: Callable[..., tuple[jax.Array, Any, PyTree]],
    variables: Variables,
    rows: TokenRows,
    key: jax.Array | None,
    weights: Array | None,
    noise: Array | None,
) -> tuple[jax.Array, None, PyTree]:
    """A decoder's hidden states `[rows, length, embed]`, split over the axis along the length, and its `aux`.

    Args:
      mesh: with the axis `context`.
      read: `(variables, rows, key, weights, noise) -> (hidden, None, aux)` of a stretch, whose attention is `attend`.
      variables: whole on every device of the axis.
      rows: `[rows, length]`; padded here to `length_multiple`.
      key: dropout's; every stretch gets its own.
      weights: `[rows, length]` or None.
      noise: `[rows, length, embed]` or None.
    """
    length = rows.tokens.shape[1]
    multiple = length_multiple(mesh, length)
    split = jax.tree.map(lambda x: _pad(x, multiple), (rows, weights, noise))

    def local(variables, key, split):
        rows, weights, noise = split
        own = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        hidden, _, aux = read(variables, rows, own, weights, noise)
        return hidden, jax.tree.map(lambda x: x[None], aux)

    specs = (P(), P(), P(None, AXIS))
    hidden, aux = _manual(mesh, local, specs, (P(None, AXIS), P(AXIS)))(variables, key, split)
    return hidden[:, :length], None, jax.tree.map(lambda x: x.sum(0), aux)


def self_mask(rows: TokenRows, window: int | None) -> Part:
    """`attention.self_mask` of a stretch's queries and the whole row's keys, in blocks where the row is long."""
    whole = jax.tree.map(_gather_length, rows)
    stretch, length = rows.tokens.shape[1], whole.tokens.shape[1]
    if length < attention.BLOCKWISE_FROM:
        return Part(attention.visible(rows, whole, window))
    size = max(size for size in range(1, attention.BLOCK + 1) if stretch % size == 0)
    blocks, count = attention.make_blocks(whole, window, size), stretch // size
    first = jax.lax.axis_index(AXIS) * count
    queries = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis=1), blocks.rows)
    needed = jax.lax.dynamic_slice_in_dim(blocks.needed, first, count, axis=0)
    return Part(_PartBlocks(queries, needed, window, blocks.rows))


def attend(query: Array, keys: tuple[Keys, ...], **options: Any) -> jax.Array:
    """`attention.attend`; where the mask is a `Part`, keys and values of the whole row are gathered first.

    The backward pass gathers them again: kept, they would be as large as without the axis.
    """
    if not isinstance(keys[0].mask, Part):
        return attention.attend(query, keys, **options)

    def gathered(query, key, value, mask):
        key, value = (checkpoint_name(_gather_keys(x), GATHERED) for x in (key, value))
        return attention.attend(query, (Keys(key, value, mask),), **options)

    policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    # XLA may share the gather with that of a rematerialised layer.
    run = jax.checkpoint(gathered, policy=policy, prevent_cse=False)
    return run(query, keys[0].key, keys[0].value, keys[0].mask.mask)


def predict(
    mesh: Mesh | None,
    head: Callable[[Variables, jax.Array, jax.Array], PyTree],
    variables: Variables,
    hidden: Array,
    predictions: Predictions,
) -> PyTree:
    """Runs a head on the hidden states that predict.

    Args:
      mesh: over whose axis `context` the hidden states are split along the row, if it has one.
      head: `(variables, states [rows, n, embed], targets [rows, n]) -> pytree of [rows, n]`, each prediction by itself.
      variables: the head's.
      hidden: `[rows, length, embed]`.
      predictions: what is asked, `[rows, predictions]`.

    Returns:
      What the head gives, for all predictions.
    """
    count, size = shards(mesh), predictions.sources.shape[1]
    if mesh is None or count == 1:
        states = jnp.take_along_axis(hidden, predictions.sources[..., None], axis=1)
        return head(variables, states, jnp.asarray(predictions.targets))

    def local(variables, hidden, sources, targets):
        return head(variables, _travel(hidden, sources, count), targets)

    sources, targets = (_pad(jnp.asarray(x), count) for x in (predictions.sources, predictions.targets))
    split = P(None, AXIS)
    found = _manual(mesh, local, (P(), split, P(), split), split)(variables, _pad(hidden, count), sources, targets)
    # Numbers per prediction are few: losses, which know nothing of the axis, get all of them.
    whole = jax.sharding.NamedSharding(mesh, P(P.UNCONSTRAINED, None))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole)[:, :size], found)


def _travel(hidden: jax.Array, sources: jax.Array, count: int) -> jax.Array:
    """This device's share of the predictions' hidden states, `[rows, predictions / count, embed]`.

    A share goes once around the ring, and every device adds those of its stretch: sums of one state and zeros.
    """
    me, stretch = jax.lax.axis_index(AXIS), hidden.shape[1]
    shares = sources.reshape(sources.shape[0], count, -1)

    def taken(share):
        place = jax.lax.dynamic_index_in_dim(shares, share, axis=1, keepdims=False) - me * stretch
        here = (place >= 0) & (place < stretch)
        states = jnp.take_along_axis(hidden, jnp.where(here, place, 0)[..., None], axis=1)
        return jnp.where(here[..., None], states, 0)

    around = [(i, (i + 1) % count) for i in range(count)]
    total = taken((me - 1) % count)
    for turn in range(1, count):
        total = jax.lax.ppermute(total, AXIS, around) + taken((me - 1 - turn) % count)
    return total


def _manual(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=frozenset({AXIS}), check_vma=False
    )


def _gather_length(x: Array) -> jax.Array:
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def _gather_keys(x: Array) -> jax.Array:
    return jax.lax.all_gather(x, AXIS, axis=2, tiled=True)


def _pad(x: Array, multiple: int) -> jax.Array:
    """Zeros behind `[rows, length, ...]`; document 0 is padding."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else jnp.asarray(x)
