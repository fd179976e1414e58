"""One example -> token ids, through the tokenizer's chat template; every token sequence is checked before it is used.

Prompt and completion are never tokenised apart and glued together. The prompt, and the prompt with its completion, are
rendered and tokenised; the first must be a prefix of the second, and the completion is the rest. It ends with EOS:

- Messages: the template writes the EOS; what the template puts after it (ChatML: a line break) is left away, since a
  sampler stops at EOS and would never see it. A template that ends its turns with another token is a `lost EOS`.
- Plain strings: EOS is appended where the text does not end with it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxalign.data.fitting import Tokens, check_bos, count_bos, end_with_eos, fit_limits
from jaxalign.data.formats import Bad, DataConfig, conversational, normalise, prompt_key
from jaxalign.data.masks import assistant_mask
from jaxalign.data.tokenizer import leading_tokens

COMPLETIONS = ("text", "messages", "completion", "chosen", "rejected")  # columns of what follows a prompt, or is all
SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    Attributes:
      arrays: int32 `[tokens]` by name: `input_ids` and bool `loss_mask` (`sft`); `prompt_ids`, `chosen_ids` and
        `rejected_ids` (`preference`); `prompt_ids` (`prompt`); for `ranking` and `unpaired` see `encode`.
      targets: tokens in the loss mask; 0 unless `sft`.
      cut: tokens that truncation removed.
      key: hash of the prompt, see `formats.prompt_key`.
    """

    arrays: dict[str, np.ndarray]
    targets: int
    cut: int
    key: int


@dataclass(frozen=True)
class _Rendered:
    example: dict[str, Any]
    # The prompt first, if there is one; then the prompt with each completion (`stepwise`: each step, the separator).
    texts: tuple[str, ...]
    names: tuple[str, ...]  # columns of the completions, or of the whole text


def encode(
    tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any], kind: str, config: DataConfig
) -> dict[str, np.ndarray]:
    """One row as token ids and masks.

    Args:
      tokenizer: with its EOS token, and for messages its chat template (see `tokenizer.prepare`).
      row: columns of any form that serves `kind`; `tools` and `chat_template_kwargs` go to the template.
      kind: `sft`, `preference`, `ranking`, `stepwise`, `unpaired` or `prompt`.
      config: lengths, truncation and what to train on.

    Returns:
      int32 arrays `[tokens]`. `sft`: `input_ids`, and bool `loss_mask`, True where a token is a target (never index 0).
      `preference`: `prompt_ids`, `chosen_ids`, `rejected_ids`. `prompt`: `prompt_ids`. `ranking`: `prompt_ids`,
      `completion_ids` (all completions end to end), and per completion int32 `sizes`, int32 `ranks` (0 = best) and
      float32 `margins` (see `formats.normalise`). `stepwise`: `prompt_ids`, `completion_ids` (each step and its
      separator), and per step that truncation left whole int32 `ends`, the index in `completion_ids` of its separator's
      last token, and `labels`, 1 = right; besides `steps` `[1]`, how many there were. `unpaired`: `prompt_ids`,
      `completion_ids` (of a pair both), and per completion int32 `sizes` and int32 `labels` (1 = desirable).

    Raises:
      Bad: this row cannot be used.
      ValueError: no row like this can be used: no chat template or EOS; options that clash.
    """
    (result,) = encode_batch(tokenizer, [row], kind, config)
    if isinstance(result, Bad):
        raise result
    return result.arrays


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any] | Bad], kind: str, config: DataConfig
) -> list[Encoded | Bad]:
    """Several rows as tokens, or for each bad one the reason; see `encode`. Tokenised together, which is faster."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no completion could end: set data.eos_token")
    if kind != "sft" and (config.completion_only_loss is not None or config.assistant_only_loss):
        raise ValueError("completion_only_loss and assistant_only_loss are for supervised fine-tuning only")
    leading = leading_tokens(tokenizer)
    rendered = [_attempt(_render, tokenizer, row, kind, config) for row in rows]
    texts = [text for item in rendered if not isinstance(item, Bad) for text in item.texts]
    ids = iter(_tokenise(tokenizer, texts))

    def assemble(item: _Rendered) -> Encoded:
        before = [] if conversational(item.example) else leading
        # A step goes on where the one before it ends: only the prompt, the first text, begins a sequence.
        begins = [kind != "stepwise" or i == 0 for i in range(len(item.texts))]
        return ENCODERS[kind](tokenizer, item, [before * begin + next(ids) for begin in begins], config)

    return [item if isinstance(item, Bad) else _attempt(assemble, item) for item in rendered]


def _tokenise(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tokens]:
    """Token ids of texts that hold all their special tokens."""
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return cast(list[Tokens], encoded["input_ids"])


def _attempt(step: Callable[..., Any], *args: Any) -> Any:
    try:
        return step(*args)
    except Bad as bad:
        return bad


def _render(
    tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any] | Bad, kind: str, config: DataConfig
) -> _Rendered:
    if isinstance(row, Bad):
        raise row
    example = normalise(row, kind)
    if kind == "stepwise":
        return _Rendered(example, _encodable((example["prompt"], *example["steps"], config.step_separator)), ())
    contents = {name: example[name] for name in COMPLETIONS if name in example}
    contents |= {f"completions[{i}]": content for i, content in enumerate(example.get("completions", ()))}
    _check_options(tokenizer, example, config)
    for name, content in contents.items():
        if _empty(content):
            raise Bad("empty text" if name in ("text", "messages") else "empty completion", f"`{name}` has no text")
    if "prompt" not in example:
        texts = [_template(tokenizer, example, content) for content in contents.values()]
    else:
        if not example["prompt"] and conversational(example):
            raise Bad("empty prompt", "`prompt` has no messages")
        texts = [_template(tokenizer, example, example["prompt"], add_generation_prompt=True)]
        texts += [_template(tokenizer, example, example["prompt"] + content) for content in contents.values()]
    return _Rendered(example, _encodable(texts), tuple(contents))


def _template(
    tokenizer: PreTrainedTokenizerFast, example: Mapping[str, Any], content: Any, add_generation_prompt: bool = False
) -> str:
    """The text of a string (itself) or of messages (through the chat template)."""
    if isinstance(content, str):
        return content
    try:
        text = tokenizer.apply_chat_template(
            content,
            tools=example["tools"],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **example["chat_template_kwargs"],
        )
        return cast(str, text)
    except (jinja2.TemplateError, TypeError) as error:  # a template's own objection, or content that it cannot join
        raise Bad("template error", f"the chat template refuses the messages: {error}") from error


def _check_options(tokenizer: PreTrainedTokenizerFast, example: Mapping[str, Any], config: DataConfig) -> None:
    """Raises ValueError where no row of this form can be encoded as asked."""
    if conversational(example) and tokenizer.chat_template is None:
        raise ValueError(
            "the data are messages (role, content), but the tokenizer has no chat template: set "
            "data.chat_template_path to a Jinja file, or to the folder or Hub name of a tokenizer that has one"
        )
    if config.max_prompt_length is not None and "prompt" not in example:
        raise ValueError(
            f"data.max_prompt_length={config.max_prompt_length}: these data have no column `prompt`; leave it away"
        )
    if config.completion_only_loss and "prompt" not in example:
        raise ValueError("completion_only_loss=true needs the columns `prompt` and `completion`; leave it unset here")
    if config.assistant_only_loss and not conversational(example):
        raise ValueError("assistant_only_loss=true needs messages; these data are plain text")


def _sft(tokenizer: PreTrainedTokenizerFast, item: _Rendered, ids: list[Tokens], config: DataConfig) -> Encoded:
    name, plain = item.names[0], not conversational(item.example)
    check_bos(tokenizer, ids[-1])
    if "prompt" in item.example:
        prompt = len(ids[0])
        tokens = ids[0] + _completion(tokenizer, plain, ids[0], ids[1], name)
        fit = fit_limits(prompt, len(tokens) - prompt, count_bos(tokenizer, tokens), config)
    else:
        prompt, tokens = 0, end_with_eos(tokenizer, plain, ids[0], name)
        whole = (len(tokens), 0) if config.truncation_mode == "keep_end" else (0, len(tokens))
        fit = fit_limits(*whole, count_bos(tokenizer, tokens), config)
    mask = np.arange(len(tokens)) >= (1 if config.completion_only_loss is False else max(prompt, 1))
    if config.assistant_only_loss:
        render = functools.partial(_template, tokenizer, item.example)
        mask &= assistant_mask(tokenizer, item.example, name, tokens, render)
    if not mask.any():
        raise Bad("empty loss mask", "no token of this example would be trained on")
    kept, mask = np.asarray(tokens, np.int32)[fit], mask[fit]
    mask[0] = False  # nothing comes before the first token that could predict it
    if not mask.any():
        raise Bad("completion cut away", f"{len(tokens)} tokens; max_length={config.max_length} keeps none to train on")
    cut = len(tokens) - len(kept)
    return Encoded({"input_ids": kept, "loss_mask": mask}, int(mask.sum()), cut, prompt_key(item.example))


def _preference(tokenizer: PreTrainedTokenizerFast, item: _Rendered, ids: list[Tokens], config: DataConfig) -> Encoded:
    prompt, (chosen, rejected), cut = _branches(tokenizer, item, ids, config, (0, 1))
    arrays = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return Encoded(arrays, 0, cut, prompt_key(item.example))


def _ranking(tokenizer: PreTrainedTokenizerFast, item: _Rendered, ids: list[Tokens], config: DataConfig) -> Encoded:
    ranks = np.asarray(item.example["ranks"], np.int32)
    prompt, completions, cut = _branches(tokenizer, item, ids, config, ranks.tolist())
    arrays = {
        "prompt_ids": prompt,
        "completion_ids": np.concatenate(completions),
        "sizes": np.asarray([len(each) for each in completions], np.int32),
        "ranks": ranks,
        "margins": np.asarray(item.example["margins"], np.float32),
    }
    return Encoded(arrays, 0, cut, prompt_key(item.example))


def _unpaired(tokenizer: PreTrainedTokenizerFast, item: _Rendered, ids: list[Tokens], config: DataConfig) -> Encoded:
    labels = np.asarray(item.example["labels"], np.int32)
    prompt, completions, cut = _branches(tokenizer, item, ids, config, labels.tolist())
    arrays = {
        "prompt_ids": prompt,
        "completion_ids": np.concatenate(completions),
        "sizes": np.asarray([len(each) for each in completions], np.int32),
        "labels": labels,
    }
    return Encoded(arrays, 0, cut, prompt_key(item.example))


def _branches(
    tokenizer: PreTrainedTokenizerFast,
    item: _Rendered,
    ids: list[Tokens],
    config: DataConfig,
    ranks: Sequence[int],
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """A prompt and its completions as they fit, and how many tokens were cut; completions of one rank may be equal."""
    prompt, plain = ids[0], not conversational(item.example)
    completions = []
    for name, full in zip(item.names, ids[1:], strict=True):
        check_bos(tokenizer, full)
        completions.append(_completion(tokenizer, plain, prompt, full, name))
    fit = fit_limits(len(prompt), max(map(len, completions)), count_bos(tokenizer, prompt), config)
    prompt_ids = np.asarray(prompt, np.int32)[fit[fit < len(prompt)]]
    kept = [np.asarray(each, np.int32)[: (fit >= len(prompt)).sum()] for each in completions]
    cut = len(prompt) + sum(map(len, completions)) - len(prompt_ids) - sum(map(len, kept))
    for i, j in itertools.combinations(range(len(kept)), 2):
        if ranks[i] != ranks[j] and np.array_equal(kept[i], kept[j]):
            until = f" up to max_length={config.max_length}" if cut else ""
            raise Bad("identical pair", f"{item.names[i]} and {item.names[j]} are the same tokens{until}")
    return prompt_ids, kept, cut


def _prompt(tokenizer: PreTrainedTokenizerFast, item: _Rendered, ids: list[Tokens], config: DataConfig) -> Encoded:
    check_bos(tokenizer, ids[0])
    if not ids[0]:
        raise Bad("empty prompt", "`prompt` has no tokens")
    fit = fit_limits(len(ids[0]), 0, count_bos(tokenizer, ids[0]), config)
    kept = np.asarray(ids[0], np.int32)[fit]
    return Encoded({"prompt_ids": kept}, 0, len(ids[0]) - len(kept), prompt_key(item.example))


def _stepwise(tokenizer: PreTrainedTokenizerFast, item: _Rendered, ids: list[Tokens], config: DataConfig) -> Encoded:
    """Prompt and steps are tokenised apart, as TRL does, so that a separator never merges with the step before it."""
    prompt, *steps, separator = ids
    if not separator:
        raise ValueError(f"data.step_separator={config.step_separator!r} has no tokens: no step would be judged")
    check_bos(tokenizer, prompt)
    if not prompt:
        raise Bad("empty prompt", "`prompt` has no tokens")
    completion = [token for step in steps for token in (*step, *separator)]
    ends = np.cumsum([len(step) + len(separator) for step in steps]) - 1
    fit = fit_limits(len(prompt), len(completion), count_bos(tokenizer, prompt), config)
    kept = int((fit >= len(prompt)).sum())
    if kept <= ends[0]:
        raise Bad("completion cut away", f"max_length={config.max_length} leaves no step whole")
    arrays = {
        "prompt_ids": np.asarray(prompt, np.int32)[fit[fit < len(prompt)]],
        "completion_ids": np.asarray(completion, np.int32)[:kept],
        "ends": ends[ends < kept].astype(np.int32),
        "labels": np.asarray(item.example["labels"], np.int32)[ends < kept],
        "steps": np.asarray([len(steps)], np.int32),
    }
    return Encoded(arrays, 0, len(prompt) + len(completion) - len(fit), prompt_key(item.example))


ENCODERS = {
    "sft": _sft,
    "preference": _preference,
    "ranking": _ranking,
    "stepwise": _stepwise,
    "unpaired": _unpaired,
    "prompt": _prompt,
}


def _completion(tokenizer: PreTrainedTokenizerFast, plain: bool, prompt: Tokens, full: Tokens, name: str) -> Tokens:
    """The completion's tokens, EOS last, of the tokens of prompt and completion together."""
    if not prompt:
        raise Bad("empty prompt", "`prompt` has no tokens, so nothing could predict the completion's first one")
    if full[: len(prompt)] != prompt:
        at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
        alone, joined = (tokenizer.convert_ids_to_tokens(part[at : at + 3]) for part in (prompt, full))
        raise Bad(
            "prompt is no prefix",
            f"token {at} of {len(prompt)}: the prompt alone goes on {alone}, with `{name}` {joined}"
            + (" (move the white space between them to the completion's start)" if plain else ""),
        )
    return end_with_eos(tokenizer, plain, full[len(prompt) :], name)


def _empty(content: Any) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not any(message.get("tool_calls") or _has_text(message.get("content")) for message in content)


def _has_text(content: Any) -> bool:
    parts = content if isinstance(content, list) else [content or ""]
    return any(part.strip() if isinstance(part, str) else part.get("text", "").strip() for part in parts)


def _encodable(texts: Sequence[str]) -> tuple[str, ...]:
    if any(not text.isascii() and SURROGATE.search(text) for text in texts):
        raise Bad("wrong text", "half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return tuple(texts)
