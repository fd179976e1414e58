"""Decoder models as pure functions, and their Hugging Face, GGUF and export formats."""

from jaxalign.models.cache import Cache, init_cache
from jaxalign.models.config import ModelConfig, Rope, extend_context
from jaxalign.models.export import save
from jaxalign.models.families import FAMILIES
from jaxalign.models.heads import add_score_head, drop_score_head
from jaxalign.models.identity import end_ids, fingerprint
from jaxalign.models.pretrained import load, load_config, load_tokenizer
from jaxalign.models.transformer import Model, build

__all__ = [
    "FAMILIES",
    "Cache",
    "Model",
    "ModelConfig",
    "Rope",
    "add_score_head",
    "build",
    "drop_score_head",
    "end_ids",
    "extend_context",
    "fingerprint",
    "init_cache",
    "load",
    "load_config",
    "load_tokenizer",
    "save",
]
