"""What a family of checkpoints is: the config.json keys, the tensors, and how these map onto our one decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxalign.models.config import ModelConfig

ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


class Part(NamedTuple):
    """One of several leaves that lie side by side along a tensor's output axis.

    Attributes:
      index: which of them.
      sizes: of all of them, up to a common multiple.
      per_head: they lie side by side within each head, instead of each with all its heads.
    """

    index: int
    sizes: tuple[int, ...]
    per_head: bool = False


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint and its place in ours.

    Attributes:
      name: name in the checkpoint.
      path: leaf in `variables["params"]`.
      repeat: index on the leaf's leading (stacked) axis, or None for an unstacked leaf.
      layout: `linear` = `[out, in]`, transposed to `[in, out]`; `plain` = the same order of numbers. Either is then
        reshaped to the leaf's shape.
      part: where the leaf lies in a tensor that holds several, or None.
      expert: index on the axis after it, of a leaf that holds the matrices of all experts.
    """

    name: str
    path: tuple[str, ...]
    repeat: int | None = None
    layout: Literal["linear", "plain"] = "plain"
    part: Part | None = None
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """Index on the leaf's stacked axes."""
        return tuple(index for index in (self.repeat, self.expert) if index is not None)


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
      architecture: class name that transformers loads.
      classifier: class name of the same decoder with a score head.
      keys: our field -> name in Hugging Face's config.json.
      defaults: our field -> value, or function of the config.json, when that key is missing or null.
      fixed: fields that are the same for the whole family.
      windows: reads the windows of all layers from a config.json.
      names: our leaf -> (tensor name, layout[, part]); `{}` is the layer, a second `{}` the expert. A part is
        `(i, sizes)`, of `Part`; a size may be the name of a field of `ModelConfig`.
      refuses: config.json key -> the only value (beside null) that we compute rightly.
      write: extra config.json keys from our config.
      activations: our activation -> its name in the config.json.
      renames: beginning of a tensor's name in some checkpoints -> what it is in `names`.
      checkpoints: names on the Hub that people train.
      features: what tells the family from Llama, for the documentation.
      in_transformers: transformers has the `classifier`; else only we read it.
    """

    architecture: str
    classifier: str
    keys: Mapping[str, str]
    names: Mapping[str, tuple]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    windows: Callable[[Mapping, int], tuple[int | None, ...]] = lambda hf, layers: (None,) * layers
    refuses: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[ModelConfig], dict] = lambda config: {}
    activations: Mapping[str, str] = field(default_factory=lambda: ACTIVATION_NAMES)
    renames: Mapping[str, str] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()
    features: str = ""
    in_transformers: bool = True


@dataclass(frozen=True)
class Composite:
    """A checkpoint of several models, of which one is a language model of a family that we know.

    Attributes:
      family: key in `FAMILIES`.
      key: of the language model's config in the config.json.
      renames: beginning of a tensor's name -> what it is in the family.
      refuses: key of that config -> the only value (beside null) that the whole computes as the family does.
      checkpoints: names on the Hub that people train.
    """

    family: str
    key: str
    renames: Mapping[str, str]
    refuses: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ()
