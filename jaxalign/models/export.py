"""Checkpoints out: a Hugging Face folder that transformers, vLLM and `load` read."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.exchange import from_first, gathered, is_first
from jaxalign.files import writing
from jaxalign.models.config import ModelConfig
from jaxalign.models.families import FAMILIES, tensors, to_hf
from jaxalign.models.family import Tensor
from jaxalign.models.identity import with_padding
from jaxalign.models.lora import exportable
from jaxalign.models.tensors import file_shape, join
from jaxalign.models.transformer import Model
from jaxalign.types import Array, Variables

logger = logging.getLogger("jaxalign")

ExportDType = Literal["float32", "bfloat16", "float16"]
# The names of dtypes in the safetensors format.
CODES: dict[ExportDType, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
MAX_SHARD_SIZE = 5_000_000_000
CARD = """---
{meta}library_name: transformers
pipeline_tag: {task}
tags:
{tags}
---

# {name}

{made}

```python
from transformers import {auto}, AutoTokenizer

path = "."  # this folder, or its name on the Hub
model = {auto}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
```

In JAX:

```python
import jaxalign

model, variables = jaxalign.models.load(".")
{use}```
"""
SCORES = """

It gives a text (a prompt with an answer, the answer's end token included) one score; the higher, the better. The score
is read at the last token that is not the padding token (id {pad}).{bias}"""
BIAS = """
transformers leaves away the `score_bias` of config.json: add {bias:.6g} to its scores, which changes no ranking."""
STEPS = """

It judges the steps of an answer: the logits at the last token of the separator that ends a step are those of its being
wrong (label 0) and right (label 1)."""
SCORER = """
from jaxalign.rewards.model import make_scorer

score = make_scorer(model, variables)  # lists of token ids -> scores
"""


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer."""

    def save_pretrained(self, save_directory: Any, /) -> Any:
        """Writes its files into a folder."""
        ...


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its leaves (several where the checkpoint keeps them in one), and its shape in the file."""

    name: str
    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]


def save(
    folder: str | Path,
    model: Model,
    variables: Variables,
    tokenizer: Tokenizer | None,
    *,
    dtype: ExportDType = "float32",
    name: str | None = None,
    base_model: str | None = None,
    method: str | None = None,
    licence: str | None = None,
    card: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Writes a Hugging Face folder: config, safetensors, tokenizer with its chat template, and a model card.

    Everything goes to a folder beside the target that is renamed at the end: a failed export leaves no half of one.
    A model with a score head becomes an `AutoModelForSequenceClassification` folder with one label (one with two labels
    an `AutoModelForTokenClassification` folder), and with a padding token, by which transformers finds the last token
    (see `identity.with_padding`).
    Tensors are gathered, cast and written one at a time. On several processes, all must call this; the first writes.

    Args:
      folder: the target.
      model: the model.
      variables: `{"params": ...}`, also sharded; an adapter is merged in float32, one tensor at a time, and quantised
        weights are written in full.
      tokenizer: written with it, or None.
      dtype: dtype of the tensors.
      name: the card's title; the folder's name by default.
      base_model: Hub name of the model that was trained further, for the card (see `origin_of`).
      method: what was done to it, for the card (`DPO`).
      licence: licence identifier, for the card; left out when None.
      card: the whole README.md, instead of the one made from these.
      max_shard_size: bytes of tensors in one file, at most (a larger tensor gets a file for itself).
      overwrite: replace an existing folder.

    Returns:
      The folder.

    Raises:
      FileExistsError: the target exists and `overwrite` is off.
      OSError: it cannot be written; names the folder.
      ValueError: a value does not fit into float16; a model with both an LM head and a score head.
    """
    folder, config = Path(folder), model.config
    # What the first process saw, on all: it writes on while another may not have looked yet.
    if from_first(lambda: folder.exists() and not overwrite):
        raise FileExistsError(f"{folder} exists; choose another folder or set overwrite")
    if config.score_head:
        config, tokenizer = with_padding(config, tokenizer)
        if not FAMILIES[config.family].in_transformers:
            logger.warning(
                "%s: transformers has no class for a %s reward model; jaxalign reads it", folder, config.family
            )
    hf, params = to_hf(config), exportable(config, variables)
    shards = _shards(_plan(config, params), jnp.dtype(dtype).itemsize, max_shard_size)
    with writing(folder), _replaced_at_end(folder) if is_first() else _nowhere() as place:
        for file, planned in shards.items():
            _write_safetensors(place / file if place else None, planned, params, dtype)
        if place:
            if len(shards) > 1:
                _write_json(place / "model.safetensors.index.json", _index(shards, dtype))
            _write_configs(place, hf, dtype)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
            scores = config if config.score_head else None
            title = name or folder.name
            text = card or model_card(title, base_model=base_model, method=method, licence=licence, scores=scores)
            (place / "README.md").write_text(text, encoding="utf-8")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")
    return folder


def model_card(
    name: str,
    *,
    base_model: str | None = None,
    method: str | None = None,
    licence: str | None = None,
    scores: ModelConfig | None = None,
) -> str:
    """The text of a README.md in the Hub's form: front matter, what it is, how to load it.

    Args:
      name: the model's.
      base_model: see `save`.
      method: see `save`.
      licence: see `save`.
      scores: of a reward or value model, its config.
    """
    known = {"base_model": base_model, "license": licence}
    meta = "".join(f"{key}: {value}\n" for key, value in known.items() if value)
    tags = "- jaxalign" + (f"\n- {method.lower()}" if method else "")
    origin = f" from {base_model}" if base_model else ""
    made = f"Trained{origin} with {method}, using jaxalign." if method else f"Written{origin} by jaxalign."
    task, auto, use = "text-generation", "AutoModelForCausalLM", ""
    if scores is not None:
        task, auto, use = "text-classification", "AutoModelForSequenceClassification", SCORER
        bias = BIAS.format(bias=scores.score_bias) if scores.score_bias else ""
        made = "A reward model. " + made + SCORES.format(pad=scores.pad_id, bias=bias)
    if scores is not None and scores.score_labels == 2:
        task, auto, use = "token-classification", "AutoModelForTokenClassification", ""
        made = made.partition("\n")[0].replace("A reward", "A process reward") + STEPS
    return CARD.format(meta=meta, tags=tags, task=task, auto=auto, made=made, use=use, name=name)


def _plan(config: ModelConfig, params: Mapping[str, Any]) -> list[Planned]:
    """Every tensor of the checkpoint, in layer order."""
    by_name: dict[str, list[Tensor]] = {}
    for tensor in sorted(tensors(config), key=lambda tensor: tensor.repeat or 0):
        by_name.setdefault(tensor.name, []).append(tensor)
    planned = []
    for name, parts in by_name.items():
        shape = _leaf(params, parts[0]).shape[len(parts[0].place) :]
        planned.append(Planned(name, tuple(parts), file_shape(parts[0], shape)))
    return planned


def _shards(planned: Sequence[Planned], itemsize: int, limit: int) -> dict[str, list[Planned]]:
    """File name -> its tensors, filled in order."""
    groups: list[list[Planned]] = [[]]
    room = limit
    for tensor in planned:
        size = math.prod(tensor.shape) * itemsize
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _index(shards: Mapping[str, Sequence[Planned]], dtype: ExportDType) -> dict[str, Any]:
    count = sum(math.prod(tensor.shape) for group in shards.values() for tensor in group)
    return {
        "metadata": {"total_size": count * jnp.dtype(dtype).itemsize, "total_parameters": count},
        "weight_map": {tensor.name: file for file, group in shards.items() for tensor in group},
    }


def _write_safetensors(
    path: Path | None, planned: Sequence[Planned], params: Mapping[str, Any], dtype: ExportDType
) -> None:
    """One file: the header's length (8 bytes, little-endian), the header (JSON), the tensors' bytes in its order.

    The library's writer wants all tensors of a file in memory; written here, one is there at a time.
    Without a path, only takes part in gathering.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in planned:
        start, end = end, end + math.prod(tensor.shape) * jnp.dtype(dtype).itemsize
        header[tensor.name] = {"dtype": CODES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path or os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in planned:
            whole = join((part, gathered(_one(params, part))) for part in tensor.parts)
            file.write(np.ascontiguousarray(_cast(tensor.name, whole, dtype)).reshape(-1).view(np.uint8).data)


def _cast(name: str, values: np.ndarray, dtype: ExportDType) -> np.ndarray:
    if dtype == "float16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(f"tensor {name} has values beyond float16's range; export it as bfloat16 or float32")
    return values.astype(jnp.dtype(dtype), copy=False)


def _leaf(params: Mapping[str, Any], tensor: Tensor) -> Any:
    leaf: Any = params
    for key in tensor.path:
        leaf = leaf[key]
    return leaf


def _one(params: Mapping[str, Any], tensor: Tensor) -> Array:
    """The part of a leaf that is one tensor: of stacked layers one."""
    leaf = _leaf(params, tensor)
    return leaf[tensor.place] if tensor.place else leaf


def _write_configs(place: Path, hf: Mapping[str, Any], dtype: ExportDType) -> None:
    # transformers 5 reads `dtype`, version 4 `torch_dtype`.
    _write_json(place / "config.json", {**hf, "dtype": dtype, "torch_dtype": dtype})
    ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}
    _write_json(place / "generation_config.json", ids)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replaced_at_end(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when all went well, and is removed when not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.partial-*"):  # of exports that were killed
        shutil.rmtree(left, ignore_errors=True)
    place = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    place.mkdir()
    try:
        yield place
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
            folder.rename(old)
            place.rename(folder)
            shutil.rmtree(old)
        else:
            place.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _nowhere() -> Iterator[None]:
    yield None
