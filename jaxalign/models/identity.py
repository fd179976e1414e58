"""What tells one checkpoint from another, where its completions end, and what pads them."""

from __future__ import annotations

import copy
import functools
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxalign.models.config import ModelConfig
from jaxalign.models.peft import CONFIG_FILE, WEIGHTS_FILE, base_of, is_adapter
from jaxalign.models.pretrained import ALL_FILES, find_checkpoint


def fingerprint(path: str | Path) -> str:
    """SHA-256 over the weights and the config of a checkpoint: the same wherever the folder lies.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    local, digest = find_checkpoint(path, ALL_FILES), hashlib.sha256()
    files = sorted([local / "config.json", *local.glob("*.safetensors")]) if local.is_dir() else [local]
    if is_adapter(local):
        return hashlib.sha256(f"{fingerprint(base_of(local))} {adapter_fingerprint(local)}".encode()).hexdigest()
    for file in files:
        name = file.name if local.is_dir() else "model"
        digest.update(f"{name} {_digest(file)}\n".encode())
    return digest.hexdigest()


def adapter_fingerprint(path: str | Path) -> str:
    """SHA-256 over a PEFT adapter's weights and config, without its base."""
    return hashlib.sha256(
        f"{_digest(Path(path) / CONFIG_FILE)} {_digest(Path(path) / WEIGHTS_FILE)}".encode()
    ).hexdigest()


def _digest(file: Path) -> str:
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    """Of a file's content; size and time tell whether it was written again since."""
    del size, modified
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def end_ids(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a completion: the transformers tokenizer's EOS, if there is one, and those of the checkpoint."""
    known = [None if tokenizer is None else tokenizer.eos_token_id, *config.eos_ids]
    return tuple(dict.fromkeys(id for id in known if isinstance(id, int)))


def with_padding(config: ModelConfig, tokenizer: Any = None) -> tuple[ModelConfig, Any]:
    """A reward model's config and transformers tokenizer (a copy, or None) with the same padding token.

    transformers reads a score at the last token that is not the config's padding token. Where the config names none,
    one is taken that ends no completion, for else it would read the token before EOS: the tokenizer's own, its unknown
    token, another special token, or the last token of the vocabulary, whichever comes first.
    """
    if config.pad_id is None or config.pad_id < 0:
        ends, known = config.eos_ids, []
        if tokenizer is not None:
            ends = end_ids(config, tokenizer)
            special = [id for id, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
            known = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special]
        last = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
        known += range(last - 1, -1, -1)
        pad = next(id for id in known if id is not None and id < config.vocab_size and id not in ends)
        config = replace(config, pad_id=pad)
    if tokenizer is not None and tokenizer.pad_token_id != config.pad_id:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(config.pad_id), "right"
    return config, tokenizer
