"""Decoder models as pure functions, and their Hugging Face, GGUF and export formats."""

from jaxalign.models.config import ModelConfig, Rope
from jaxalign.models.families import FAMILIES
from jaxalign.models.transformer import Cache, Model, build, init_cache

__all__ = ["FAMILIES", "Cache", "Model", "ModelConfig", "Rope", "build", "init_cache"]
