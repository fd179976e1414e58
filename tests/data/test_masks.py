"""What the assistant says: by marks, by a stock template's marked version, by how the text grows."""

import numpy as np
import pytest

from jaxalign.data import DataConfig, encode
from jaxalign.data.formats import Bad
from jaxalign.data.templates import mark
from jaxalign.models import load_tokenizer
from tests.data.conftest import CHATML

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "The sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "The sea?"},
    {"role": "assistant", "content": "Deep, and blue."},
]
ASSISTANT = DataConfig("", assistant_only_loss=True)
# Rewrites what the assistant said before: its place cannot be told from shorter conversations.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if m['role'] == 'user' or loop.last else 'said' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(tokenizer, row, config=ASSISTANT) -> list[str]:
    """The stretches of targets, as text."""
    found = encode(tokenizer, row, "sft", config)
    ids, mask = found["input_ids"], found["loss_mask"].astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize("system", [True, False])
def test_an_unknown_template_by_how_the_text_grows(chatml, system):
    assert mark(CHATML) is None
    messages = [SYSTEM] * system + TURNS
    wanted = ["Blue.<|im_end|>", "Deep, and blue.<|im_end|>"]
    assert said(chatml, {"messages": messages}) == wanted
    assert said(chatml, {"messages": messages[:-1]}) == wanted[:1]
    # With a prompt, what the assistant said in it is no target.
    assert said(chatml, {"prompt": messages[:-1], "completion": messages[-1:]}) == wanted[1:]


def test_a_template_that_rewrites_the_past_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(FORGETFUL)
    with pytest.raises(Bad, match=r"unmarked template: .*message 1 .*set data\.chat_template_path"):
        encode(tokenizer, {"messages": TURNS}, "sft", ASSISTANT)
    assert said(tokenizer, {"messages": TURNS[:2]}) == ["Blue.<|im_end|>"]


def test_a_stock_template(smollm2):
    """SmolLM2's own: marked and unmarked tokens are the same, the marks are those that the text's growth gives."""
    tokenizer = load_tokenizer(smollm2)
    template = str(tokenizer.chat_template)
    marked = mark(template)
    assert marked is not None and marked != template and mark(marked) == marked
    assert mark(template + "\n") is not None and mark(template + " ") is None
    for messages in (TURNS, [SYSTEM, *TURNS], TURNS[:3], [SYSTEM, *TURNS[:2]]):
        for more in (False, True):
            plain, same = (
                tokenizer.apply_chat_template(messages, add_generation_prompt=more, chat_template=each, tokenize=False)
                for each in (template, marked)
            )
            assert plain == same
        by_mark = said(tokenizer, {"messages": messages})
        tokenizer.chat_template = template + "{# #}"  # renders the same, and is unknown
        assert said(tokenizer, {"messages": messages}) == by_mark
        tokenizer.chat_template = template
    assert by_mark == ["Blue.<|im_end|>"]
