# pyright: reportMissingImports=false
"""Marked stock templates against those that TRL 1.16.0 ships: the same text, and masks within TRL's own."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from jaxalign.data.templates import STOCK, mark
from jaxalign.models import load_tokenizer

trl = pytest.importorskip("trl")

from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

FOLDER = Path(trl.__file__).parent / "chat_templates"
HEADERS = ("<|im_start|>assistant\n", "assistant<|end_header_id|>\n\n", "<start_of_turn>model\n", "<|assistant|>\n")
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<eos>")
SYSTEM = {"role": "system", "content": "You are terse."}
USER, MORE = {"role": "user", "content": " What is 2+2? "}, {"role": "user", "content": "And 3+3?"}
ANSWER, THOUGHT = ({"role": "assistant", "content": text} for text in (" Four. ", "<think>\nhm\n</think>\n\nSix."))


def call(content, *names):
    calls = [{"type": "function", "function": {"name": name, "arguments": {"a": "1"}}} for name in names]
    return {"role": "assistant", "content": content, "tool_calls": calls}


TOOL = {"role": "tool", "name": "add", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
SHAPES = {
    "one turn": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "two turns": [SYSTEM, USER, ANSWER, MORE, THOUGHT],
    "thought first": [USER, THOUGHT, MORE, ANSWER],
    "user last": [USER, ANSWER, MORE],
    "no answer": [USER],
    "tool": [USER, call("", "add"), TOOL, ANSWER],
    "two tools": [SYSTEM, USER, call("I call.", "add", "sub"), TOOL, TOOL, ANSWER],
    "call last": [USER, call("", "add")],
}


def stock_template(name: str, smollm2: Path) -> str:
    return str(load_tokenizer(smollm2).chat_template) if name == "smollm2" else (FOLDER / f"{name}.jinja").read_text()


def render(template, messages, **options) -> tuple[Any, Any]:
    """The text and the spans of the marks, or the template's own objection."""
    try:
        texts, spans = render_jinja_template(
            [messages], chat_template=template, bos_token="<bos>", eos_token="<eos>", **options
        )
    except Exception as error:
        return type(error), str(error)
    return texts[0], spans[0] if spans else []


@pytest.mark.parametrize("name", STOCK)
def test_the_marked_template_renders_the_same(name, smollm2):
    template = stock_template(name, smollm2)
    marked = mark(template)
    assert marked is not None
    for old, _ in STOCK[name].edits:
        assert template.count(old) == 1, old
    checked = 0
    options = itertools.product(
        SHAPES.items(), (False, True), (None, TOOLS), ({}, {"builtin_tools": ["add"]}, {"enable_thinking": False})
    )
    for (shape, messages), more, tools, extra in options:
        rest = {"tools": tools, "add_generation_prompt": more, **extra}
        plain = render(template, messages, **rest)
        found = render(marked, messages, return_assistant_tokens_mask=True, **rest)
        assert found[0] == plain[0], shape
        if isinstance(found[0], type):
            assert found == plain  # both refuse, with the same words
            continue
        text, spans = found
        turns = [span for span in spans if text[slice(*span)] != "<eos>"]
        assert len(turns) == sum(message["role"] == "assistant" for message in messages), shape
        for start, end in turns:
            assert text[:start].endswith(HEADERS) and text[:end].endswith(ENDS), (shape, text[start:end])
        checked += 1
    assert checked >= 20


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "phi3_5"])
def test_masks_are_those_of_trl_less_what_no_model_says(name, smollm2):
    """TRL's training templates render the same text here; its marks take in the line breaks around a turn."""
    theirs = (FOLDER / f"{name}_training.jinja").read_text()
    ours = mark(stock_template(name, smollm2))
    compared = 0
    for messages in ([USER, ANSWER], [USER, ANSWER, MORE, THOUGHT]):
        (text, spans), (same, wider) = (
            render(each, messages, return_assistant_tokens_mask=True) for each in (ours, theirs)
        )
        assert text == same
        stripped = ["".join(text[slice(*span)]).strip("\n") for span in wider]
        found = [text[slice(*span)] for span in spans]
        assert "".join(found).replace("\n", "") == "".join(stripped).replace("\n", "")
        compared += 1
    assert compared
