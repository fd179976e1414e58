"""Sparse feed-forward layers: a router sends each token through a few of many experts, and no token is dropped.

Tokens are sorted by expert and multiplied group by group, see `grouped`. On a mesh every shard sorts its own tokens;
over the axis `expert` the shards gather each other's tokens, run them through the experts that they hold, and give
back the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jaxalign.models.config import ModelConfig
from jaxalign.models.grouped import grouped_matmul
from jaxalign.sharding import BATCH_AXES
from jaxalign.types import Array

Activation = Callable[[jax.Array], jax.Array]
Sums = dict[str, jax.Array]


class Experts(nn.Module):
    """A layer's experts and their router: `sum of share_e * expert_e(x)` over the best `experts_per_token` experts e.

    An expert is `down(act(gate x) * up x)`. Shares are the router's softmax over all experts, under `norm_topk_prob`
    over the sum of the best. With `shared_mlp_dim`, a further expert is added that every token runs through, times the
    sigmoid of a number of its own.

    Sources: Shazeer et al., arXiv 1701.06538; Jiang et al., arXiv 2401.04088, section 2.1.
    """

    config: ModelConfig
    param_dtype: jnp.dtype
    activation: Activation
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, Sums]:
        """`[rows, length, embed_dim]` like x, and with weights `router_sums`."""
        c, kernel = self.config, partial(_Kernel, param_dtype=self.param_dtype)
        mesh = _mesh(self.mesh)
        count = c.num_experts // _manual_size(mesh, c.num_experts)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        router = kernel((c.embed_dim, c.num_experts), name="router")().astype(wide)
        inputs, outputs = (count, c.embed_dim, c.expert_mlp_dim), (count, c.expert_mlp_dim, c.embed_dim)
        gate, up, down = (
            kernel(shape, name=name)().astype(x.dtype)
            for name, shape in (("gate", inputs), ("up", inputs), ("down", outputs))
        )
        if self.is_initializing():
            return self._run_shared(x) if c.shared_mlp_dim else x, {}
        probs = jax.nn.softmax(x.astype(wide) @ router, axis=-1)
        shares, chosen = jax.lax.top_k(probs, c.experts_per_token)
        if c.norm_topk_prob:
            shares = shares / shares.sum(-1, keepdims=True)
        mixed = _spread(partial(_mix, self.activation), mesh, (x, shares, chosen), (gate, up, down))
        mixed = mixed + self._run_shared(x) if c.shared_mlp_dim else mixed
        return mixed, {} if weights is None else router_sums(probs, chosen, weights)

    def _run_shared(self, x: jax.Array) -> jax.Array:
        d, width = self.config.embed_dim, self.config.shared_mlp_dim
        shapes = {"gate": (d, width), "up": (d, width), "down": (width, d), "switch": (d, 1)}
        gate, up, down, switch = (
            _Kernel(shape, self.param_dtype, name=f"shared_{name}")().astype(x.dtype) for name, shape in shapes.items()
        )
        return jax.nn.sigmoid(x @ switch) * ((self.activation(x @ gate) * (x @ up)) @ down)


class _Kernel(nn.Module):
    shape: tuple[int, ...]
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(0.02), self.shape, self.param_dtype)


def add_sums(sums: Iterable[Sums]) -> Sums:
    """The router's sums of several layers, of which dense ones have none."""
    known = [each for each in sums if each]
    return jax.tree.map(lambda *each: sum(each[1:], each[0]), *known) if known else {}


def router_sums(probs: Array, chosen: Array, weights: Array) -> Sums:
    """What the load-balancing loss needs of a layer, summed over tokens; layers and micro-batches add.

    Args:
      probs: `[rows, length, experts]`, the router's.
      chosen: int `[rows, length, experts_per_token]`.
      weights: `[rows, length]`, how often a token counts: 0 in padding.

    Returns:
      `expert_loads` and `router_probs`, `[experts]` each: tokens sent to each expert, and its probabilities' sum.
    """
    weights = weights.astype(probs.dtype)
    loads = jnp.zeros(probs.shape[-1], probs.dtype).at[chosen].add(weights[..., None])
    return {"expert_loads": loads, "router_probs": jnp.einsum("rle,rl->e", probs, weights)}


def _mix(activation: Activation, tokens, kernels, *, expert: str | None, gather: bool, tensor: str | None):
    """The outputs of a shard's tokens, `[rows, length, embed_dim]`.

    Args:
      activation: of the experts.
      tokens: x, shares and chosen experts.
      kernels: gate, up and down of the experts that this shard holds.
      expert: the mesh axis over which experts are split.
      gather: tokens are split over it too.
      tensor: the mesh axis over which the experts' widths are split.
    """
    if gather:
        tokens = [jax.lax.all_gather(each, expert, axis=0, tiled=True) for each in tokens]
    (x, shares, chosen), (gate, up, down) = tokens, kernels
    count, k = gate.shape[0], chosen.shape[-1]
    numbers = chosen.reshape(-1) - (jax.lax.axis_index(expert) * count if expert else 0)
    # Experts of other shards get a number behind the last: sorted to the end, where no group is.
    numbers = jnp.where((numbers >= 0) & (numbers < count), numbers, count)
    order = jnp.argsort(numbers)
    sizes = jnp.zeros(count, jnp.int32).at[numbers].add(1, mode="drop")
    flat = x.reshape(-1, x.shape[-1])[order // k]
    inner = activation(grouped_matmul(flat, gate, sizes)) * grouped_matmul(flat, up, sizes)
    sorted_outputs = grouped_matmul(inner, down, sizes)
    outputs = sorted_outputs[jnp.argsort(order)].reshape(*chosen.shape, x.shape[-1])
    mixed = (outputs * shares[..., None].astype(outputs.dtype)).sum(-2)
    mixed = jax.lax.psum(mixed, tensor) if tensor else mixed
    if gather:
        return jax.lax.psum_scatter(mixed, expert, scatter_dimension=0, tiled=True)
    return jax.lax.psum(mixed, expert) if expert else mixed


def _mesh(given: Mesh | None) -> Mesh | AbstractMesh | None:
    """The mesh to split work over: that of a surrounding `shard_map`, or the model's own."""
    around = jax.sharding.get_abstract_mesh()
    return around if around.manual_axes else given


def _manual_size(mesh: Mesh | AbstractMesh | None, experts: int) -> int:
    """Over how many shards a surrounding `shard_map` has split the experts already.

    Raises:
      ValueError: they cannot be split evenly over the mesh.
    """
    size = 1 if mesh is None else mesh.shape.get("expert", 1)
    if experts % size:
        raise ValueError(f"mesh.expert={size} does not divide the model's {experts} experts")
    return size if isinstance(mesh, AbstractMesh) and "expert" in mesh.manual_axes else 1


def _spread(mix: Callable, mesh: Mesh | AbstractMesh | None, tokens: tuple, kernels: tuple) -> jax.Array:
    """Runs `mix` on every shard of the mesh, over the axes that no surrounding `shard_map` has taken.

    Without a mesh XLA is left to split what it sees, rightly but with the tokens of all shards on each.
    """
    if mesh is None:
        return mix(tokens, kernels, expert=None, gather=False, tensor=None)
    manual = mesh.manual_axes if isinstance(mesh, AbstractMesh) else ()
    sizes: Mapping[str, int] = {name: size for name, size in mesh.shape.items() if size > 1}
    free = [name for name in sizes if name not in manual]
    rows = tuple(name for name in BATCH_AXES if name in free)
    if tokens[0].shape[0] % math.prod(sizes[name] for name in rows):
        rows = ()  # every shard then has all of them
    expert = "expert" if "expert" in sizes else None
    tensor = "tensor" if "tensor" in free and kernels[0].shape[-1] % sizes["tensor"] == 0 else None
    body = partial(mix, expert=expert, gather=expert in rows or expert in manual, tensor=tensor)
    if not free:
        return body(tokens, kernels)
    split = expert if expert in free else None
    width = (P(split, None, tensor), P(split, None, tensor), P(split, tensor, None))
    spread = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=((P(rows),) * 3, width),
        out_specs=P(rows),
        axis_names=frozenset(free),
        check_vma=False,
    )
    return spread(tokens, kernels)
