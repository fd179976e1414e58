"""Post-training for language models in JAX.

Subpackages are imported on first use (`jaxalign.models.load` works after `import jaxalign`), so that taking one loss
does not import the readers of data sets.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxalign import (
        data,
        evaluation,
        losses,
        methods,
        models,
        packing,
        rewards,
        sampling,
        sharding,
        training,
        types,
    )

__version__ = "0.1.0"
__all__ = [
    "data",
    "evaluation",
    "losses",
    "methods",
    "models",
    "packing",
    "rewards",
    "sampling",
    "sharding",
    "training",
    "types",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module 'jaxalign' has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"jaxalign.{name}")
