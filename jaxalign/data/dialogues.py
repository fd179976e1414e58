"""Turns of a conversation as others write them: "Human:/Assistant:" texts, and {from, value} objects."""

from __future__ import annotations

import json
import re
from typing import Any

from jaxalign.data.formats import Bad

Message = dict[str, Any]
TURN = re.compile(r"\n\n(Human|Assistant):")
LAST_TURN = "\n\nAssistant:"
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# `from` in ShareGPT's turns -> our role.
ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bard": "assistant", "model": "assistant",
    "system": "system",
    "function_call": "call", "tool_call": "call",
    "observation": "tool", "tool": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip


def read_dialogue(text: str, name: str) -> list[Message]:
    r"""The messages of a text "\n\nHuman: ...\n\nAssistant: ...", white space around each taken off.

    Args:
      text: begins with a turn, perhaps without its line breaks.
      name: of its column, for errors.

    Raises:
      Bad: it begins otherwise, or a turn but the last is empty.
    """
    text = text if text.startswith("\n\n") else "\n\n" + text.lstrip()
    parts = TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise Bad("no dialogue", f"`{name}` does not begin with a turn `Human:` or `Assistant:`")
    turns = [
        {"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    empty = next((i for i, turn in enumerate(turns[:-1]) if not turn["content"]), None)
    if empty is not None:
        raise Bad("no dialogue", f"turn {empty + 1} of `{name}` says nothing")
    return turns


def split_dialogues(chosen: str, rejected: str) -> tuple[list[Message], list[Message], list[Message]]:
    r"""The prompt that two dialogues share, up to the last "\n\nAssistant:" of both, and the two answers.

    Raises:
      Bad: one is no dialogue, ends with a human's turn, or they part before the last answer.
    """
    sides = {"chosen": read_dialogue(chosen, "chosen"), "rejected": read_dialogue(rejected, "rejected")}
    for name, turns in sides.items():
        if turns[-1]["role"] != "assistant":
            raise Bad("no answer", f"`{name}` ends with a human's turn")
    (*prompt, answer), (*other, refused) = sides.values()
    if prompt != other:
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other))
        )
        raise Bad(
            "prompts differ",
            f"chosen and rejected part in turn {at + 1}, before their last `Assistant:` "
            f"({len(prompt) + 1} and {len(other) + 1} turns)",
        )
    if not prompt:
        raise Bad("empty prompt", "chosen and rejected begin with the answer")
    return prompt, [answer], [refused]


def message_of(turn: Any, where: str) -> Message:
    """A {from, value} turn, or a {role, content} one, as a message; a `function_call` becomes a tool call.

    Args:
      turn: one of ShareGPT's turns.
      where: for errors.

    Raises:
      Bad: it has no text, or nobody that we know says it.
    """
    if not isinstance(turn, dict):
        raise Bad("wrong type", f"{where} is a {type(turn).__name__}; an object with from and value expected")
    speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise Bad("unknown speaker", f"{where} is from {speaker!r}; known are {', '.join(ROLES)}")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(said, where)}
    if not isinstance(said, str):
        raise Bad("wrong type", f"the value of {where} is a {type(said).__name__}; text expected")
    return {"role": role, "content": said}


def _calls(said: Any, where: str) -> list[Message]:
    try:
        found = json.loads(said) if isinstance(said, str) else said
    except json.JSONDecodeError as error:
        raise Bad("wrong type", f"{where} is a function call but no JSON: {error.msg}") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Bad("wrong type", f"{where} is a function call without `name` and `arguments`")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
