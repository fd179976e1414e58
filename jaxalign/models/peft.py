"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, in and out.

What is read is either merged into its base while that is read, in float32 and one tensor at a time, or becomes the
collection `lora` and trains on. Of PEFT's kinds plain LoRA (also rank-stabilised) is known; all others are refused by
name, for they would be computed wrongly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxalign.exchange import gathered, is_first
from jaxalign.models.config import LoraConfig, ModelConfig
from jaxalign.models.families import tensors
from jaxalign.models.freezing import whole
from jaxalign.models.lora import adapter_config, adapter_shape, modules
from jaxalign.models.projections import at, put
from jaxalign.models.tensors import Index, Source
from jaxalign.types import Variables

if TYPE_CHECKING:
    from jaxalign.models.transformer import Model

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys of adapter_config.json whose truth changes what an adapter computes, in a way that is not computed here.
REFUSED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "megatron_config",
)
# Ways to begin that also change the base's weights: the adapter belongs to those, and not to the base on disk.
CHANGED_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, read.

    Attributes:
      path: the folder.
      config: the content of its adapter_config.json.
      pairs: module name in the base (`model.layers.0.self_attn.q_proj`) -> its A `[r, in]` and B `[out, r]`.
      saved: tensor name -> tensor that takes the base's place (`modules_to_save`).
    """

    path: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    saved: Mapping[str, np.ndarray]

    @property
    def weights(self) -> str:
        """The file of its tensors, for messages."""
        return str(self.path / WEIGHTS_FILE)

    def settings(self, name: str) -> LoraConfig:
        """Rank and scale of one module, which patterns in the config may set apart."""
        rank, alpha = (self._pick(f"{key}_pattern", name, self.config[own]) for key, own in PATTERNS)
        return LoraConfig(int(rank), alpha, 0.0, use_rslora=bool(self.config.get("use_rslora")))

    def delta(self, name: str) -> np.ndarray:
        """What the adapter adds to a module's weight, float32 `[out, in]`."""
        a, b = (matrix.astype(np.float32) for matrix in self.pairs[name])
        return np.float32(self.settings(name).scale) * (b @ a)

    def _pick(self, key: str, name: str, default: Any) -> Any:
        found = (value for pattern, value in (self.config.get(key) or {}).items() if _matches(pattern, name))
        return next(found, default)


PATTERNS = (("rank", "r"), ("alpha", "lora_alpha"))


@dataclass(frozen=True)
class MergedSource:
    """A checkpoint with an adapter merged into what is read of it; see `tensors.Source`."""

    base: Source
    adapter: Adapter
    layouts: Mapping[str, str]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the base's tensors, and of those that only the adapter has."""
        return {**self.base.shapes, **{name: tensor.shape for name, tensor in self.adapter.saved.items()}}

    def file(self, name: str) -> str:
        """The file that holds the tensor."""
        return self.adapter.weights if name in self.adapter.saved else self.base.file(name)

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of one tensor, merged."""
        if name in self.adapter.saved:
            return self.adapter.saved[name][index]
        module = name.removesuffix(".weight")
        found = self.base.read(name, index)
        if module not in self.adapter.pairs:
            return found
        delta = self.adapter.delta(module)
        delta = delta if self.layouts[name] == "linear" else delta.T
        return found.astype(np.float32) + delta[index]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file()


def base_of(path: Path) -> str:
    """The base that an adapter names: a path (as it is, or from the adapter's folder), or a Hub name.

    Raises:
      ValueError: it names none.
    """
    base = _read_config(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path / CONFIG_FILE}: base_model_name_or_path is missing: write the base model's path there")
    beside = path / base
    return str(beside) if not Path(base).exists() and beside.exists() else base


def open_adapter(path: str | Path) -> Adapter:
    """Reads an adapter's folder.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a kind of adapter that is not plain LoRA (the key is named), or tensors that are none.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG_FILE}: it is no PEFT adapter's folder")
    config, pairs, saved = _read_config(path), {}, {}
    for name, tensor in _read_weights(path).items():
        found = re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif "lora_" in name:
            raise ValueError(f"{path / WEIGHTS_FILE}: tensor {name}: only adapters of linear modules are known")
        else:
            saved[name.replace(".modules_to_save.default", "")] = tensor
    alone = [name for name, pair in pairs.items() if len(pair) != 2]
    if alone:
        raise ValueError(f"{path / WEIGHTS_FILE}: {alone[0]} has no pair of lora_A and lora_B")
    return Adapter(path, config, {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}, saved)


def merged_source(base: Source, config: ModelConfig, adapter: Adapter) -> MergedSource:
    """The base with the adapter merged into what is read of it.

    Raises:
      ValueError: the adapter was made for another base: a tensor that this one lacks, or of another shape.
    """
    known = {tensor.name: tensor for tensor in tensors(config)}
    for name, (a, b) in adapter.pairs.items():
        tensor = known.get(f"{name}.weight")
        if tensor is None or tensor.name not in base.shapes:
            tied = name == "lm_head" and config.tie_embeddings
            raise ValueError(
                f"{adapter.weights}: the base has no {name}"
                + (": its head is its embedding table, which an adapter would part from it" if tied else "")
            )
        shape = base.shapes[tensor.name]
        shape = tuple(shape) if tensor.layout == "linear" else tuple(reversed(shape))
        if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{adapter.weights}: {name}: A {list(a.shape)} and B {list(b.shape)} do not fit the base's weight of "
                f"{list(shape)}; the adapter was made for another base"
            )
    for name, tensor in adapter.saved.items():
        if name not in known:
            raise ValueError(f"{adapter.weights}: the base has no tensor {name}")
        if name in base.shapes and tuple(base.shapes[name]) != tensor.shape:
            raise ValueError(
                f"{adapter.weights}: tensor {name} has shape {list(tensor.shape)}, in the base {base.shapes[name]}"
            )
    return MergedSource(base, adapter, {tensor.name: tensor.layout for tensor in known.values()})


def to_lora(adapter: Adapter, config: ModelConfig, params: Any) -> tuple[LoraConfig, dict]:
    """An adapter as the collection `lora` that trains on, float32.

    Args:
      adapter: what was read.
      config: of the base.
      params: the base's parameters, also as shapes.

    Raises:
      ValueError: it does not fit the base; or it differs from layer to layer, or replaces whole modules, which a model
        that is loaded with it merged can have, but not one that trains on.
    """
    if adapter.saved:
        raise ValueError(
            f"{adapter.weights}: it replaces {next(iter(adapter.saved))} (modules_to_save); merge it first"
        )
    known = {module.name: module for module in modules(config)}
    strange = [name for name in adapter.pairs if name not in known]
    if strange:
        raise ValueError(
            f"{adapter.weights}: {strange[0]} is no linear module of this base's blocks that can have an adapter "
            "(experts and routers have none); merge it first"
        )
    kinds = {adapter.settings(name) for name in adapter.pairs}
    if len(kinds) != 1:
        raise ValueError(
            f"{adapter.path / CONFIG_FILE}: modules of different rank or alpha cannot train on; merge it first"
        )
    tree: dict = {}
    for path in dict.fromkeys(known[name].path for name in adapter.pairs):
        layers = sorted((m for m in known.values() if m.path == path), key=lambda module: module.repeat)
        lacking = [module.name for module in layers if module.name not in adapter.pairs]
        if lacking:
            raise ValueError(
                f"{adapter.weights}: there is nothing for {lacking[0]}; an adapter that trains has all layers"
            )
        _, inputs, outputs = adapter_shape(params, path)
        for module in layers:
            a, b = adapter.pairs[module.name]
            if a.shape[1] != inputs or b.shape[0] != outputs:
                raise ValueError(
                    f"{adapter.weights}: {module.name} has {a.shape[1]} inputs and {b.shape[0]} outputs, in the base "
                    f"{inputs} and {outputs}: the adapter was made for another base"
                )
        pairs = [adapter.pairs[module.name] for module in layers]
        a, b = (np.stack([np.asarray(pair[i], np.float32).T for pair in pairs]) for i in (0, 1))
        put(tree, path, {"a": jnp.asarray(a), "b": jnp.asarray(b)})
    names = dict.fromkeys(known[name].suffix for name in adapter.pairs)
    dropout = float(adapter.config.get("lora_dropout") or 0.0)
    return replace(kinds.pop(), dropout=dropout, target_modules=tuple(names)), tree


def load_adapter(path: str | Path, model: Model, variables: Variables) -> tuple[Model, Variables]:
    """The model with the adapter of a folder, to train on; errors as `open_adapter` and `to_lora`."""
    config, adapter = to_lora(open_adapter(path), model.config, whole(variables)["params"])
    return model.rebuild(replace(model.config, lora=config)), {**variables, "lora": adapter}


def save_adapter(folder: str | Path, config: ModelConfig, variables: Variables, *, base_model: str) -> Path:
    """Writes the adapter as a folder that PEFT loads, a score head with it.

    On several processes, all must call this; the first writes.

    Args:
      folder: where to; made if needed, its two files replaced.
      config: of the model.
      variables: with the collection `lora`.
      base_model: what `base_model_name_or_path` says.
    """
    lora, folder, found = adapter_config(config), Path(folder), {}
    for module in modules(config):
        own = at(variables["lora"], module.path)
        if own:
            for name, leaf in (("lora_A", own["a"]), ("lora_B", own["b"])):
                found[f"{PREFIX}{module.name}.{name}.weight"] = np.ascontiguousarray(gathered(leaf[module.repeat]).T)
    heads = [tensor for tensor in tensors(config) if tensor.path[0] == "score" and config.score_head]
    for tensor in heads:
        found[PREFIX + tensor.name] = np.ascontiguousarray(gathered(at(variables["params"], tensor.path)).T)
    chosen = [module for module in modules(config) if at(variables["lora"], module.path)]
    content = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": sorted({module.suffix for module in chosen}),
        "modules_to_save": [tensor.name.removesuffix(".weight") for tensor in heads] or None,
        # Where the checkpoint's matrices are [in, out], as GPT-2's.
        "fan_in_fan_out": any(module.tensors[0].layout == "plain" for module in chosen),
        "bias": "none",
        "inference_mode": True,
    }
    if not is_first():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.astype(np.float32) for name, tensor in found.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r} is not supported; only LORA is")
    for key in REFUSED:
        if config.get(key):
            raise ValueError(f"{file}: {key}={config[key]!r} is not supported; merge it into the base with PEFT first")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias={config['bias']!r} is not supported; merge it into the base with PEFT first")
    if CHANGED_BASE.search(str(config.get("init_lora_weights"))):
        raise ValueError(
            f"{file}: init_lora_weights={config['init_lora_weights']!r} changed the base's weights too, so the adapter "
            "does not fit the base on disk; merge it with PEFT first"
        )
    return {"r": 8, "lora_alpha": 8, **config}


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        hint = ": convert adapter_model.bin to safetensors first" if (path / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{file} is missing{hint}")
    try:
        with safe_open(file, "np") as content:
            return {name.removeprefix(PREFIX): content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
