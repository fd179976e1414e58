"""The documentation of the model families, from their table: `python -m jaxalign.models.family_docs FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxalign.models.families import FAMILIES
from jaxalign.models.family import Family
from jaxalign.models.gemma_families import COMPOSITES
from jaxalign.models.gguf import ARCHITECTURES, TYPES

TEXT = """\
# Models

Families of checkpoints that `model.path` may name, by the `model_type` of their config.json. This file is written by
`python -m jaxalign.models.family_docs docs/models.md`. Every family's logits are compared with transformers' on tiny
models (`tests/models/test_parity.py`), also after a training step and an export.

All are read from Hugging Face folders (safetensors) and Hub names; those marked GGUF from GGUF files too. All are
written as Hugging Face folders that transformers loads. Reward models (`AutoModelForSequenceClassification`) are marked
where transformers has no such class for the family: their folders are read by jaxalign alone.

| family | class in transformers | for example | beyond a plain decoder | refused | |
|---|---|---|---|---|---|
{rows}

A plain decoder has RMS norms before attention and MLP, rotary positions, grouped key and value heads and a gated MLP
without biases. Where a family's config.json has a key for biases, windows, a tied head or the activation, it is read.

## Settings of every family

- Rope types: `default`, `linear` and `llama3`; of `phi3`, `default` and `longrope`. Others are refused by name.
- Quantised weights (`quantization_config`) are refused; a GGUF file's are dequantised.
- An activation other than SiLU, GELU and its tanh approximation is refused.
- `null` in a refused key is what transformers takes for it, and is read.

## GGUF files

- Families: those marked above, under the architectures {architectures} of llama.cpp. Any other is refused by name: take
  its Hugging Face folder. So are mixtures of experts, files in several parts, and settings that differ between layers.
- Types of tensors: {types}; others (the K-quants, the IQ-quants) are refused by the name of the tensor.
- They are read, and not written: llama.cpp's `convert_hf_to_gguf.py` makes one of an export.

## Longrope

Phi 3.5 and Phi 4 mini have two sets of frequencies: one for texts up to the original context (4096 tokens), one for
longer ones. transformers takes the second as soon as one text of a batch is longer; then the logits of a token depend
on its batch mates, and those of a token already sampled on what follows it. Here the model has one set: that of the
original context, which is then its context (a run with longer texts stops at the start), or the other, with
`model.long_context: true` in a run's config, in Python after `model.rebuild(models.extend_context(model.config))`. It
holds for every text of the run then, also for short ones, which is how vLLM serves a model whose `max_model_len` is
beyond the original context. An export is the same in both cases; `jaxalign sample` takes the first set.

## Checkpoints with images

{composites}
"""


def describe_families() -> str:
    """The whole of docs/models.md."""
    rows = "\n".join(_row(name, family) for name, family in FAMILIES.items())
    composites = "\n".join(
        f"- `{name}` ({', '.join(each.checkpoints)}): the language model in it is read as `{each.family}`; the "
        "model of images is left out, also from exports."
        for name, each in COMPOSITES.items()
    )
    named = {"architectures": ARCHITECTURES, "types": TYPES}
    lists = {key: ", ".join(f"`{each}`" for each in names) for key, names in named.items()}
    return TEXT.format(rows=rows, composites=composites, **lists)


def _row(name: str, family: Family) -> str:
    refused = ", ".join(f"`{key}` other than `{json.dumps(only)}`" for key, only in family.refuses.items())
    marks = ["GGUF"] * (name in ARCHITECTURES or name == "mistral")
    marks += [] if family.in_transformers else ["no reward models in transformers"]
    cells = (f"`{name}`", f"`{family.architecture}`", ", ".join(family.checkpoints), family.features, refused)
    return f"| {' | '.join([*cells, ', '.join(marks)])} |".replace("|  |", "| |").replace("|  |", "| |")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(describe_families(), encoding="utf-8")
