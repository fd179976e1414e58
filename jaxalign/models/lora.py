"""LoRA: low-rank updates beside frozen projections, as a collection of their own.

    variables["params"]["segment_0"]["block_0"]["attention"]["query"] = {"kernel": [repeats, *in, *out]}
    variables["lora"]  ["segment_0"]["block_0"]["attention"]["query"] = {"a": [repeats, in, r], "b": [repeats, r, out]}

A projection adds `scale * dropout(x) a b`; without the collection the adapter is off. `b` begins at 0, so a new adapter
changes nothing. A linear module of the family's checkpoint is one target, as in PEFT: where it holds several of our
projections (GPT-2's `c_attn`: query, key and value), they share one `a` and each has its columns of one `b`, under the
name `query+key+value`. Source: Hu et al., arXiv 2106.09685; rank-stabilised: Kalajdzievski, arXiv 2312.03732.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxalign.models.config import LoraConfig, ModelConfig
from jaxalign.models.families import Tensor, tensors
from jaxalign.models.freezing import whole
from jaxalign.models.projections import at, axes_of, copy_tree, is_projection, projections, put
from jaxalign.models.quantized import dequantize, full_shape, is_quantized
from jaxalign.types import Array, Variables

if TYPE_CHECKING:
    from jaxalign.models.transformer import Model

ALL_LINEAR = "all-linear"
JOINED = "+"


@dataclass(frozen=True)
class Module:
    """A linear module of a checkpoint that can have an adapter.

    Attributes:
      name: in the checkpoint, `model.layers.3.self_attn.q_proj`.
      path: of its adapter in `variables["lora"]`.
      repeat: its place on the stacked axis.
      tensors: of its kernels, in the order of its outputs.
    """

    name: str
    path: tuple[str, ...]
    repeat: int
    tensors: tuple[Tensor, ...]

    @property
    def suffix(self) -> str:
        """The name within its layer, `self_attn.q_proj`."""
        return re.sub(r"^.*?\.\d+\.", "", self.name)


def modules(config: ModelConfig) -> list[Module]:
    """Every module that can have an adapter, in layer order."""
    found: dict[str, list[Tensor]] = {}
    for tensor in tensors(config):
        if tensor.path[-1] == "kernel" and is_projection(tensor.path[:-1]) and tensor.layout in ("linear", "plain"):
            found.setdefault(tensor.name.removesuffix(".weight"), []).append(tensor)
    listed = []
    for name, parts in found.items():
        parts.sort(key=lambda tensor: tensor.part or (0, 1))
        path = (*parts[0].path[:-2], JOINED.join(part.path[-2] for part in parts))
        listed.append(Module(name, path, parts[0].repeat or 0, tuple(parts)))
    return sorted(listed, key=lambda module: module.repeat)


def chosen_modules(config: ModelConfig, targets: str | Sequence[str]) -> list[Module]:
    """The modules that PEFT would choose by `target_modules`.

    Args:
      config: the model's.
      targets: `all-linear`; a list of names, each a whole name or its end (`q_proj`, `mlp.down_proj`); or a regular
        expression for whole names.

    Raises:
      ValueError: a target that is no linear module of the blocks, or only of some layers, or that names experts.
    """
    known = modules(config)
    if isinstance(targets, str) and targets != ALL_LINEAR:
        try:
            picked = [module for module in known if re.fullmatch(targets, module.name)]
            _check_experts(config, known, targets, re.compile(targets).fullmatch)
        except re.error as error:
            raise ValueError(f"{targets!r} is not a regular expression: {error}") from error
    else:
        wanted = None if isinstance(targets, str) else list(targets)
        for target in wanted or ():
            _check_target(config, known, target)
        picked = [module for module in known if wanted is None or any(_named(module.name, each) for each in wanted)]
    if not picked:
        raise ValueError(f"{targets!r} matches no module; there are {_suffixes(known)} in {known[0].name} and so on")
    by_path = {module.path: module for module in picked}
    for path, module in by_path.items():
        if sum(each.path == path for each in picked) != sum(each.path == path for each in known):
            raise ValueError(
                f"{targets!r} matches {module.name} but not the same module of all layers that are stacked with it; an "
                "adapter here is on all of them"
            )
    return picked


def add_lora(model: Model, variables: Variables, config: LoraConfig, key: jax.Array) -> tuple[Model, Variables]:
    """A model with an adapter that changes nothing yet.

    Args:
      model: without an adapter.
      variables: its variables, also quantised; the result shares their arrays.
      config: rank, targets and so on.
      key: of the draw of `a`, uniform in `+-1/sqrt(in)`, which is PEFT's (Kaiming's with `a = sqrt(5)`).

    Returns:
      The model, and `{**variables, "lora": ...}`; the adapter is float32 (or wider, as the parameters are).

    Raises:
      ValueError: the model has an adapter; a target that there is not.
    """
    if "lora" in variables:
        raise ValueError("the model has an adapter already: merge it into the weights first (models.merge_lora)")
    adapted = {**variables, "lora": init_lora(model.config, variables, config, key)}
    return model.rebuild(replace(model.config, lora=config)), adapted


def init_lora(config: ModelConfig, variables: Variables, lora: LoraConfig, key: jax.Array) -> Any:
    """The collection of a new adapter."""
    params = whole(variables)["params"]
    wide = jnp.promote_types(jax.tree.leaves(params["final_norm"])[0].dtype, jnp.float32)
    tree: dict = {}
    paths = list(dict.fromkeys(module.path for module in chosen_modules(config, lora.target_modules)))
    for number, path in enumerate(paths):
        repeats, inputs, outputs = adapter_shape(params, path)
        bound = 1 / math.sqrt(inputs)
        shape = (repeats, inputs, lora.r)
        a = jax.random.uniform(jax.random.fold_in(key, number), shape, wide, -bound, bound)
        put(tree, path, {"a": a, "b": jnp.zeros((repeats, lora.r, outputs), wide)})
    return tree


def adapter_shape(params: Any, path: tuple[str, ...]) -> tuple[int, int, int]:
    """Repeats, inputs and outputs of the module whose adapter lies at `path`."""
    repeats = inputs = outputs = 0
    for name in path[-1].split(JOINED):
        axes = axes_of((*path[:-1], name))
        shape = full_shape(at(params, (*path[:-1], name)), axes)
        repeats, inputs = shape[0], math.prod(shape[1 : 1 + axes[0]])
        outputs += math.prod(shape[1 + axes[0] :])
    return repeats, inputs, outputs


def expand(variables: Variables) -> Variables:
    """Variables as the decoder's modules read them: an adapter of joined projections taken apart, `a` shared."""
    if "lora" not in variables:
        return variables
    tree: dict = {}
    for path, adapter in adapters(variables["lora"]):
        start = 0
        for name in path[-1].split(JOINED):
            own = (*path[:-1], name)
            axes = axes_of(own)
            end = start + math.prod(full_shape(at(variables["params"], own), axes)[-axes[1] :])
            put(tree, own, {"a": adapter["a"], "b": adapter["b"][..., start:end]})
            start = end
    return {**variables, "lora": tree}


def merge_lora(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """The model with its adapter in its weights, `kernel + scale * a b` in float32, then in the kernels' dtype.

    Quantised weights are full ones afterwards, in float32.
    """
    plain = expand(whole(variables))
    dtypes = {path: leaves["kernel"].dtype for path, leaves in projections(plain["params"]) if "kernel" in leaves}
    params, _ = merge_tree(model.config, plain["params"], plain.get("lora", {}), quantized=True)
    for path, dtype in dtypes.items():
        leaves = at(params, path)
        put(params, path, {**leaves, "kernel": leaves["kernel"].astype(dtype)})
    return model.rebuild(replace(model.config, lora=None)), {"params": params}


def merge_tree(config: ModelConfig, params: Any, adapter: Any, *, quantized: bool) -> tuple[dict, dict]:
    """Parameters with merged kernels, float32 or wider, and what is left of the adapter.

    Args:
      config: the model's.
      params: stacked or not.
      adapter: alike, as `expand` has it; empty for none.
      quantized: quantised kernels too; else they and their adapters stay as they are.
    """
    merged, left = copy_tree(params), {}
    for path, leaves in projections(params):
        own = at(adapter, path)
        if is_quantized(leaves) and not quantized:
            if own:
                put(left, path, own)
        elif own or is_quantized(leaves):
            rest = {name: leaf for name, leaf in leaves.items() if name not in ("values", "scales")}
            put(merged, path, {**rest, "kernel": merged_kernel(config, path, leaves, own)})
    return merged, left


def merged_kernel(config: ModelConfig, path: tuple[str, ...], leaves: Mapping[str, Array], own: Any) -> jax.Array:
    """One projection's kernel with its adapter (`a` and `b`, or nothing), stacked or not, float32 or wider."""
    kernel = dequantize(leaves, axes_of(path)) if is_quantized(leaves) else jnp.asarray(leaves["kernel"])
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    if not own:
        return kernel
    a, b = (own[name].astype(kernel.dtype) for name in ("a", "b"))
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel + adapter_config(config).scale * delta.reshape(kernel.shape)


def adapter_config(config: ModelConfig | None) -> LoraConfig:
    """That of the model's adapter; raises ValueError for a model built without one."""
    if config is None or config.lora is None:
        raise ValueError(
            "these variables hold an adapter, but the model was built without: use models.add_lora's model"
        )
    return config.lora


@dataclass(frozen=True)
class Merged:
    """A stacked kernel that is merged when a repeat of it is asked for, so that the whole never exists.

    Attributes:
      config: the model's.
      path: of the projection.
      leaves: the projection's.
      own: its adapter, or nothing.
    """

    config: ModelConfig
    path: tuple[str, ...]
    leaves: Mapping[str, Array]
    own: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all repeats together."""
        return full_shape(self.leaves, axes_of(self.path))

    def __getitem__(self, repeat: int) -> jax.Array:
        one = jax.tree.map(lambda leaf: leaf[repeat], (dict(self.leaves), self.own))
        return merged_kernel(self.config, self.path, *one)


def exportable(config: ModelConfig, variables: Variables) -> dict:
    """Parameters in full for an export: kernels that are quantised or have an adapter are `Merged`."""
    plain = expand(whole(variables))
    params = copy_tree(plain["params"])
    for path, leaves in projections(plain["params"]):
        own = at(plain.get("lora", {}), path)
        if own or is_quantized(leaves):
            rest = {name: leaf for name, leaf in leaves.items() if name not in ("values", "scales")}
            put(params, path, {**rest, "kernel": Merged(config, path, leaves, own)})
    return params


def adapters(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Mapping[str, Array]]]:
    """Path and leaves of every adapter in a collection."""
    if "a" in tree:
        return [(path, tree)]
    return [found for name, part in tree.items() for found in adapters(part, (*path, name))]


def _check_experts(config: ModelConfig, known: Sequence[Module], target: str, matches: Callable[[str], object]) -> None:
    """Raises ValueError where a target names what PEFT would adapt and is frozen here."""
    sparse = (tensor.name.removesuffix(".weight") for tensor in tensors(config) if "experts" in tensor.path)
    found = next((name for name in sparse if matches(name)), None)
    if found is not None:
        raise ValueError(
            f"{target!r} names {found}: experts, shared ones too, and routers have no adapter here. Name other modules "
            f"by their ends ({_suffixes(known)}), or train the experts in full (model.trainable)"
        )


def _check_target(config: ModelConfig, known: Sequence[Module], target: str) -> None:
    _check_experts(config, known, target, lambda name: _named(name, target))
    if any(_named(module.name, target) for module in known):
        return
    others = {tensor.name.removesuffix(".weight") for tensor in tensors(config)} | {"lm_head", "score"}
    if any(_named(name, target) for name in others):
        raise ValueError(
            f"{target!r} has no adapter here: only the linear modules of the blocks have one ({_suffixes(known)}); "
            "embeddings, heads and norms train in full (model.trainable) or not at all"
        )
    names = list(dict.fromkeys(name for module in known for name in (module.suffix, module.suffix.split(".")[-1])))
    near = difflib.get_close_matches(target, names, 1, cutoff=0.0)
    raise ValueError(f"{target!r} is no module of this model; the nearest is {near[0]!r}")


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _suffixes(known: Sequence[Module]) -> str:
    return ", ".join(dict.fromkeys(module.suffix for module in known))
