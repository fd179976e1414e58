"""Which tokens of a conversation the assistant says: from marks in the template, or from how the text grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerFast

from jaxalign.data.formats import Bad
from jaxalign.data.templates import mark

Render = Callable[[list[Any], bool], str]
ADVICE = "set data.chat_template_path to a template with {% generation %} ... {% endgeneration %} around what it says"


def assistant_mask(
    tokenizer: PreTrainedTokenizerFast, example: Mapping[str, Any], name: str, tokens: Sequence[int], render: Render
) -> np.ndarray:
    """The tokens that the assistant says, bool `[tokens]`, the end of each of its turns included.

    They are what lies within `{% generation %}`, in the template itself or, of a stock template, in its marked version
    (see `templates`). In any other template a turn is what its message adds to the text, from the generation prompt to
    the last EOS; for that, the text of the messages up to it must begin the text of all.

    Args:
      tokenizer: with the chat template.
      example: normalised messages.
      name: the column of the (last) messages.
      tokens: of the whole text; the text may go on behind them.
      render: `(messages, add_generation_prompt) -> text`.

    Raises:
      Bad: a template without marks of which a turn's place cannot be told.
    """
    messages = example.get("prompt", []) + example[name]
    template = mark(tokenizer.get_chat_template(tools=example["tools"]))
    if template is None:
        return _between(
            tokenizer, _spans(messages, render, cast(str, tokenizer.eos_token)), render(messages, False), tokens
        )
    encoded = tokenizer.apply_chat_template(
        messages,
        tools=example["tools"],
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **example["chat_template_kwargs"],
    )
    mask = np.asarray(cast(BatchEncoding, encoded)["assistant_masks"][: len(tokens)], bool)
    if mask.any() and messages[-1]["role"] == "assistant" and not mask[-1]:
        raise Bad("lost EOS", f"the template writes {tokenizer.eos_token!r} outside of {{% generation %}}")
    return mask


def _spans(messages: list[Any], render: Render, eos: str) -> Iterator[tuple[int, int]]:
    """Where each turn of the assistant begins and ends in the text."""
    whole = render(messages, False)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:number], True), render(messages[: number + 1], False)
        kept = len(before) + after[len(before) :].rfind(eos) + len(eos) if eos in after[len(before) :] else len(after)
        if not (after.startswith(before) and whole.startswith(after[:kept])):
            raise Bad(
                "unmarked template",
                f"the chat template writes message {number} otherwise within the conversation than at its end, so that "
                f"what the assistant says cannot be told: {ADVICE}",
            )
        yield len(before), kept


def _between(
    tokenizer: PreTrainedTokenizerFast, spans: Iterator[tuple[int, int]], text: str, tokens: Sequence[int]
) -> np.ndarray:
    """The tokens that begin within spans of the text."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])[: len(tokens)]
    mask = np.zeros(len(tokens), bool)
    for start, end in spans:
        mask |= (starts >= start) & (starts < end)
    return mask
