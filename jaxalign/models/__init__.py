"""Decoder models as pure functions, and their Hugging Face, GGUF and export formats."""

from jaxalign.models.cache import Cache, init_cache
from jaxalign.models.config import LoraConfig, ModelConfig, Rope, extend_context
from jaxalign.models.export import save
from jaxalign.models.families import FAMILIES
from jaxalign.models.freezing import freeze
from jaxalign.models.heads import add_score_head, drop_score_head
from jaxalign.models.identity import end_ids, fingerprint
from jaxalign.models.lora import add_lora, merge_lora
from jaxalign.models.origin import Origin, origin_of
from jaxalign.models.peft import load_adapter, save_adapter
from jaxalign.models.pretrained import load, load_config, load_tokenizer
from jaxalign.models.transformer import Model, build

__all__ = [
    "FAMILIES",
    "Cache",
    "LoraConfig",
    "Model",
    "ModelConfig",
    "Origin",
    "Rope",
    "add_lora",
    "add_score_head",
    "build",
    "drop_score_head",
    "end_ids",
    "extend_context",
    "fingerprint",
    "freeze",
    "init_cache",
    "load",
    "load_adapter",
    "load_config",
    "load_tokenizer",
    "merge_lora",
    "origin_of",
    "save",
    "save_adapter",
]
