"""A tokenizer from a GGUF file's metadata.

The vocabulary, merges and token types are in the metadata; how text is split before merging is only named there, so
the splits that the supported families were trained with are written out here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

logger = logging.getLogger("jaxalign")

# llama.cpp's token types; normal tokens are 1, unused ones 5, bytes 6.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rebuilt:
    """A tokenizer and what belongs to it.

    Attributes:
      tokenizer: text <-> ids, added tokens and the BOS rule included.
      chat_template: Jinja source, or None.
      special_tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token`, as far as the metadata names them.
      max_length: context length in tokens.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: dict[str, str]
    max_length: int


def rebuild_tokenizer(metadata: Mapping[str, Any]) -> Rebuilt:
    """Rebuilds the tokenizer.

    Args:
      metadata: a GGUF file's keys and values.

    Raises:
      ValueError: a kind of tokenizer, or a way to split text, that is not supported; the supported ones are listed.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in BUILDERS:
        raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported; known: {', '.join(BUILDERS)}")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer, adds_bos = BUILDERS[kind](metadata)
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    marked = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, kind in marked if kind in (UNKNOWN, CONTROL)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in marked if kind == USER_DEFINED])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    special = {f"{name}_token": tokens[number] for name, number in ids.items() if number is not None}
    _add_ends(tokenizer, metadata, adds_bos, special)
    return Rebuilt(
        tokenizer,
        metadata.get("tokenizer.chat_template"),
        special,
        metadata[f"{metadata['general.architecture']}.context_length"],
    )


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], adds_bos: bool, special: Mapping[str, str]) -> None:
    """Makes the tokenizer put BOS before, or EOS after, each text, where the metadata says so."""
    first = [special["bos_token"]] if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else []
    last = [special["eos_token"]] if metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B:1", *last],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
        )


def _byte_level(metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether it adds BOS where the metadata is silent."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre={name!r} is not supported; known: {', '.join(SPLITS)}")
    if name == "default":
        logger.warning("the GGUF file does not say how its tokenizer splits text; GPT-2's way is taken")
    split = SPLITS[name]
    # Llama 3 and tekken take a piece that is a token as it is, whether or not merges lead to it.
    whole = split in (_llama3_split, _tekken_split)
    vocabulary = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    if split is _qwen2_split:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole


def _sentencepiece(metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE as `tokenizers` writes it: merges by score, unknown characters as bytes."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    scores = {
        token: score
        for token, score, kind in zip(
            tokens, metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"], strict=True
        )
        if kind == NORMAL
    }
    merges = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    # A space goes before every piece of text between special tokens, as SentencePiece and llama.cpp do.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if spaced else spaces
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _by_regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _gpt2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _llama3_split() -> pre_tokenizers.PreTokenizer:
    return _by_regex(_WORDS + r"\p{N}{1,3}" + _REST)


def _qwen2_split() -> pre_tokenizers.PreTokenizer:
    return _by_regex(_WORDS + r"\p{N}" + _REST)


def _tekken_split() -> pre_tokenizers.PreTokenizer:
    return _by_regex(_TEKKEN)


BUILDERS: dict[str, Callable[[Mapping[str, Any]], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
# `tokenizer.ggml.pre` -> how text is split.
SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2_split,
    "gpt-2": _gpt2_split,
    "smollm": _smollm_split,
    "llama-bpe": _llama3_split,
    "llama3": _llama3_split,
    "llama-v3": _llama3_split,
    "qwen2": _qwen2_split,
    "deepseek-r1-qwen": _qwen2_split,
    "tekken": _tekken_split,
}
