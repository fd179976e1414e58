"""What tells one checkpoint from another, and where its completions end."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from jaxalign.models.config import ModelConfig
from jaxalign.models.pretrained import ALL_FILES, find_checkpoint


def fingerprint(path: str | Path) -> str:
    """SHA-256 over the weights and the config of a checkpoint: the same wherever the folder lies.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    local = find_checkpoint(path, ALL_FILES)
    files = sorted([local / "config.json", *local.glob("*.safetensors")]) if local.is_dir() else [local]
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        name = file.name if local.is_dir() else "model"
        digest.update(f"{name} {_sha256(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    """Of a file's content; size and time tell whether it was written again since."""
    del size, modified
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def end_ids(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a completion: the transformers tokenizer's EOS, and those that the checkpoint names."""
    known = [tokenizer.eos_token_id, *config.eos_ids]
    return tuple(dict.fromkeys(id for id in known if isinstance(id, int)))
