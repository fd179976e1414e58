"""Token ids made to fit: their BOS, the EOS that ends them, and how many of them the limits leave."""

from __future__ import annotations

from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxalign.data.formats import Bad, DataConfig

Tokens = list[int]


def end_with_eos(tokenizer: PreTrainedTokenizerFast, plain: bool, tokens: Tokens, name: str) -> Tokens:
    """Tokens that end with EOS: appended to plain text, the last one that the template wrote for messages."""
    eos = cast(int, tokenizer.eos_token_id)
    if plain:
        return tokens if tokens[-1:] == [eos] else [*tokens, eos]
    end = len(tokens) - tokens[::-1].index(eos) if eos in tokens else 0
    if not end or cast(str, tokenizer.decode(tokens[end:], skip_special_tokens=True)).strip():
        last = tokenizer.convert_ids_to_tokens(tokens[-3:])
        raise Bad(
            "lost EOS",
            f"`{name}` does not end with {tokenizer.eos_token!r}: the chat template writes {last} last; if one of "
            "these ends a turn, set data.eos_token to it",
        )
    return tokens[:end]


def fit_limits(prompt: int, longest: int, bos: int, config: DataConfig) -> np.ndarray:
    """Positions that the limits leave of a prompt and its longest completion; raises `Bad` where they do not fit."""
    limit, mode = config.max_length, config.truncation_mode
    room = limit - 1 if longest else limit  # a completion needs one place at least
    most = min(config.max_prompt_length or room, room)
    if mode == "keep_end":
        if longest > room:
            raise Bad("too long", f"the completion alone has {longest} tokens; max_length is {limit}")
        kept = min(prompt, most, limit - longest)
        bos = bos if 1 < kept < prompt else 0
        return np.concatenate([np.arange(bos), np.arange(prompt - kept + bos, prompt + longest)])
    if prompt > most:
        raise Bad("long prompt", f"the prompt has {prompt} tokens; at most {most} fit")
    if mode is None and prompt + longest > limit:
        raise Bad("too long", f"{prompt + longest} tokens, {prompt} of them the prompt's; max_length is {limit}")
    return np.arange(min(prompt + longest, limit))


def count_bos(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> int:
    """1 where the tokens begin with a BOS, which truncation keeps; 0 also where it is what begins every turn."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and tokens[:1] == [bos] and bos not in tokens[1:])


def check_bos(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> None:
    """Raises `Bad` where a second BOS follows the first."""
    if tokenizer.bos_token_id is not None and tokens[:2] == [tokenizer.bos_token_id] * 2:
        raise Bad(
            "double BOS",
            f"the tokens begin with {tokenizer.bos_token!r} twice: the text or the chat template brings one of its own",
        )
