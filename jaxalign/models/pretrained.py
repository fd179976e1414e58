"""Checkpoints in: Hugging Face folders, GGUF files and Hub names, read straight into (sharded) arrays."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxalign.buckets import fetch, is_url
from jaxalign.models.config import DType, ModelConfig
from jaxalign.models.families import from_hf, stored_name, tensors
from jaxalign.models.family import Tensor
from jaxalign.models.gguf import open_gguf
from jaxalign.models.gguf_tokenizer import rebuild_tokenizer
from jaxalign.models.peft import CONFIG_FILE, base_of, is_adapter, merged_source, open_adapter
from jaxalign.models.projections import at, axes_of, is_projection, put
from jaxalign.models.quantized import Quantization, quantize
from jaxalign.models.tensors import Index, Source, file_shape, read
from jaxalign.models.transformer import Model, Remat, build
from jaxalign.sharding import param_shardings
from jaxalign.types import Variables

logger = logging.getLogger("jaxalign")

CONFIG_FILES = ["*.json"]
TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
ALL_FILES = [*TOKENIZER_FILES, "*.safetensors", "README.md"]
# Tensors that some checkpoints carry and no model needs: tables that are computed, and causal masks.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(bias|masked_bias))$")


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    param_dtype: DType = "float32",
    compute_dtype: DType = "float32",
    remat: Remat = "none",
    quantization: Quantization | None = None,
) -> tuple[Model, Variables]:
    """Loads a checkpoint.

    Every leaf is read for itself, and of it only the slices that this process's devices hold: the host never holds
    two copies of the model.

    Args:
      path: a folder with a config.json and safetensors, a `.gguf` file (or a folder with only one), a PEFT adapter's
        folder (its base is loaded and the adapter merged into it, in float32), the URL of one of these in a bucket
        (`gs://`, `s3://`), or a Hub name.
      mesh: where the parameters go, by the rules of `jaxalign.sharding`; None: the default device.
      param_dtype: the parameters are cast to it, tensor by tensor.
      compute_dtype: passed to `build`.
      remat: passed to `build`.
      quantization: keep the blocks' projections in 8 (`int8`) or 4 bits (`nf4`), see `models.quantized`; they can be
        trained through, for an adapter, but not be trained.

    Returns:
      The model and its variables, `{"params": ...}`.

    Raises:
      FileNotFoundError: there is no such checkpoint, or a file of it is missing.
      ValueError: an unknown family or setting; a tensor that is missing or of another shape; a file that is not whole.
    """
    local = find_checkpoint(path, ALL_FILES)
    source, config = _open(local)
    model = build(config, param_dtype=param_dtype, compute_dtype=compute_dtype, remat=remat, mesh=mesh)
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    places = None if mesh is None else param_shardings(mesh, shapes)
    return model, {"params": _read_params(source, model.config, shapes, places, quantization)}


def load_config(path: str | Path) -> ModelConfig:
    """Only the config of what `load` would load; no tensor is read (nor, from the Hub, fetched)."""
    local = find_checkpoint(path, CONFIG_FILES)
    if is_adapter(local):
        return load_config(base_of(local))
    return _config(local, _read_config(local) if local.is_dir() else open_gguf(local).config)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, with its chat template; from a GGUF file it is rebuilt from the metadata.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a GGUF file whose kind of tokenizer we do not know.
    """
    local = find_checkpoint(path, TOKENIZER_FILES)
    if is_adapter(local) and not (local / "tokenizer_config.json").is_file():
        return load_tokenizer(base_of(local))
    if local.is_dir():
        return AutoTokenizer.from_pretrained(local)
    rebuilt = rebuild_tokenizer(open_gguf(local).metadata)
    return PreTrainedTokenizerFast(
        tokenizer_object=rebuilt.tokenizer,
        chat_template=rebuilt.chat_template,
        model_max_length=rebuilt.max_length,
        clean_up_tokenization_spaces=False,
        **rebuilt.special_tokens,
    )


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder as a `Source`.

    Attributes:
      path: the folder.
      config: the content of its config.json; the end tokens are generation_config.json's where that names some.
      shapes: shape of each tensor by the name that its family gives it.
      stored: family's name -> name in the file (base models are stored without the prefix).
      files: family's name -> file in the folder.
      index: the file that lists the tensors.
    """

    path: Path
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]
    files: Mapping[str, str]
    index: Path

    def file(self, name: str) -> str:
        """The file that holds the tensor (or, if none does, the one that should list it)."""
        return str(self.path / self.files[name]) if name in self.files else str(self.index)

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of one tensor."""
        # Opened for this slice alone: the pages of a mapped file would otherwise pile up beside the arrays.
        with safe_open(self.file(name), "np") as file:
            return file.get_slice(self.stored[name])[index]


def find_checkpoint(path: str | Path, files: list[str]) -> Path:
    """The local folder or GGUF file behind a path, a bucket's URL or a Hub name; only these files are fetched."""
    if is_url(path):
        path = fetch(str(path), [*files, "*.gguf"] if files == ALL_FILES or str(path).endswith(".gguf") else files)
    local = Path(path)
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"{local} is a file, but not a .gguf file; give the folder that holds config.json")
        return local
    if local.is_dir():
        if (local / "config.json").is_file() or is_adapter(local):
            return local
        found = sorted(local.glob("*.gguf"))
        if len(found) == 1:
            return found[0]
        many = f" and {len(found)} .gguf files; name one of them" if found else " and no .gguf file"
        raise FileNotFoundError(f"{local} has no config.json{many}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)) or local.suffix == ".gguf":
        raise FileNotFoundError(f"{path} does not exist")
    try:
        # Only the top folder: some repositories keep other formats in folders beside it.
        return _locate_snapshot(snapshot_download(str(path), allow_patterns=files, ignore_patterns=["*/*"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{path!r} is no folder and no .gguf file here, and the Hugging Face Hub did not give it. Without a "
            f"network, download it elsewhere (hf download {path}) and give the folder's path. Its client said: {error}"
        ) from error


def _locate_snapshot(folder: str) -> Path:
    if not (Path(folder) / "config.json").is_file() and not is_adapter(Path(folder)):
        raise FileNotFoundError(
            f"{folder}: the Hub's repository has no config.json; for a GGUF file, give its own path"
        )
    return Path(folder)


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path / "config.json")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(
            f"{path}: the weights are quantised ({method}); only plain float safetensors or GGUF can be read"
        )
    ends = path / "generation_config.json"
    if ends.is_file() and (eos := _read_json(ends).get("eos_token_id")) is not None:
        config = {**config, "eos_token_id": eos}
    return config


def _open(path: Path) -> tuple[Source, ModelConfig]:
    """A checkpoint and its config; an adapter over its base."""
    if is_adapter(path):
        try:
            base, config = _open(find_checkpoint(base_of(path), ALL_FILES))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path / CONFIG_FILE}: base_model_name_or_path: {error}") from error
        return merged_source(base, config, open_adapter(path)), config
    source = _open_folder(path) if path.is_dir() else open_gguf(path)
    return source, _config(path, source.config)


def _open_folder(path: Path) -> Folder:
    config = _read_config(path)
    index, names = _list_files(path)
    stored, files, shapes = {}, {}, {}
    for file in names:
        try:
            with safe_open(path / file, "np") as content:
                for name in content.keys():  # noqa: SIM118 (it is no mapping)
                    known = stored_name(name, config.get("model_type"))
                    if known is None:
                        continue
                    stored[known], files[known] = name, file
                    shapes[known] = tuple(content.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path / file} is not a whole safetensors file: {error}") from error
    return Folder(path, config, shapes, stored, files, index)


def _list_files(path: Path) -> tuple[Path, list[str]]:
    """The file that lists the tensors, and the files that hold them."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return single, [single.name]
    if not index.is_file():
        torch_only = any(path.glob("pytorch_model*.bin"))
        hint = "; convert pytorch_model.bin to safetensors first (transformers: save_pretrained)" if torch_only else ""
        raise FileNotFoundError(f"{path} has neither model.safetensors nor model.safetensors.index.json{hint}")
    names = sorted(set(_read_json(index)["weight_map"].values()))
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing; {index.name} names it")
    return index, names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _config(path: Path, content: Mapping[str, Any]) -> ModelConfig:
    try:
        return from_hf(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_params(
    source: Source, config: ModelConfig, shapes: Any, places: Any, quantization: Quantization | None = None
) -> dict:
    """All leaves; `shapes` and `places` (or None) are trees of ShapeDtypeStruct and NamedSharding."""
    wanted = _check(source, config, shapes)
    # The largest first: what a leaf needs beyond itself while it is read then comes when little else is there.
    order = sorted(wanted, key=lambda path: -_at(shapes, path).size)
    params: dict = {}
    for path in order:
        place = None if places is None else _at(places, path)
        leaf, inner = _read_leaf(source, wanted[path], _at(shapes, path), place), params
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        small = path[-1] == "kernel" and is_projection(path[:-1])
        # Waited for: copies in flight would keep their host arrays alive beside it.
        inner |= jax.block_until_ready(_quantize(leaf, quantization, path, place) if small else {path[-1]: leaf})
    return params


def _quantize(leaf: jax.Array, kind: Quantization | None, path: tuple[str, ...], place: NamedSharding | None) -> dict:
    if kind is None:
        return {path[-1]: leaf}
    leaves = jax.jit(quantize, static_argnums=(1, 2))(leaf, kind, axes_of(path[:-1]))
    if place is None:
        return leaves
    tree: dict = {}
    put(tree, path[:-1], leaves)
    return at(jax.device_put(tree, param_shardings(cast("Mesh", place.mesh), tree)), path[:-1])


def _read_leaf(
    source: Source, parts: list[Tensor], leaf: jax.ShapeDtypeStruct, place: NamedSharding | None
) -> jax.Array:
    by_place, stacked = {part.place: part for part in parts}, len(parts[0].place)
    done: dict[tuple, np.ndarray] = {}

    def fill(index: Index | None) -> np.ndarray:
        index = index or ()
        key = tuple((each.start, each.stop) for each in index)
        if key not in done:  # replicas ask again
            done[key] = read_slice(index)
        return done[key]

    def read_slice(index: Index) -> np.ndarray:
        if not stacked:
            return read(source, parts[0], leaf.shape, index).astype(leaf.dtype, copy=False)
        ranges = [range(size)[each] for size, each in zip(leaf.shape, index, strict=True)]
        found = np.empty([len(each) for each in ranges], leaf.dtype)
        for where in np.ndindex(found.shape[:stacked]):
            part = by_place[tuple(ranges[axis][i] for axis, i in enumerate(where))]
            found[where] = read(source, part, leaf.shape[stacked:], index[stacked:])
        return found

    if place is None:
        return jax.device_put(fill((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, place, fill)


def _check(source: Source, config: ModelConfig, shapes: Any) -> dict[tuple[str, ...], list[Tensor]]:
    """The tensors of each leaf, by repeat; raises where the checkpoint lacks one or holds another shape."""
    wanted: dict[tuple[str, ...], list[Tensor]] = {}
    missing, used = [], set()
    for tensor in tensors(config):
        wanted.setdefault(tensor.path, []).append(tensor)
        used.add(tensor.name)
        if tensor.name not in source.shapes:
            missing.append(tensor.name)
            continue
        shape = _at(shapes, tensor.path).shape
        expected = file_shape(tensor, shape[len(tensor.place) :])
        if tuple(source.shapes[tensor.name]) != expected:
            raise ValueError(
                f"{source.file(tensor.name)}: tensor {tensor.name} has shape {list(source.shapes[tensor.name])}; "
                f"the config asks for {list(expected)}"
            )
    if missing:
        missing = list(dict.fromkeys(missing))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{source.file(missing[0])}: tensor {missing[0]}{more} is missing; a {config.family} model needs it"
        )
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    extra = [name for name in source.shapes if name not in used | tied and not IGNORED.search(name)]
    if extra:
        logger.warning(
            "%s: %d tensors are not used, among them %s", source.file(extra[0]), len(extra), ", ".join(extra[:3])
        )
    for parts in wanted.values():
        parts.sort(key=lambda tensor: tensor.place)
    return wanted


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
