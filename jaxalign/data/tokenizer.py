"""Getting a tokenizer ready: its chat template and the token that ends a completion."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")


def prepare(
    tokenizer: PreTrainedTokenizerFast, *, chat_template_path: str | None = None, eos_token: str | None = None
) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer with another chat template or EOS token.

    A missing padding token is fine: examples are packed, and what pads a row is masked by position, not by token.

    Args:
      tokenizer: left as it is.
      chat_template_path: a Jinja file, or a tokenizer's folder or Hub name, whose template replaces its own.
      eos_token: the token, already in the vocabulary, that ends a completion.

    Raises:
      FileNotFoundError: no such template file.
      ValueError: there is no template there, `eos_token` is not in the vocabulary, or there is no EOS token at all.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(chat_template_path)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={eos_token!r} is not one token of the tokenizer's vocabulary")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no EOS token, so no completion could end: name one of its tokens as eos_token"
        )
    return tokenizer


def digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides how a tokenizer encodes: vocabulary, rules, special tokens and chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: rules[name] for name in rules if name not in ("truncation", "padding")}  # left over from past calls
    parts = [rules, tokenizer.chat_template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def leading_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens (a BOS, usually, or none) that the tokenizer puts in front of a plain text."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    return next(full[:n] for n in range(len(full)) if full[n : n + len(bare)] == bare)


def _read_template(path: str) -> str:
    if path.endswith(TEMPLATE_SUFFIXES):
        if not Path(path).is_file():
            raise FileNotFoundError(f"chat_template_path={path}: no such file")
        return Path(path).read_text(encoding="utf-8")
    template = AutoTokenizer.from_pretrained(path).chat_template
    if not isinstance(template, str):
        raise ValueError(f"chat_template_path={path}: that tokenizer has no single chat template")
    return template
